"""A protobuf schema of those parts of onnx.proto that contain tensors and calls of functions.

The schema uses the field numbers of onnx.proto. Protobuf skips all other fields, notably the weights.
"""

from collections.abc import Iterator
from typing import Any

from google.protobuf import descriptor_pb2, message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message

_OUTLINE: dict[str, dict[str, tuple[int, str]]] = {
    "Model": {"graph": (7, "Graph"), "training_info": (20, "*Training"), "functions": (25, "*Function")},
    "Training": {"initialization": (1, "Graph"), "algorithm": (2, "Graph")},
    "Function": {
        "name": (1, "string"),
        "node": (7, "*Node"),
        "domain": (10, "string"),
        "attribute_proto": (11, "*Attribute"),
        "overload": (13, "string"),
    },
    "Graph": {"node": (1, "*Node"), "initializer": (5, "*Tensor"), "sparse_initializer": (15, "*Sparse")},
    "Node": {
        "op_type": (4, "string"),
        "attribute": (5, "*Attribute"),
        "domain": (7, "string"),
        "overload": (8, "string"),
    },
    "Attribute": {
        "t": (5, "Tensor"),
        "g": (6, "Graph"),
        "tensors": (10, "*Tensor"),
        "graphs": (11, "*Graph"),
        "sparse_tensor": (22, "Sparse"),
        "sparse_tensors": (23, "*Sparse"),
    },
    "Sparse": {"values": (1, "Tensor"), "indices": (2, "Tensor")},
    "Tensor": {"external_data": (13, "*Entry"), "data_location": (14, "int32")},
    "Entry": {"key": (1, "string"), "value": (2, "string")},
}


def _outline() -> Any:
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="outline.proto", package="outline", syntax="proto2")
    for name, fields in _OUTLINE.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            added = message.field.add(name=field, number=number, label=kinds.LABEL_OPTIONAL)
            if kind.startswith("*"):
                added.label = kinds.LABEL_REPEATED
                kind = kind[1:]
            if kind == "string":
                added.type = kinds.TYPE_STRING
            elif kind == "int32":
                added.type = kinds.TYPE_INT32
            else:
                added.type = kinds.TYPE_MESSAGE
                added.type_name = f".outline.{kind}"
    pool = DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("outline.Model"))


Model = _outline()
"""The class of messages of an onnx.ModelProto's outline."""


def tensors(message: Message) -> Iterator[Any]:
    """Yields every tensor in a message of the outline, at any depth."""
    waiting = [message]
    while waiting:
        current = waiting.pop()
        if current.DESCRIPTOR.name == "Tensor":
            yield current
            continue
        for field, value in current.ListFields():
            if field.message_type is not None:
                waiting.extend(value if field.is_repeated else (value,))
