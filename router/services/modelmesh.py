"""The management API over gRPC: `mmesh.ModelMesh`, and the older names its clients still use.

Only the form is here: messages to `Management` and back. Requests have no id in their metadata and go nowhere else, so
each is a task that ends with its call; a load that a request began goes on when its caller leaves.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from google.protobuf.message import Message

from mesh.pb import modelmesh_pb2 as pb
from mesh.statuses import Code, MeshError, Reason
from mesh.wire import call as wire
from mesh.wire import framing
from router.management.models import ModelStatus
from router.services import methods

if TYPE_CHECKING:
    from router.process.context import Worker

_NAMES = (b"/mmesh.ModelMesh/", b"/com.ibm.watson.tas.proto.TasRuntime/")
_WITH_COPIES = ("LOADED", "LOADING", "LOADING_FAILED")

M = TypeVar("M", bound=Message)


def status_info(status: ModelStatus) -> pb.ModelStatusInfo:
    """A model's status as the API has it."""
    info = pb.ModelStatusInfo(status=status.status, errors=status.errors)
    if status.status in _WITH_COPIES:
        for copy in status.copies:
            info.modelCopyInfos.add(
                location=copy.pod,
                copyStatus=copy.status,
                time=max(0, copy.time_ms),
            )
    return info


async def _register(worker: "Worker", request: pb.RegisterModelRequest) -> Message:
    info = request.modelInfo
    return status_info(
        await worker.management.register(
            request.modelId,
            info.type,
            info.path,
            info.key,
            load_now=request.loadNow,
            sync=request.sync,
            last_used_ms=request.lastUsedTime,
        )
    )


async def _unregister(worker: "Worker", request: pb.UnregisterModelRequest) -> Message:
    await worker.management.unregister(request.modelId)
    return pb.UnregisterModelResponse()


async def _status(worker: "Worker", request: pb.GetStatusRequest) -> Message:
    return status_info(await worker.management.status(request.modelId))


async def _ensure(worker: "Worker", request: pb.EnsureLoadedRequest) -> Message:
    management = worker.management
    return status_info(
        await management.ensure_loaded(request.modelId, last_used_ms=request.lastUsedTime, sync=request.sync)
    )


def _method(name: str, message: type[M], serve: Callable[["Worker", M], Awaitable[Message]]) -> methods.Method:
    async def answer(worker: "Worker", call: wire.Call) -> None:
        began = time.perf_counter()
        code = int(Code.CANCELLED)
        try:
            frame = await call.read()
            if frame is None:
                raise MeshError(Reason.BAD_REQUEST, "the call has no request message")
            request = methods.decode(message, call, frame)
            try:
                async with asyncio.timeout_at(call.deadline):
                    reply = await serve(worker, request)
            except TimeoutError as error:
                raise MeshError(Reason.DEADLINE, "the deadline has passed") from error
            call.reply(framing.pack(reply.SerializeToString()))
            code = int(Code.OK)
        except MeshError as error:
            code = int(error.reason.code)
            raise
        finally:
            ms = (time.perf_counter() - began) * 1000
            worker.dispatcher.forwarder.meter.managed(name, code, ms)

    return methods.streaming(answer)


def _later(worker: "Worker", call: wire.Call) -> None:
    methods.run(call, _unsupported)


async def _unsupported() -> None:
    raise MeshError(Reason.UNKNOWN_METHOD, "vmodels are not supported yet")


_METHODS: dict[str, methods.Method] = {
    "registerModel": _method("registerModel", pb.RegisterModelRequest, _register),
    "unregisterModel": _method("unregisterModel", pb.UnregisterModelRequest, _unregister),
    "getModelStatus": _method("getModelStatus", pb.GetStatusRequest, _status),
    "ensureLoaded": _method("ensureLoaded", pb.EnsureLoadedRequest, _ensure),
    "setVModel": _later,
    "deleteVModel": _later,
    "getVModelStatus": _later,
}
_METHODS["addModel"] = _METHODS["registerModel"]
_METHODS["deleteModel"] = _METHODS["unregisterModel"]

METHODS: Mapping[bytes, methods.Method] = {
    service + name.encode(): method for service in _NAMES for name, method in _METHODS.items()
}
"""By full name, with the leading slash."""
