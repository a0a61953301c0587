"""Fixtures of the demo's tests: a fleet of handmade linear models, and a fake mesh that serves them."""

import hashlib

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from mesh.demo.fleet import worker
from mesh.demo.fleet.catalogue import Fleet, Sample, Tensor
from mesh.demo.fleet.datasets import rows_file
from tests.demo.fakemesh import FakeMesh

FLOATS, DOUBLES, TEXTS = "FP32", "FP64", "BYTES"


def linear(slope: float, kind: str) -> bytes:
    """Returns a model of y = slope * x over four columns of floats or doubles. With `TEXTS` it also returns a text for
    the column with the largest product."""
    element = TensorProto.DOUBLE if kind == DOUBLES else TensorProto.FLOAT
    given = helper.make_tensor_value_info("input", element, [None, 4])
    factor = numpy_helper.from_array(np.array(slope, np.float64 if kind == DOUBLES else np.float32), "slope")
    nodes = [helper.make_node("Mul", ["input", "slope"], ["y"])]
    outputs = [helper.make_tensor_value_info("y", element, [None, 4])]
    if kind == TEXTS:
        nodes += [
            helper.make_node("ArgMax", ["y"], ["label"], axis=1, keepdims=0),
            helper.make_node(
                "LabelEncoder",
                ["label"],
                ["name"],
                domain="ai.onnx.ml",
                keys_int64s=[0, 1, 2, 3],
                values_strings=["a", "bé", "c" * 300, ""],
            ),
        ]
        outputs += [
            helper.make_tensor_value_info("label", TensorProto.INT64, [None]),
            helper.make_tensor_value_info("name", TensorProto.STRING, [None]),
        ]
    graph = helper.make_graph(nodes, "g", [given], outputs, [factor])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


@pytest.fixture
def tiny(tmp_path) -> Fleet:
    """Nine small models whose ids must be quoted in URLs."""
    worker.save(rows_file(tmp_path, "iris"), np.random.default_rng(0).random((50, 4), np.float32))
    samples = []
    for number in range(9):
        kind = (FLOATS, DOUBLES, TEXTS)[number % 3]
        path = tmp_path / "models" / f"{number}.onnx"
        content = linear(number + 1.5, kind)
        worker.write(path, content)
        samples.append(
            Sample(
                id=f"customer {number}/ä",
                path=path,
                inputs=(Tensor("input", "FP64" if kind == DOUBLES else "FP32", (-1, 4)),),
                dataset="iris",
                bytes=len(content),
                memory=1000,
                sha256=hashlib.sha256(content).hexdigest(),
                recipe="",
                licence="Apache-2.0",
                source="made by hand",
            )
        )
    return Fleet(tmp_path, tuple(samples))


@pytest.fixture
async def mesh(tiny):
    mesh = FakeMesh(tiny)
    await mesh.start()
    yield mesh
    await mesh.stop()
