"""The errors with which an adapter answers a load that its server, or the pod, refuses."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc

from mesh.pb import modelruntime_pb2 as pb
from mesh.runtime.relay.adapters.folders import ModelFolders
from mesh.statuses import MeshError, Reason

_TEXT = 1000  # characters of a server's error

_OF_THE_WAY = frozenset(
    (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED),
)


@asynccontextmanager
async def within(timeout: float | None) -> AsyncIterator[None]:
    """Ends a load after `timeout` seconds; None means no limit. Raises MeshError with DEADLINE, after which the relay
    unloads the model."""
    try:
        async with asyncio.timeout(timeout):
            yield
    except TimeoutError:
        text = f"the load took longer than {timeout:g} s and was ended"
        raise MeshError(Reason.DEADLINE, f"{text}: if the model needs longer, raise its pods' --load-timeout") from None


def of_the_way(error: grpc.aio.AioRpcError) -> bool:
    """Returns whether a request to the server was lost, late or cancelled, so that the error says nothing about the
    model."""
    return error.code() in _OF_THE_WAY


def text_of(error: grpc.aio.AioRpcError) -> str:
    """Returns the text of a server's error, or the name of its code if it has no text."""
    return error.details() or error.code().name


def cannot_load(server: str, text: str, request: pb.LoadModelRequest, place: ModelFolders, name: str) -> MeshError:
    """Returns the error for a model that the server cannot load. Contains the server's text, in which the paths of the
    model's folders are shortened to what is inside them, and `name`, by which the server knows the model, becomes the
    model's id."""
    pulled = Path(request.modelPath)
    for folder in (place.read, place.files, pulled, pulled.parent):
        text = text.replace(f"{folder}/", "").replace(str(folder), folder.name)
    text = text.replace(name, request.modelId).strip()
    return MeshError(Reason.LOAD_FAILED, f"{server} cannot load the model: {text[:_TEXT]}")


def check_code(what: str, *, allowed: bool) -> None:
    """Raises MeshError unless the pod may load models that run code. `what` says which code would run, and when."""
    if not allowed:
        text = f"{what}, and this pod does not allow that: start pods with --allow-code if all who may register "
        raise MeshError(Reason.PRECONDITION, f"{text}models are trusted")
