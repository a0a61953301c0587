"""The settings with which a model server that Mesh has installed starts."""

import json
from pathlib import Path

import pytest

from mesh.modelservers import environments
from mesh.runtime.servers import adapted

ALL = [
    *("mlserver_xgboost", "mlserver_lightgbm", "mlserver_catboost", "mlserver_sklearn", "mlserver_mlflow"),
    "mlserver_python",  # the launcher's own
]


@pytest.mark.parametrize(
    ("types", "packages"),
    [
        pytest.param((), ALL, id="any"),
        pytest.param(("sklearn", "xgboost:1", "mine"), ["mlserver_xgboost", "mlserver_sklearn"], id="some"),
        pytest.param(("mine",), [], id="none of its own"),
    ],
)
def test_the_packages_of_the_pods_types_are_imported_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, types: tuple[str, ...], packages: list[str]
) -> None:
    """The server imports the packages that the pod's types need, and no others, before it loads models. The libraries
    then belong to the memory that the server takes without models."""
    monkeypatch.setattr(environments, "installed", lambda kind: tmp_path / kind)
    started = adapted.begin("mlserver", tmp_path / "folder", threads=1, types=types)
    settings = json.loads(Path(started.words[-1]).read_text())
    assert settings[adapted.PRELOAD] == packages


def test_a_server_that_others_start_finds_its_launcher_in_the_common_folder(tmp_path: Path) -> None:
    """The pod leaves MLServer's launcher beside the folder of models, with the packages of the pod's types. A pod that
    starts again replaces both the launcher and the list of packages."""
    for types, package in ((("sklearn",), "mlserver_sklearn"), (("xgboost",), "mlserver_xgboost")):
        adapted.share("mlserver", tmp_path / "folder", types=types)
        there = {path.name: path for path in (tmp_path / "folder").iterdir()}
        programs = {"mlserver_app.py", "mlserver_python.py", "mlserver_usercode.py"}
        assert set(there) == {"models", "mlserver_app.json", *programs}
        for name in programs:
            own = environments.launcher_of("mlserver").with_name(name)
            assert there[name].read_bytes() == own.read_bytes()
        assert json.loads(there["mlserver_app.json"].read_text())[adapted.PRELOAD] == [package]
    adapted.share("triton", tmp_path / "other", types=())
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["models"]


def test_settings_that_others_keep_in_the_common_folder_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLServer reads `settings.json` in the folder with which it is started. If that is the common folder, the file is
    its owner's: the server would otherwise start the next time with other ports and processes."""
    monkeypatch.setattr(environments, "installed", lambda kind: tmp_path / kind)
    own = tmp_path / "settings.json"
    own.write_text('{"grpc_port": 8001}')
    adapted.share("mlserver", tmp_path, types=())
    adapted.begin("mlserver", tmp_path, threads=1, types=())
    assert json.loads(own.read_text()) == {"grpc_port": 8001}
