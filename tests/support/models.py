"""Tiny ONNX models for tests, as bytes: good ones, and each kind of bad one. The functions' docstrings say what the
models do.

All are deterministic: the same arguments give the same bytes. Unless its docstring says otherwise, a model takes `x`
(FP32, shape [-1, 1]) and answers `y` of the same shape, so one request works for all of them.
"""

import functools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

LOGISTIC_REGRESSION_INPUT = "x"
LOGISTIC_REGRESSION_OUTPUTS = ("label", "probabilities")

ONNX_TYPES = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "BF16": TensorProto.BFLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}
"""The datatypes of V2, with ONNX's types for them."""

Shape = Sequence[int | str | None] | None


def _value(name: str, datatype: str = "FP32", shape: Shape = (None, 1)) -> Any:
    return helper.make_tensor_value_info(name, ONNX_TYPES[datatype], shape)


def _model(
    nodes: Sequence[NodeProto],
    *,
    inputs: Sequence[Any] | None = None,
    outputs: Sequence[Any] | None = None,
    initializers: Sequence[TensorProto] = (),
    opset: int = 17,
) -> bytes:
    graph: GraphProto = helper.make_graph(
        nodes, "g", [_value("x")] if inputs is None else inputs, outputs or [_value("y")], initializers
    )
    sets = [helper.make_opsetid("", opset), helper.make_opsetid("ai.onnx.ml", 3)]
    model: ModelProto = helper.make_model(graph, opset_imports=sets, ir_version=8)
    return model.SerializeToString(deterministic=True)


def _constant(name: str, value: Any, dtype: Any = np.float32) -> TensorProto:
    return numpy_helper.from_array(np.array(value, dtype), name)


# -- good ones


def constant(value: float) -> bytes:
    """Answers `value` for every row, so an answer shows which file it came from."""
    return _model(
        [helper.make_node("Shape", ["x"], ["s"]), helper.make_node("Expand", ["c", "s"], ["y"])],
        initializers=[_constant("c", value)],
    )


def weights(value: float, *, mebibytes: int) -> bytes:
    """Answers `value`, and holds that many MiB of weights in memory."""
    table = np.full(mebibytes << 18, value, np.float32)
    # The index depends on the input, else the optimizer would keep the one value and drop the table.
    return _model(
        [
            helper.make_node("IsNaN", ["x"], ["n"]),
            helper.make_node("Cast", ["n"], ["i"], to=TensorProto.INT64),
            helper.make_node("Gather", ["w", "i"], ["y"]),
        ],
        initializers=[numpy_helper.from_array(table, "w")],
    )


def unused_weights(*, mebibytes: int) -> bytes:
    """Answers 1 for every row. The file is large, but none of its weights stay in memory."""
    unused = _constant("unused", np.zeros(mebibytes << 18))
    nodes = [helper.make_node("Shape", ["x"], ["s"]), helper.make_node("Expand", ["c", "s"], ["y"])]
    return _model(nodes, initializers=[_constant("c", 1.0), unused])


def dense(seed: int, width: int) -> bytes:
    """Answers `y`, which is `x` @ `dense_weights(seed, width)`, with shapes [-1, width] and 4 * width * width bytes of
    weights."""
    return _model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        inputs=[_value("x", shape=(None, width))],
        outputs=[_value("y", shape=(None, width))],
        initializers=[numpy_helper.from_array(dense_weights(seed, width), "w")],
    )


def dense_weights(seed: int, width: int) -> np.ndarray:
    """Returns an FP32 matrix [width, width] with variance 1 / width."""
    return np.random.default_rng(seed).standard_normal((width, width), np.float32) / np.float32(np.sqrt(width))


def linear(weights: np.ndarray, bias: float, *, width: int = 1) -> bytes:
    """Takes `x` FP32 [-1, features] and answers `y` FP32 [-1, 1], which is about `x` @ `weights` + `bias`, computed as
    the mean over a layer of that width."""
    layer = np.random.default_rng(0).uniform(0.9, 1.1, (len(weights), width)) * weights.reshape(-1, 1)
    return _model(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("ReduceMean", ["h"], ["m"], axes=[1]),
            helper.make_node("Add", ["m", "b"], ["y"]),
        ],
        inputs=[_value("x", shape=(None, len(weights)))],
        outputs=[_value("y", shape=(None, 1))],
        initializers=[numpy_helper.from_array(layer.astype(np.float32), "w"), _constant("b", [bias])],
    )


