"""The management API over gRPC: `mmesh.ModelMesh`, and the older names its clients still use.

Only the form is here: messages to `Management` and back (`ModelMesh`, functions of the API's messages), and those as
methods of gRPC (`methods`). Requests have no id in their metadata and go nowhere else, so each is a task that ends with
its call; a load that a request began goes on when its caller leaves.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

from google.protobuf.message import Message

from mesh.pb import modelmesh_pb2 as pb
from mesh.statuses import Code, MeshError, Reason
from mesh.wire import call as wire
from mesh.wire import framing
from router.management.models import Management, ModelStatus
from router.services.methods import decode, run, streaming

_NAMES = (b"/mmesh.ModelMesh/", b"/com.ibm.watson.tas.proto.TasRuntime/")
_WITH_COPIES = ("LOADED", "LOADING", "LOADING_FAILED")

M = TypeVar("M", bound=Message)

Managed = Callable[[str, int, float], None]
"""Takes note of a call that has ended: the method's name, the gRPC code, milliseconds."""


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


class ModelMesh:
    """The methods as functions of their messages. All raise MeshError."""

    def __init__(self, management: Management) -> None:
        self._management = management

    async def register(self, request: pb.RegisterModelRequest) -> pb.ModelStatusInfo:
        """Registers a model, and has it loaded where that is asked for."""
        info = request.modelInfo
        return status_info(
            await self._management.register(
                request.modelId,
                info.type,
                info.path,
                info.key,
                load_now=request.loadNow,
                sync=request.sync,
                last_used_ms=request.lastUsedTime,
            )
        )

    async def unregister(self, request: pb.UnregisterModelRequest) -> pb.UnregisterModelResponse:
        """Unregisters a model."""
        await self._management.unregister(request.modelId)
        return pb.UnregisterModelResponse()

    async def status(self, request: pb.GetStatusRequest) -> pb.ModelStatusInfo:
        """Returns how a model is."""
        return status_info(await self._management.status(request.modelId))

    async def ensure_loaded(self, request: pb.EnsureLoadedRequest) -> pb.ModelStatusInfo:
        """Has a model loaded."""
        management = self._management
        return status_info(
            await management.ensure_loaded(request.modelId, last_used_ms=request.lastUsedTime, sync=request.sync)
        )


def methods(management: Management, managed: Managed) -> Mapping[bytes, wire.Handler]:
    """Returns them by full name, with the leading slash."""
    served = ModelMesh(management)
    found = {
        "registerModel": _method("registerModel", pb.RegisterModelRequest, served.register, managed),
        "unregisterModel": _method("unregisterModel", pb.UnregisterModelRequest, served.unregister, managed),
        "getModelStatus": _method("getModelStatus", pb.GetStatusRequest, served.status, managed),
        "ensureLoaded": _method("ensureLoaded", pb.EnsureLoadedRequest, served.ensure_loaded, managed),
        "setVModel": _later,
        "deleteVModel": _later,
        "getVModelStatus": _later,
    }
    found["addModel"] = found["registerModel"]
    found["deleteModel"] = found["unregisterModel"]
    return {service + name.encode(): method for service in _NAMES for name, method in found.items()}


def _method(name: str, message: type[M], serve: Callable[[M], Awaitable[Message]], managed: Managed) -> wire.Handler:
    async def answer(call: wire.Call) -> None:
        began = time.perf_counter()
        code = int(Code.CANCELLED)
        try:
            frame = await call.read()
            if frame is None:
                raise MeshError(Reason.BAD_REQUEST, "the call has no request message")
            request = decode(message, call, frame)
            try:
                async with asyncio.timeout_at(call.deadline):
                    reply = await serve(request)
            except TimeoutError as error:
                raise MeshError(Reason.DEADLINE, "the deadline has passed") from error
            call.reply(framing.pack(reply.SerializeToString()))
            code = int(Code.OK)
        except MeshError as error:
            code = int(error.reason.code)
            raise
        finally:
            managed(name, code, (time.perf_counter() - began) * 1000)

    return streaming(answer)


def _later(call: wire.Call) -> None:
    run(call, _unsupported)


async def _unsupported() -> None:
    raise MeshError(Reason.UNKNOWN_METHOD, "vmodels are not supported yet")
