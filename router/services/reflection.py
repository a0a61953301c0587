"""`grpc.reflection`, v1 and v1alpha, which tells clients such as grpcurl about the services of this endpoint.

It uses Mesh's own descriptor pool, and covers only services that clients may call; the protocol between router and
agents is private. The two versions of the service differ only in their package names.
"""

from collections.abc import Mapping
from typing import Any

from mesh.pb import POOL, health_pb2, inference_pb2, modelmesh_pb2, reflection_pb2, reflection_v1alpha_pb2
from mesh.statuses import Code, MeshError, Reason
from mesh.wire import call as wire
from mesh.wire import framing
from router.services import methods

_FILES = {
    module.DESCRIPTOR.name: module.DESCRIPTOR
    for module in (inference_pb2, modelmesh_pb2, health_pb2, reflection_pb2, reflection_v1alpha_pb2)
}
_SERVICES = sorted(service.full_name for file in _FILES.values() for service in file.services_by_name.values())


def _file(name: str) -> bytes:
    if name not in _FILES:
        raise MeshError(
            Reason.UNKNOWN_MODEL, f"file {name:.200} is not known here: ask for the file of a service instead"
        )
    encoded: bytes = _FILES[name].serialized_pb
    return encoded


def _file_of(symbol: str) -> bytes:
    # The pool has names of services, but not of their methods.
    for candidate in (symbol, symbol.rpartition(".")[0]):
        try:
            return _file(POOL.FindFileContainingSymbol(candidate).name)
        except KeyError:
            continue
    raise MeshError(
        Reason.UNKNOWN_MODEL, f"symbol {symbol:.200} is not known here: list the services to see the known ones"
    )


def _answer(pb: Any, request: Any) -> Any:
    reply = pb.ServerReflectionResponse(valid_host=request.host, original_request=request)
    kind = request.WhichOneof("message_request")
    try:
        if kind == "list_services":
            for name in _SERVICES:
                reply.list_services_response.service.add(name=name)
        elif kind == "file_by_filename":
            reply.file_descriptor_response.file_descriptor_proto.append(_file(request.file_by_filename))
        elif kind == "file_containing_symbol":
            reply.file_descriptor_response.file_descriptor_proto.append(_file_of(request.file_containing_symbol))
        elif kind == "all_extension_numbers_of_type":
            _file_of(request.all_extension_numbers_of_type)  # the type must exist; proto3 has no extensions
            reply.all_extension_numbers_response.base_type_name = request.all_extension_numbers_of_type
        elif kind == "file_containing_extension":
            raise MeshError(Reason.UNKNOWN_MODEL, "no message of this server has extensions")
        else:
            reply.error_response.error_code = Code.INVALID_ARGUMENT
            reply.error_response.error_message = "the request names no file, symbol or type, and lists no services"
    except MeshError as error:
        reply.error_response.error_code = error.reason.code
        reply.error_response.error_message = error.text
    return reply


def _service(pb: Any) -> wire.Handler:
    async def serve(call: wire.Call) -> None:
        call.start()
        while (frame := await call.read()) is not None:
            request = methods.decode(pb.ServerReflectionRequest, call, frame)
            await call.write(framing.pack(_answer(pb, request).SerializeToString()))
        call.finish()

    return methods.streaming(serve)


METHODS: Mapping[bytes, wire.Handler] = {
    b"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": _service(reflection_pb2),
    b"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _service(reflection_v1alpha_pb2),
}