def intricate(value: float, *, nodes: int = 6000) -> bytes:
    """Answers `x * 0 + value`. Many nodes make its constants, so onnxruntime's optimisers take long."""
    made = [helper.make_node("Mul", ["x", "zero"], ["x0"])]
    initializers = [_constant("zero", 0.0), _constant("c0", value), _constant("one", 1.0)]
    made += [helper.make_node("Mul", [f"c{number}", "one"], [f"c{number + 1}"]) for number in range(nodes)]
    made.append(helper.make_node("Add", ["x0", f"c{nodes}"], ["y"]))
    return _model(made, initializers=initializers)


def identity(datatype: str = "FP32", shape: Shape = (None,)) -> bytes:
    """Answers `x` as `y`, with any V2 datatype. The shape may be None (any rank)."""
    return _model(
        [helper.make_node("Identity", ["x"], ["y"])],
        inputs=[_value("x", datatype, shape)],
        outputs=[_value("y", datatype, shape)],
    )


def add(datatype: str = "FP32", shape: Shape = (None, 2)) -> bytes:
    """Answers `y`, which is `a` + `b`."""
    return _model(
        [helper.make_node("Add", ["a", "b"], ["y"])],
        inputs=[_value("a", datatype, shape), _value("b", datatype, shape)],
        outputs=[_value("y", datatype, shape)],
    )


def matmul(datatype: str = "FP32") -> bytes:
    """Answers `y`, which is `a` @ `b`, with shapes [-1, -1]. Inputs can fit the declared shapes but not each other."""
    return _model(
        [helper.make_node("MatMul", ["a", "b"], ["y"])],
        inputs=[_value("a", datatype, (None, None)), _value("b", datatype, (None, None))],
        outputs=[_value("y", datatype, (None, None))],
    )


def shout() -> bytes:
    """Takes and answers BYTES, shape [-1]: each text with an exclamation mark appended."""
    mark = helper.make_tensor("mark", TensorProto.STRING, [1], [b"!"])
    return _model(
        [helper.make_node("StringConcat", ["x", "mark"], ["y"])],
        inputs=[_value("x", "BYTES", (None,))],
        outputs=[_value("y", "BYTES", (None,))],
        initializers=[mark],
        opset=20,
    )


def picky() -> bytes:
    """Answers `x` as [2, 2], and fails unless `x` has four rows, so it also fails on most generated inputs."""
    return _model(
        [helper.make_node("Reshape", ["x", "s"], ["y"])],
        outputs=[_value("y", shape=(2, 2))],
        initializers=[_constant("s", [2, 2], np.int64)],
    )


def lower(locale: str) -> bytes:
    """Converts BYTES to lower case by the rules of a locale."""
    return _model(
        [helper.make_node("StringNormalizer", ["x"], ["y"], case_change_action="LOWER", locale=locale)],
        inputs=[_value("x", "BYTES", (None,))],
        outputs=[_value("y", "BYTES", (None,))],
    )


def without_inputs() -> bytes:
    """Takes nothing and answers `y` FP32 [2]: 1, 2."""
    return _model(
        [helper.make_node("Identity", ["c"], ["y"])],
        inputs=[],
        outputs=[_value("y", shape=(2,))],
        initializers=[_constant("c", [1, 2])],
    )


def with_default() -> bytes:
    """Answers `x` + `offset`. If `offset` (shape [1]) is omitted, it is 10."""
    return _model(
        [helper.make_node("Add", ["x", "offset"], ["y"])],
        inputs=[_value("x"), _value("offset", shape=(1,))],
        initializers=[_constant("offset", [10])],
    )


def with_defaults() -> bytes:
    """Answers `x` + `offset`. If an input is omitted, it is 10, so no input is required."""
    return _model(
        [helper.make_node("Add", ["x", "offset"], ["y"])],
        inputs=[_value("x", shape=(1,)), _value("offset", shape=(1,))],
        outputs=[_value("y", shape=(1,))],
        initializers=[_constant("x", [10]), _constant("offset", [10])],
    )


