"""The parts of the SPI's server side that all processes with a data port share."""

import contextlib
import os
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import grpc

from mesh.pb import modelruntime_pb2, modelruntime_pb2_grpc
from mesh.statuses import MeshError, Reason
from mesh.telemetry import logs
from mesh.wire import headers

log = logs.get(__name__)

STUCK = "stuck"
"""Key in an error's details which says that the load is still running and cannot be ended."""

ANSWERING = 2.0
"""Seconds before an unload's deadline that are reserved for the end of calls and the answer."""

_TEXT = 2048
"""Maximum length of an error's text, in bytes. gRPC encodes a byte as up to three. From 8 KiB of metadata on, it may
report RESOURCE_EXHAUSTED in place of the error, and from 16 KiB on it does."""

_CODES = {code.value[0]: code for code in grpc.StatusCode}

Context = grpc.aio.ServicerContext[object, object]


@contextlib.asynccontextmanager
async def answered(context: Context) -> AsyncIterator[None]:
    """Answers an SPI call with an error if the block raises: with the status of a MeshError or AioRpcError, or else
    with INTERNAL."""
    try:
        yield
    except MeshError as error:
        stuck = ((headers.SPI_STUCK, "1"),) if STUCK in error.details else ()
        await context.abort(_CODES[int(error.reason.code)], _sendable(error.text), stuck)
    except grpc.aio.AioRpcError as error:
        await context.abort(error.code(), _sendable(error.details() or ""))
    except Exception:
        log.exception("SPI call failed in this process's own code")
        await context.abort(_CODES[int(Reason.INTERNAL.code)], "internal error in the pod; its log has the cause")


def _sendable(text: str) -> str:
    """Returns a text that gRPC can send. The names of files in it may have bytes that are not UTF-8, with which gRPC
    would send no answer at all."""
    return text.encode("utf-8", "backslashreplace")[:_TEXT].decode("utf-8", "ignore")


def sent(context: Context) -> dict[str, str]:
    """Returns the metadata of a call as strings."""
    pairs: Iterable[tuple[str, str | bytes]] = context.invocation_metadata() or ()
    return {key: value if isinstance(value, str) else value.decode("latin-1") for key, value in pairs}


def slot_of(request: modelruntime_pb2.LoadModelRequest, told: dict[str, str]) -> int | None:
    """Returns the slot of the use board that a load names, or None if it names none. Raises MeshError if the load has
    no model id or an invalid slot."""
    if not request.modelId:
        raise MeshError(Reason.BAD_REQUEST, "loadModel needs a model id")
    slot = told.get(headers.SPI_SLOT)
    if slot is not None and not slot.isdigit():
        raise MeshError(Reason.BAD_REQUEST, f"metadata {headers.SPI_SLOT} is {slot!r} instead of the number of a slot")
    return None if slot is None else int(slot)


def unload_grace(context: Context, most: float) -> float:
    """Returns the seconds that calls in flight get before an unload ends them: `most`, or less if the unload would
    otherwise miss its own deadline."""
    left = context.time_remaining()
    return most if left is None else max(0.0, min(left - ANSWERING, most))


async def listen(servicer: modelruntime_pb2_grpc.ModelRuntimeServicer, path: Path) -> grpc.aio.Server:
    """Starts to serve the SPI on a unix socket, in place of one that a killed process left. Raises OSError,
    RuntimeError."""
    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    modelruntime_pb2_grpc.add_ModelRuntimeServicer_to_server(servicer, server)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    return server
