"""The kinds of model servers, and the types of models that run code."""

from types import SimpleNamespace
from typing import Any

import pytest

from mesh.modelservers import kinds
from router.loads.choosing import Choosing


def test_a_pod_takes_types_that_run_code_only_if_it_may() -> None:
    """Without `--allow-code`, a pod with MLServer takes boosters, whose files are only data."""
    assert set(kinds.MLSERVER.served(allow_code=False)) == {"xgboost", "lightgbm", "catboost"}
    assert set(kinds.MLSERVER.served(allow_code=True)) - set(kinds.MLSERVER.served(allow_code=False)) == {
        "sklearn",
        "mlflow",
        "python",
    }
    assert kinds.runs_code("mlflow")
    assert not kinds.runs_code("onnx")
    assert kinds.takers("lightgbm") == [kinds.MLSERVER]
    assert not kinds.takers("onnx")


def test_a_server_that_mesh_installs_may_take_fewer_types() -> None:
    """The Triton of `mesh servers install` has only the Python backend, so other models need another Triton."""
    assert kinds.TRITON.served(allow_code=True, installed=True) == ("triton-python",)
    assert not kinds.TRITON.served(allow_code=False, installed=True)
    assert "openvino_ir" in kinds.TRITON.served(allow_code=False)
    assert {"tensorrt", "triton-python"} <= set(kinds.TRITON.served(allow_code=True))
    assert kinds.takers("triton-python") == [kinds.TRITON]
    assert not kinds.takers("tensorrt"), "no server that Mesh installs takes it"


@pytest.mark.parametrize(
    ("model_type", "says"),
    [("sklearn", True), ("mt:sklearn:1", True), ("xgboost", False), ("odd", False)],
)
def test_a_type_that_no_pod_takes_because_it_runs_code_is_reported_so(model_type: str, says: bool) -> None:
    """The note about a model that no pod takes names `--allow-code` if models of this type run code."""
    pods = {"a": SimpleNamespace(record=SimpleNamespace(types=("onnx",)))}
    view: Any = SimpleNamespace(pods=pods)
    choosing = Choosing.__new__(Choosing)
    choosing._view = view
    text = choosing.untaken(model_type)
    assert text.startswith(f"no pod accepts models of type {model_type}")
    assert ("--allow-code" in text) is says