def with_optional(datatype: str = "FP32") -> bytes:
    """Answers `o` if it is given, otherwise `x`. `o` has the type optional(tensor)."""
    kind = ONNX_TYPES[datatype]
    optional = helper.make_optional_type_proto(helper.make_tensor_type_proto(kind, [None]))
    given = helper.make_graph(
        [helper.make_node("OptionalGetElement", ["o"], ["g"])], "given", [], [_value("g", datatype, (None,))]
    )
    absent = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["a"])], "absent", [], [_value("a", datatype, (None,))]
    )
    return _model(
        [
            helper.make_node("OptionalHasElement", ["o"], ["has"]),
            helper.make_node("If", ["has"], ["y"], then_branch=given, else_branch=absent),
        ],
        inputs=[_value("x", datatype, (None,)), helper.make_value_info("o", optional)],
        outputs=[_value("y", datatype, (None,))],
        opset=18,
    )


def all_types(*datatypes: str, shape: Shape = None) -> bytes:
    """Answers each input, `x0`, `x1` and so on, as `y0`, `y1`."""
    return _model(
        [helper.make_node("Identity", [f"x{n}"], [f"y{n}"]) for n in range(len(datatypes))],
        inputs=[_value(f"x{n}", datatype, shape) for n, datatype in enumerate(datatypes)],
        outputs=[_value(f"y{n}", datatype, shape) for n, datatype in enumerate(datatypes)],
    )


def logistic_regression(seed: int, features: int = 64, classes: int = 3) -> bytes:
    """Takes `x` FP32 [-1, features] and answers `label` INT64 [-1] and `probabilities` FP32 [-1, classes]."""
    return _model(
        [_classifier(seed, features, classes)],
        inputs=[_value("x", shape=(None, features))],
        outputs=[_value("label", "INT64", (None,)), _value("probabilities", shape=(None, classes))],
    )


def with_map_output(seed: int = 0, features: int = 4, classes: int = 3) -> bytes:
    """Answers like a classifier that a converter has written: `label`, and `scores` as a sequence of maps, which V2
    cannot represent."""
    maps = helper.make_sequence_type_proto(
        helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    )
    return _model(
        [
            _classifier(seed, features, classes),
            helper.make_node(
                "ZipMap", ["probabilities"], ["scores"], domain="ai.onnx.ml", classlabels_int64s=list(range(classes))
            ),
        ],
        inputs=[_value("x", shape=(None, features))],
        outputs=[_value("label", "INT64", (None,)), helper.make_value_info("scores", maps)],
    )


def sequence_input() -> bytes:
    """Takes a sequence of tensors, which V2 cannot represent, and answers its length."""
    sequence = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, [1]))
    return _model(
        [helper.make_node("SequenceLength", ["x"], ["y"])],
        inputs=[helper.make_value_info("x", sequence)],
        outputs=[_value("y", "INT64", ())],
    )


def sequence_output() -> bytes:
    """Answers only a sequence of tensors, which V2 cannot represent."""
    sequence = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    return _model(
        [helper.make_node("SequenceConstruct", ["x"], ["y"])], outputs=[helper.make_value_info("y", sequence)]
    )


def _classifier(seed: int, features: int, classes: int) -> NodeProto:
    random = np.random.default_rng(seed)
    return helper.make_node(
        "LinearClassifier",
        ["x"],
        ["label", "probabilities"],
        domain="ai.onnx.ml",
        coefficients=random.normal(size=features * classes).astype(np.float32).tolist(),
        intercepts=random.normal(size=classes).astype(np.float32).tolist(),
        classlabels_ints=list(range(classes)),
        post_transform="SOFTMAX",
        multi_class=0,
    )


# -- those that take long


def nested_functions(depth: int, *, calls: int = 2, recursive: bool = False) -> bytes:
    """Returns a model of `depth` functions. The first negates its input, and each other one calls the one before it
    `calls` times. With `recursive`, the first calls the last instead, which makes the model invalid."""
    domain = "functions"
    sets = [helper.make_opsetid("", 17), helper.make_opsetid(domain, 1)]

    def function(number: int) -> Any:
        links = ["a", *(f"t{call}" for call in range(calls - 1)), "b"]
        callee, where = (f"F{number - 1}", domain) if number else ("Neg", "")
        if recursive and not number:
            callee, where = f"F{depth - 1}", domain
        count = calls if number else 1
        links = links if number else ["a", "b"]
        nodes = [helper.make_node(callee, [links[at]], [links[at + 1]], domain=where) for at in range(count)]
        return helper.make_function(domain, f"F{number}", ["a"], ["b"], nodes, sets)

    graph = helper.make_graph(
        [helper.make_node(f"F{depth - 1}", ["x"], ["y"], domain=domain)], "g", [_value("x")], [_value("y")]
    )
    functions = [function(number) for number in range(depth)]
    model: ModelProto = helper.make_model(graph, functions=functions, opset_imports=sets, ir_version=8)
    return model.SerializeToString(deterministic=True)


