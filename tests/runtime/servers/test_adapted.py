"""The start of a model server that Mesh has installed: its settings."""

import json
from pathlib import Path

import pytest

from mesh.modelservers import environments
from mesh.runtime.servers import adapted

ALL = ["mlserver_xgboost", "mlserver_lightgbm", "mlserver_catboost", "mlserver_sklearn", "mlserver_mlflow"]


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
    """A library belongs to the memory that the server takes without models, and only the libraries that the pod's types
    need are imported."""
    monkeypatch.setattr(environments, "installed", lambda kind: tmp_path / kind)
    started = adapted.begin("mlserver", tmp_path / "folder", threads=1, types=types)
    settings = json.loads(Path(started.words[-1]).read_text())
    assert settings[adapted.PRELOAD] == packages
