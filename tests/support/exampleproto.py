"""The messages of the example runtime's own service, `mmesh.ExamplePredictor`, made without a .proto file.

They are in a separate descriptor pool, like the mesh's messages.
"""

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

SERVICE = "mmesh.ExamplePredictor"
PREDICT = f"/{SERVICE}/predict"

_TEXT, _MESSAGE = descriptor_pb2.FieldDescriptorProto.TYPE_STRING, descriptor_pb2.FieldDescriptorProto.TYPE_MESSAGE
_ONE, _SEVERAL = (
    descriptor_pb2.FieldDescriptorProto.LABEL_OPTIONAL,
    descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED,
)


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="mmesh", syntax="proto3")
    inner = file.message_type.add(name="Inner")
    inner.field.add(name="model_name", number=7, type=_TEXT, label=_ONE)
    inner.field.add(name="note", number=2, type=_TEXT, label=_ONE)
    request = file.message_type.add(name="PredictRequest")
    request.field.add(name="model_name", number=1, type=_TEXT, label=_ONE)
    request.field.add(name="text", number=2, type=_TEXT, label=_ONE)
    request.field.add(name="inner", number=3, type=_MESSAGE, type_name=".mmesh.Inner", label=_ONE)
    request.field.add(name="texts", number=4, type=_TEXT, label=_SEVERAL)
    response = file.message_type.add(name="PredictResponse")
    entry = response.nested_type.add(name="ResultsEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=_TEXT, label=_ONE)
    entry.field.add(name="value", number=2, type=_TEXT, label=_ONE)
    response.field.add(
        name="results", number=1, type=_MESSAGE, type_name=".mmesh.PredictResponse.ResultsEntry", label=_SEVERAL
    )
    response.field.add(name="model_name", number=2, type=_TEXT, label=_ONE)
    response.field.add(name="inner_model_name", number=3, type=_TEXT, label=_ONE)
    return file


_pool = descriptor_pool.DescriptorPool()
_pool.Add(_file())
PredictRequest = message_factory.GetMessageClass(_pool.FindMessageTypeByName("mmesh.PredictRequest"))
PredictResponse = message_factory.GetMessageClass(_pool.FindMessageTypeByName("mmesh.PredictResponse"))
