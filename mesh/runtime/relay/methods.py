"""The methods that a foreign server takes, and where each expects the model's id, according to its `runtimeStatus`."""

from mesh.pb import modelruntime_pb2 as pb
from mesh.statuses import MeshError, Reason

_MANAGEMENT = (b"mmesh.ModelRuntime/", b"com.ibm.watson.tas.internal.proto.ModelServer/")
_MAX_TEXT = 200  # maximum characters of a client's text that an error quotes


class Methods:
    """The rules for methods. Names have no leading slash."""

    def __init__(self, status: pb.RuntimeStatusResponse) -> None:
        self._paths = {name.encode(): tuple(info.idInjectionPath) for name, info in status.methodInfos.items()}
        self._any = status.allowAnyMethod or not self._paths

    def path(self, name: bytes) -> tuple[int, ...]:
        """Returns the path of the id in the method's request; empty if the request gets no id. Raises MeshError for a
        method that is not allowed."""
        path = self._paths.get(name)
        if name.startswith(_MANAGEMENT) or (path is None and not self._any):
            text = name[:_MAX_TEXT].decode(errors="replace")
            raise MeshError(Reason.UNKNOWN_METHOD, f"Method not found or not permitted: {text}")
        return path or ()
