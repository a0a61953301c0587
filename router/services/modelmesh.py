"""The management API over gRPC: `mmesh.ModelMesh`, and the older names that clients still use.

This module only converts. `ModelMesh` turns the API's messages into management's requests, and results into messages.
`methods` turns these functions into gRPC methods. Each request is a task that ends with its call. A load that a request
has begun continues when the caller leaves.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from mesh.access import patterns
from mesh.access.verbs import Verb
from mesh.pb import modelmesh_pb2 as pb
from mesh.statuses import Code, MeshError, Reason
from mesh.wire import call as wire
from mesh.wire import framing
from mesh.wire.headers import PEER
from placement.vmodels.changes import SetVModel
from router.access import operations
from router.access.audit import CANCELLED, NOBODY, OK, Audit
from router.access.guard import OPEN, Guard
from router.access.operations import Noun, Operation
from router.management.handlers import Management
from router.management.requests import Item, Load, MoveVModel, Register
from router.management.status import StatusInfo
from router.management.vmodels import VModelInfo
from router.services.methods import decode, streaming

SERVICES = (b"/mmesh.ModelMesh/", b"/com.ibm.watson.tas.proto.TasRuntime/")

M = TypeVar("M", bound=Message)

Managed = Callable[[str, int, float], None]
"""A function that notes a call that has ended: the method's name, the gRPC code, and the duration in milliseconds."""


def status_info(status: StatusInfo) -> pb.ModelStatusInfo:
    """Returns a model's status in the API's form."""
    info = pb.ModelStatusInfo(status=status.status, errors=status.errors)
    if status.status.has_copies:
        for copy in status.copies:
            info.modelCopyInfos.add(
                location=copy.pod,
                copyStatus=copy.status,
                time=max(0, copy.time_ms),
            )
    return info


def vmodel_info(vmodel: VModelInfo) -> pb.VModelStatusInfo:
    """Returns a vmodel's status in the API's form."""
    record = vmodel.record
    if record is None:
        return pb.VModelStatusInfo()
    info = pb.VModelStatusInfo(
        status=vmodel.status,
        activeModelId=record.active,
        targetModelId=record.target,
        activeModelStatus=status_info(vmodel.active),
        owner=record.owner,
    )
    if vmodel.target is not None:
        info.targetModelStatus.CopyFrom(status_info(vmodel.target))
    return info


class ModelMesh:
    """The methods, as functions of their messages. All raise MeshError."""

    def __init__(self, management: Management) -> None:
        self._management = management

    async def register(self, request: pb.RegisterModelRequest) -> pb.ModelStatusInfo:
        """Registers a model, and loads it if requested."""
        info = request.modelInfo
        item = Item(request.modelId, info.type, info.path, info.key)
        wanted = Register(item, load_now=request.loadNow, sync=request.sync, last_used_ms=request.lastUsedTime)
        return status_info(await self._management.registration.register(wanted))

    async def unregister(self, request: pb.UnregisterModelRequest) -> pb.UnregisterModelResponse:
        """Unregisters a model."""
        await self._management.registration.unregister(request.modelId)
        return pb.UnregisterModelResponse()

    async def status(self, request: pb.GetStatusRequest) -> pb.ModelStatusInfo:
        """Returns a model's status."""
        return status_info(await self._management.status.of(request.modelId))

    async def ensure_loaded(self, request: pb.EnsureLoadedRequest) -> pb.ModelStatusInfo:
        """Has a model loaded."""
        wanted = Load(request.modelId, sync=request.sync, last_used_ms=request.lastUsedTime)
        return status_info(await self._management.loading.ensure(wanted))

    async def set_vmodel(self, request: pb.SetVModelRequest) -> pb.VModelStatusInfo:
        """Creates or moves a vmodel."""
        if request.vModelId and not request.targetModelId:
            raise MeshError(Reason.BAD_REQUEST, "Must provide targetModelId")
        info = request.modelInfo
        described = bool(info.type or info.path or info.key)
        wanted = MoveVModel(
            request.vModelId,
            SetVModel(
                target=request.targetModelId,
                update_only=request.updateOnly,
                force=request.force,
                expected_target=request.expectedTargetModelId,
                owner=request.owner,
            ),
            item=Item(request.targetModelId, info.type, info.path, info.key) if described else None,
            auto_delete=request.autoDeleteTargetModel,
            load_now=request.loadNow,
            sync=request.sync,
        )
        return vmodel_info(await self._management.vmodels.set(wanted))

    async def delete_vmodel(self, request: pb.DeleteVModelRequest) -> pb.DeleteVModelResponse:
        """Deletes a vmodel."""
        await self._management.vmodels.delete(request.vModelId, request.owner)
        return pb.DeleteVModelResponse()

    async def vmodel_status(self, request: pb.GetVModelStatusRequest) -> pb.VModelStatusInfo:
        """Returns a vmodel's status."""
        return vmodel_info(await self._management.vmodels.status(request.vModelId, request.owner))


