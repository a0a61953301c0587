"""The methods that a foreign server accepts, and the field in which each expects the model's id, according to the
server's `runtimeStatus`.

V2's methods have a rule of their own, for servers that do not list them. A message of V2 names a model, and a server
may use that name instead of the metadata. The relay therefore always replaces the name with the id of the routed model.
Otherwise a caller with permission for one model could reach another model of the same server. V2's other methods (the
model repository, shared memory, log settings) act on the whole server, and pass only if the server lists them.
"""

from mesh.pb import modelruntime_pb2 as pb
from mesh.statuses import MeshError, Reason
from mesh.v2 import SERVICE

_MANAGEMENT = (b"mmesh.ModelRuntime/", b"com.ibm.watson.tas.internal.proto.ModelServer/")
_MAX_TEXT = 200  # maximum characters of a client's text that an error quotes

_V2 = f"{SERVICE}/".encode()
_NAMED = {
    **dict.fromkeys((b"ModelInfer", b"ModelReady", b"ModelMetadata"), (1,)),
    **dict.fromkeys((b"ModelStreamInfer", b"ModelConfig", b"ModelStatistics"), (1,)),  # Triton's extensions
    **dict.fromkeys((b"ServerLive", b"ServerReady", b"ServerMetadata"), ()),  # name no model
}
"""V2's methods that concern one model or none, each with the path of the model's name in the request
(proto/inference.proto, and Triton's grpc_service.proto)."""


class Methods:
    """The rules for methods. Names have no leading slash."""

    def __init__(self, status: pb.RuntimeStatusResponse) -> None:
        self._paths = {name.encode(): tuple(info.idInjectionPath) for name, info in status.methodInfos.items()}
        self._any = status.allowAnyMethod or not self._paths

    def path(self, name: bytes) -> tuple[int, ...]:
        """Returns the path of the id in the method's request, or an empty path if the request gets no id. Raises
        MeshError for a method that is not allowed."""
        path = self._paths.get(name)
        if path is None and self._any:
            path = _NAMED.get(name[len(_V2) :]) if name.startswith(_V2) else ()
        if path is None or name.startswith(_MANAGEMENT):
            text = name[:_MAX_TEXT].decode(errors="replace")
            raise MeshError(Reason.UNKNOWN_METHOD, f"Method not found or not permitted: {text}")
        return path
