"""Refusal of models whose functions expand to too many operators, before onnxruntime reads them."""

import onnx
import pytest
from onnx import helper

from mesh.runtime.server.onnx import functions, onnxfile
from mesh.statuses import MeshError, Reason
from tests.runtime.server.conftest import ONE, outputs
from tests.support import models


def judged(tmp_path, content: bytes) -> str | None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    return functions.too_many(path)


async def test_a_model_with_functions_is_served(parts):
    await parts.load("m", models.nested_functions(6))
    assert (await outputs(parts.infer("m", x=ONE)))[0].item() == 1  # negated 32 times


def test_functions_that_each_call_the_one_before_twice_are_too_many(tmp_path):
    """A file of less than 4 KB expands to 33,554,432 operators. The error says so, and what to do."""
    path = tmp_path / "model.onnx"
    path.write_bytes(models.nested_functions(26))
    assert path.stat().st_size < 4000
    with pytest.raises(MeshError, match=f"has {2**25} operators.*inline them") as error:
        onnxfile.find(str(path))
    assert error.value.reason is Reason.BAD_REQUEST


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param(models.constant(1), None, id="none"),
        pytest.param(models.weights(1, mebibytes=2), None, id="weights"),
        pytest.param(models.nested_functions(15), None, id="many"),
        pytest.param(models.nested_functions(16), "operators", id="too-many"),
        pytest.param(models.nested_functions(3, calls=150), "operators", id="wide"),
        pytest.param(models.nested_functions(100, calls=1), None, id="deep"),
        pytest.param(models.nested_functions(101, calls=1), "nested", id="too-deep"),
        pytest.param(models.nested_functions(5000, calls=1), "nested", id="much-too-deep"),
        pytest.param(models.nested_functions(200, calls=3), "100", id="beyond-all-numbers"),
        pytest.param(models.nested_functions(3, recursive=True), "recursive", id="recursive"),
        pytest.param(models.nested_functions(1, recursive=True), "recursive", id="itself"),
        pytest.param(b"no model", None, id="garbage"),
        pytest.param(models.nested_functions(26)[:-5], None, id="cut"),
    ],
)
def test_functions_are_counted(tmp_path, content, says):
    """Operators are counted without expanding the functions, so large expansions cost no time. A file that is not a
    model is left to onnxruntime."""
    found = judged(tmp_path, content)
    assert found is None if says is None else says in (found or "")


def test_calls_in_subgraphs_count(tmp_path):
    model = onnx.ModelProto.FromString(models.nested_functions(14))  # 8192 operators
    assert judged(tmp_path, model.SerializeToString()) is None
    branches = []
    for name in ("then_branch", "else_branch"):
        call = helper.make_node("F13", ["x"], ["z"], domain="functions")
        branches.append(helper.make_attribute(name, helper.make_graph([call], name, [], [])))
    node = helper.make_node("If", ["c"], ["z"])
    node.attribute.extend(branches)
    model.graph.node.append(node)
    found = judged(tmp_path, model.SerializeToString())
    assert found is not None
    assert str(3 * 8192 + 1) in found


def test_overloads_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(functions, "MAX_OPERATORS", 2)
    model = onnx.ModelProto.FromString(models.nested_functions(2))
    copied = model.functions.add()
    copied.CopyFrom(model.functions[1])
    copied.overload = "more"
    for node in copied.node:
        node.op_type, node.domain = "Neg", "ai.onnx"
    copied.node.add().CopyFrom(copied.node[0])
    # Two operators, through the function without an overload.
    assert judged(tmp_path, model.SerializeToString()) is None
    model.graph.node[0].overload = "more"
    assert "has 3 operators" in judged(tmp_path, model.SerializeToString())