OPERATIONS: Mapping[str, Operation] = {
    "registerModel": operations.REGISTER,
    "addModel": operations.REGISTER,
    "unregisterModel": operations.UNREGISTER,
    "deleteModel": operations.UNREGISTER,
    "getModelStatus": operations.STATUS,
    "ensureLoaded": operations.LOAD,
    "setVModel": operations.SET_VMODEL,
    "deleteVModel": operations.DELETE_VMODEL,
    "getVModelStatus": operations.VMODEL_STATUS,
}
"""The operation of each method, by the method's short name. Permissions depend on the operation, over gRPC as over
REST."""


def methods(management: Management, managed: Managed, guard: Guard, audit: Audit) -> Mapping[bytes, wire.Handler]:
    """Returns the methods by full name, with the leading slash."""
    served = ModelMesh(management)

    def method(
        operation: Operation, name: str, message: type[M], serve: Callable[[M], Awaitable[Message]]
    ) -> tuple[Operation, wire.Handler]:
        return operation, _Method(operation, name, message, serve, managed, guard, audit).handler()

    handlers: Mapping[Operation, wire.Handler] = dict(
        (
            method(operations.REGISTER, "registerModel", pb.RegisterModelRequest, served.register),
            method(operations.UNREGISTER, "unregisterModel", pb.UnregisterModelRequest, served.unregister),
            method(operations.STATUS, "getModelStatus", pb.GetStatusRequest, served.status),
            method(operations.LOAD, "ensureLoaded", pb.EnsureLoadedRequest, served.ensure_loaded),
            method(operations.SET_VMODEL, "setVModel", pb.SetVModelRequest, served.set_vmodel),
            method(operations.DELETE_VMODEL, "deleteVModel", pb.DeleteVModelRequest, served.delete_vmodel),
            method(operations.VMODEL_STATUS, "getVModelStatus", pb.GetVModelStatusRequest, served.vmodel_status),
        )
    )
    return {
        service + name.encode(): handlers[operation] for service in SERVICES for name, operation in OPERATIONS.items()
    }


class _Method(Generic[M]):
    def __init__(
        self,
        operation: Operation,
        name: str,
        message: type[M],
        serve: Callable[[M], Awaitable[Message]],
        managed: Managed,
        guard: Guard,
        audit: Audit,
    ) -> None:
        self._audit = audit
        self._operation = operation
        self._name = name
        self._message = message
        self._serve = serve
        self._managed = managed
        self._guard = guard

    def handler(self) -> wire.Handler:
        """Returns the handler of the method's calls."""
        return streaming(self._answer)

    async def _answer(self, call: wire.Call) -> None:
        began = time.perf_counter()
        code = int(Code.CANCELLED)
        who, names, result = NOBODY, [patterns.EVERYTHING], CANCELLED
        try:
            guard, verb = self._guard, self._operation.verb
            principal = await guard.identified(call.headers, call.deadline) if guard.asks(verb) else OPEN
            who = principal.name
            request = await self._read(call)
            names = _named(self._operation, request)
            if principal is not OPEN:
                for one in names:
                    guard.allow(principal, verb, one)
            try:
                async with asyncio.timeout_at(call.deadline):
                    reply = await self._serve(request)
            except TimeoutError as error:
                text = (
                    f"{self._name} did not end within the call's deadline; loads and moves that it has begun continue"
                )
                raise MeshError(Reason.DEADLINE, text) from error
            if isinstance(reply, pb.VModelStatusInfo):
                _hide(reply, lambda model: guard.ruling(principal, Verb.READ, model).allowed)
            call.reply(framing.pack(reply.SerializeToString()))
            code, result = int(Code.OK), OK
        except MeshError as error:
            code, result = int(error.reason.code), error.reason.name
            raise
        except Exception as error:
            result = type(error).__name__
            raise
        finally:
            self._managed(self._name, code, (time.perf_counter() - began) * 1000)
            name, *more = names
            self._audit.note(self._operation, who=who, name=name, peer=_peer(call), result=result, models=more)

    async def _read(self, call: wire.Call) -> M:
        frame = await call.read()
        if frame is None:
            raise MeshError(Reason.BAD_REQUEST, "the call has no request message")
        return decode(self._message, call, frame)


def _hide(info: pb.VModelStatusInfo, readable: Callable[[str], bool]) -> None:
    """Removes errors and copies of a vmodel's models that are not readable for the caller."""
    for model, name in ((info.activeModelId, "activeModelStatus"), (info.targetModelId, "targetModelStatus")):
        if info.HasField(name) and not readable(model):
            getattr(info, name).ClearField("errors")
            getattr(info, name).ClearField("modelCopyInfos")


def _peer(call: wire.Call) -> str:
    """Returns the address of a call's sender. Behind Envoy, this is the address that Envoy states, because the
    connection is one to a unix socket."""
    found = None if call.peer.startswith(("ipv4:", "ipv6:")) else call.header(PEER)
    return call.peer if found is None else found.decode("latin-1")


def _named(operation: Operation, request: Any) -> list[str]:
    """Returns the names in a request for which its caller needs a right."""
    if operation.noun is Noun.MODEL:
        return [request.modelId]
    names = [request.vModelId]
    if operation is operations.SET_VMODEL and request.targetModelId:
        names.append(request.targetModelId)
    return names
