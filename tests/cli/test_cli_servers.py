"""`mesh servers`, and the pods of `mesh up --server`."""

import json

import pytest
from typer.testing import CliRunner

from mesh.cli.app import build
from mesh.local import parts
from mesh.local.settings import UpError, UpSettings, counted
from mesh.modelservers import environments, torchserve

WIDE = {"COLUMNS": "200"}


@pytest.fixture(autouse=True)
def empty(tmp_path, monkeypatch):
    """Sets variables such that no server is installed."""
    monkeypatch.setenv(environments.VARIABLE, str(tmp_path / "servers"))
    monkeypatch.setenv(torchserve.VARIABLE, "/nowhere/torchserve")


def test_servers_are_listed_with_their_types() -> None:
    """The list shows the version and the types of each server, and whether it is installed. For TorchServe, which Mesh
    does not install, it says why TorchServe cannot be used."""
    result = CliRunner().invoke(build(), ["servers"], env=WIDE)
    assert result.exit_code == 0, result.output
    lines = {line.split()[0]: line.split()[1:] for line in result.output.splitlines()}
    assert lines["mlserver"] == [
        environments.version("mlserver"),
        "no",
        "xgboost,lightgbm,catboost",
        "sklearn,mlflow,python",
    ]
    assert lines["triton"] == [environments.version("triton"), "no", "triton-python"], "it has no other backend"
    found = json.loads(CliRunner().invoke(build(), ["servers", "--json"]).stdout)
    assert not any(one["installed"] for one in found["servers"])
    assert any(line.startswith("torchserve: /nowhere/torchserve cannot be read") for line in result.output.splitlines())


def test_an_unknown_server_is_refused() -> None:
    """The error for an unknown server names the servers that can be installed. TorchServe is not one of them. A server
    that is not installed cannot be removed."""
    result = CliRunner().invoke(build(), ["servers", "install", "tensorflow"], env=WIDE)
    assert result.exit_code == 2
    assert "use mlserver" in result.output
    result = CliRunner().invoke(build(), ["servers", "install", "torchserve"], env=WIDE)
    assert result.exit_code == 2
    assert "Mesh does not install torchserve. /nowhere/torchserve cannot be read" in result.output
    assert "not installed" in CliRunner().invoke(build(), ["servers", "rm", "mlserver"]).output


def test_pods_are_counted_by_server() -> None:
    """`--server` may be repeated. A kind of server without a number means one pod."""
    assert counted(["onnx=2", "mlserver", "mlserver=2"]) == {"onnx": 2, "mlserver": 3}
    for text in ("jboss", "onnx=", "onnx=-1", "onnx=65", "=3"):
        with pytest.raises(ValueError, match=r"not a kind of server|number of pods must be"):
            counted([text])
    result = CliRunner().invoke(build(), ["up", "--server", "jboss=2"], env=WIDE)
    assert result.exit_code == 2
    assert "is not a kind of server: use onnx, mlserver" in " ".join(result.output.split())


def test_pods_of_all_kinds_get_their_command_lines() -> None:
    """ONNX pods come first, then the pods of other servers. Only the others get `--adapter` and `--allow-code`."""
    settings = UpSettings(pods=1, adapted=("mlserver",), allow_code=True, capacity=5)
    assert settings.all_pods == 2
    onnx, adapted = (parts.LocalPod(settings, n, etcd_url="u", session=None).argv() for n in (1, 2))  # type: ignore[arg-type]
    assert not {"--adapter", "--allow-code"} & set(onnx)
    assert adapted[adapted.index("--adapter") + 1] == "mlserver"
    assert "--allow-code" in adapted
    assert adapted[adapted.index("--capacity") + 1] == "5"


def test_a_server_of_code_alone_is_refused_unless_code_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton is refused without `--allow-code`, because the Triton that Mesh installs can load only code."""
    monkeypatch.setattr(environments, "installed", lambda kind: True)
    with pytest.raises(UpError, match="triton serves only models that run code: add --allow-code"):
        UpSettings(adapted=("triton",)).check()
    UpSettings(adapted=("triton",), allow_code=True).check()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (UpSettings(adapted=("mlserver",)), "run `mesh servers install mlserver`"),
        (UpSettings(adapted=("torchserve",), allow_code=True), "/nowhere/torchserve cannot be read"),
        (UpSettings(allow_code=True), "--allow-code applies only to pods of other servers"),
        (UpSettings(pods=0), "at least 1 runtime pod"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: UpSettings, says: str) -> None:
    with pytest.raises(UpError, match=says):
        settings.check()
