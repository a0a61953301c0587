"""The number of operators of a model after the expansion of its functions, with which ONNX Runtime begins.

Functions that each call the next one twice can turn a file of 2 KB into a model of 33 million operators, and the
creation of its session cannot be interrupted. Therefore operators are counted first, without an expansion. Measured
with onnxruntime 1.32: 16,384 operators in 15 functions take 6 s, 32,768 in 16 take 50 s.

For a model without functions, which is the usual case, only a few bytes are read.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from mesh.runtime.server.onnx import outline
from mesh.wire import encoding

MAX_OPERATORS = 20_000
"""Largest number of operators of a model with functions, once expanded."""

MAX_DEPTH = 100
"""Deepest nesting of functions that call each other."""

_FIELDS = 1_000_000  # the most that are read of a file, or of its graph: 1 s
_GRAPH, _FUNCTION = 7 << 3 | 2, 25 << 3 | 2  # tags of onnx.ModelProto's fields
_NODE = 1 << 3 | 2  # of onnx.GraphProto's

_Key = tuple[str, str, str]


def too_many(path: Path) -> str | None:
    """Returns the reason why a model is refused because of its functions: they are recursive, nested too deep, or
    expand to too many operators. Returns None otherwise, and for a file that is not a model. Raises OSError."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        view = memoryview(mapped)
        try:
            parts = _parts(view)
            model = outline.Model.FromString(parts) if parts else None
        except (DecodeError, ValueError):
            return None  # ONNX Runtime will report what is wrong with the file
        finally:
            view.release()
    return None if model is None else _judge(model)


def _parts(view: memoryview) -> bytes:
    """Returns the functions and the nodes of the graph as an encoded model, or b"" if the model has no functions."""
    found: list[bytes] = []
    graphs: list[memoryview] = []
    functions = False
    for tag, start, end in encoding.fields(view, limit=_FIELDS):
        if tag == _FUNCTION:
            functions = True
            found.append(encoding.varint(tag) + encoding.varint(end - start) + bytes(view[start:end]))
        elif tag == _GRAPH:
            graphs.append(view[start:end])
    try:
        if not functions:
            return b""
        for graph in graphs:
            nodes = b"".join(_nodes(graph))
            found.append(encoding.varint(_GRAPH) + encoding.varint(len(nodes)) + nodes)
    finally:
        for graph in graphs:
            graph.release()
    return b"".join(found)


def _nodes(graph: memoryview) -> Iterator[bytes]:
    before = 0
    for tag, _, end in encoding.fields(graph, limit=_FIELDS):
        if tag == _NODE:
            yield bytes(graph[before:end])
        before = end


def _judge(model: Any) -> str | None:
    """Returns the reason why a model is refused: its functions are recursive, nested too deep, or have too many
    operators once expanded. Returns None if the model is accepted."""
    calls: dict[_Key, tuple[int, dict[_Key, int]]] = {}
    names = {_key(function.domain, function.name, function.overload) for function in model.functions}
    for function in model.functions:
        calls[_key(function.domain, function.name, function.overload)] = _called(function.node, names)
    sizes: dict[_Key, int] = {}
    depths: dict[_Key, int] = {}
    for name in names:
        waiting = [name]
        while waiting:
            current = waiting[-1]
            own, callees = calls[current]
            missing = [callee for callee in callees if callee not in sizes]
            if missing:
                if len(waiting) > MAX_DEPTH:
                    return (
                        f"its functions are recursive, or nested {MAX_DEPTH} deep, which this server does not load: "
                        "inline them before the export"
                    )
                waiting.append(missing[0])
                continue
            waiting.pop()
            sizes[current] = own + sum(times * sizes[callee] for callee, times in callees.items())
            depths[current] = 1 + max((depths[callee] for callee in callees), default=0)
    own, callees = _called(model.graph.node, names)
    operators = own + sum(times * sizes[callee] for callee, times in callees.items())
    if max((depths[name] for name in callees), default=0) > MAX_DEPTH:
        return (
            f"its functions are nested more than {MAX_DEPTH} deep, which this server does not load: inline them before "
            "the export"
        )
    if operators > MAX_OPERATORS:
        return (
            f"with its functions expanded it has {operators} operators; the limit for a model with functions is "
            f"{MAX_OPERATORS}: inline them before the export"
        )
    return None


def _called(nodes: Any, names: set[_Key]) -> tuple[int, dict[_Key, int]]:
    """Counts the operators among some nodes and in their subgraphs, and the calls of each function there."""
    own = 0
    found: dict[_Key, int] = {}
    waiting = [nodes]
    while waiting:
        for node in waiting.pop():
            key = _key(node.domain, node.op_type, node.overload)
            if key in names:
                found[key] = found.get(key, 0) + 1
            else:
                own += 1
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    waiting.append(attribute.g.node)
                waiting += [graph.node for graph in attribute.graphs]
    return own, found


def _key(domain: str, name: str, overload: str) -> _Key:
    return "" if domain == "ai.onnx" else domain, name, overload
