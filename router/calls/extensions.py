"""Triton's extensions of V2 that the mesh does not support, and what to use instead.

Each is refused with UNIMPLEMENTED, or 501 over REST. Otherwise a client that requests the model index would get "a
header is missing", and a client that requests a model's statistics would get "the model does not exist".

A model server may support some of these extensions. A gRPC call reaches the server if it names the model in
`mm-model-id`.
"""

from collections.abc import Mapping

from mesh.statuses import MeshError, Reason

_REPOSITORY = "the model repository extension", "use the management API, /mesh/v1/models"
_CONFIGURATION = "the model configuration extension", "request the model's metadata"
_STATISTICS = "the statistics extension", "scrape the metrics of routers and pods"
_TRACE = "the trace extension", "send the headers traceparent and tracestate: they are passed on"
_LOGGING = "the logging extension", "use --log-level"
_MEMORY = "the shared memory extension", "send the tensor's data"
_STREAM = "inference by streams", "use ModelInfer"
_GENERATE = "the generate extension", "use infer"

_METHODS: Mapping[str, tuple[str, str]] = {
    "RepositoryIndex": _REPOSITORY,
    "RepositoryModelLoad": _REPOSITORY,
    "RepositoryModelUnload": _REPOSITORY,
    "ModelConfig": _CONFIGURATION,
    "ModelStatistics": _STATISTICS,
    "TraceSetting": _TRACE,
    "LogSettings": _LOGGING,
    "ModelStreamInfer": _STREAM,
    **{
        f"{kind}SharedMemory{verb}": _MEMORY
        for kind in ("System", "Cuda")
        for verb in ("Status", "Register", "Unregister")
    },
}

_PATHS: Mapping[str, tuple[str, str]] = {
    "repository": _REPOSITORY,
    "trace": _TRACE,
    "logging": _LOGGING,
    "systemsharedmemory": _MEMORY,
    "cudasharedmemory": _MEMORY,
}
"""The extensions by the segment after `/v2/`."""

_OPERATIONS: Mapping[str, tuple[str, str]] = {
    "config": _CONFIGURATION,
    "stats": _STATISTICS,
    "trace/setting": _TRACE,
    "generate": _GENERATE,
    "generate_stream": _GENERATE,
}
"""The extensions by what follows the path of a model, or of its version."""

PATHS = tuple(_PATHS)


def of_method(label: str) -> str:
    """Returns the text for the refusal of a call of a V2 method without a model id. `label` is the part of the method's
    name after the last slash."""
    found = _METHODS.get(label)
    if found is None:
        return (
            f"the mesh's V2 service has no method {label}; to call a model's own server, name the model in mm-model-id"
        )
    what, instead = found
    return f"{what} is not supported: {instead}; to call a model's own server, name the model in mm-model-id"


def of_path(segment: str) -> MeshError:
    """Returns the refusal for a path below `/v2/` that belongs to an extension, which `segment` identifies."""
    return _refusal(_PATHS[segment])


def of_operation(path: str) -> MeshError | None:
    """Returns the refusal for a path below `/v2/models/` that belongs to an extension and names no model, or None for
    other paths."""
    for operation, refused in _OPERATIONS.items():
        if path.rstrip("/").endswith(f"/{operation}"):
            return _refusal(refused)
    return None


def _refusal(refused: tuple[str, str]) -> MeshError:
    what, instead = refused
    return MeshError(Reason.UNSUPPORTED, f"{what} is not supported: {instead}")