def slow() -> bytes:
    """Runs for as many iterations as its input `iterations` (INT64 [1], see `slow_inputs`) says, and counts them in `y`
    (FP32 [1]).

    A run can be terminated between two iterations, which take a few microseconds each.
    """
    return _loop(
        [helper.make_node("Squeeze", ["iterations"], ["trips"])],
        "trips",
        inputs=[_value("iterations", "INT64", (1,))],
        outputs=[_value("y", shape=(1,))],
    )


def slow_inputs(seconds: float) -> dict[str, np.ndarray]:
    """Returns inputs that keep `slow()` running for about that long on this machine."""
    return {"iterations": np.array([max(1, int(seconds * _iterations_per_second()))], np.int64)}


@functools.cache
def _iterations_per_second() -> float:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(slow(), options, providers=["CPUExecutionProvider"])
    count = 20_000
    took = []
    for _ in range(3):
        started = time.perf_counter()
        session.run(None, {"iterations": np.array([count], np.int64)})
        took.append(time.perf_counter() - started)
    return count / min(took)


def endless_loop() -> bytes:
    """Returns a model whose runs never end, whatever the input."""
    return _loop([], "", inputs=[_value("x")], outputs=[_value("y", shape=(1,))])


def _loop(before: list[NodeProto], trips: str, *, inputs: list[Any], outputs: list[Any]) -> bytes:
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Add", ["v", "one"], ["v_next"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v_next", TensorProto.FLOAT, None),
        ],
        [_constant("one", [1])],
    )
    return _model(
        [*before, helper.make_node("Loop", [trips, "always", "zero"], ["y"], body=body)],
        inputs=inputs,
        outputs=outputs,
        initializers=[_constant("always", True, np.bool_), _constant("zero", [0])],
    )


# -- those that ask for too much


def divide(datatype: str = "INT32") -> bytes:
    """Answers a / b. The smallest integer divided by -1 kills the process with SIGFPE."""
    return _model(
        [helper.make_node("Div", ["a", "b"], ["y"])],
        inputs=[_value(name, datatype, (None,)) for name in "ab"],
        outputs=[_value("y", datatype, (None,))],
    )


def huge_allocation(bytes: int) -> bytes:
    """Returns a model of about 150 bytes that allocates that much memory on every call, including the first."""
    return _model(
        [
            helper.make_node("Expand", ["c", "s"], ["big"]),
            helper.make_node("ReduceMax", ["big"], ["m"], keepdims=0),
            helper.make_node("Add", ["x", "m"], ["y"]),
        ],
        initializers=[_constant("c", [0]), _constant("s", [bytes // 4], np.int64)],
    )


def huge_on_demand() -> bytes:
    """Allocates 4 bytes times its input `count` (INT64 [1]) and answers 0 as `y` (FP32, scalar). It can be loaded, but
    its calls may fail."""
    return _model(
        [
            helper.make_node("ConstantOfShape", ["count"], ["big"]),
            helper.make_node("ReduceSum", ["big"], ["y"], keepdims=0),
        ],
        inputs=[_value("count", "INT64", (1,))],
        outputs=[_value("y", shape=())],
    )


# -- those that reach out of their folder


def external_data(location: str, *, count: int = 1, offset: int = 0, length: int | None = None) -> bytes:
    """Answers `x` plus the first of `count` floats in the file `location`, a path relative to the model's folder."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[count], data_location=TensorProto.EXTERNAL)
    entries = {"location": location, "offset": str(offset), "length": str(4 * count if length is None else length)}
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return _model(
        [helper.make_node("Gather", ["w", "zero"], ["first"]), helper.make_node("Add", ["x", "first"], ["y"])],
        initializers=[tensor, _constant("zero", [0], np.int64)],
    )


def external_data_in_a_branch(location: str) -> bytes:
    """Does the same as `external_data`, with the tensor hidden in a constant of a subgraph."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    branches = [
        helper.make_graph(
            [helper.make_node("Constant", [], ["b"], value=value)],
            name,
            [],
            [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)],
        )
        for name, value in (("then", tensor), ("else", _constant("k", [0])))
    ]
    return _model(
        [
            helper.make_node("If", ["no"], ["b"], then_branch=branches[0], else_branch=branches[1]),
            helper.make_node("Add", ["x", "b"], ["y"]),
        ],
        initializers=[_constant("no", False, np.bool_)],
    )
