"""The SPI that the relay offers to its agent. A `Control` of the foreign server carries out the agent's requests.

The relay adds what the ONNX server does itself: copies have tokens, and slots of the use board. In an unload, the copy
first stops accepting calls, then its calls in flight end or are ended, and then the server unloads the model.

A server must drop its models before it reports READY, so the relay asks for its status only until it is READY. A relay
that takes over from a dead one answers from the journal.
"""

import asyncio
import math
import time
from contextlib import AbstractContextManager, nullcontext

import grpc

from mesh.pb import modelruntime_pb2 as pb
from mesh.pb import modelruntime_pb2_grpc
from mesh.process.tasks import Tasks
from mesh.runtime.port import spi
from mesh.runtime.relay import verdicts
from mesh.runtime.relay.calls import RelayPort
from mesh.runtime.relay.link import Link
from mesh.runtime.relay.methods import Methods
from mesh.runtime.relay.reported import Trailers
from mesh.runtime.relay.settings import RelaySettings
from mesh.runtime.relay.silence import Silence
from mesh.runtime.relay.table import RelayedCopy, Table
from mesh.runtime.sharedmemory.slot import SlotState
from mesh.schema import copytoken
from mesh.statuses import MeshError, Reason
from mesh.telemetry import logs
from mesh.wire import headers

log = logs.get(__name__)

UNLOAD_GRACE = 30.0  # maximum seconds for calls in flight

_STATUS_TIMEOUT = 8.0  # seconds
_PREDICT_TIMEOUT = 0.5  # seconds, ModelMesh's
_LAST_WORDS = 0.5  # seconds between the answer to a load that the server does not end, and the end of this process

_CLEAN_UP = 10.0
"""Seconds for the unload after a load that took too long. The agent waits for the answer to a load for 15 seconds
beyond the load's time limit, and by then the server must have answered, or be known to hang."""


class RelaySpi(modelruntime_pb2_grpc.ModelRuntimeServicer):  # type: ignore[misc]
    """The SPI's methods. `ready` is set once the server can be used."""

    def __init__(
        self,
        settings: RelaySettings,
        link: Link,
        table: Table,
        port: RelayPort,
        tasks: Tasks,
        *,
        data_address: str,
        pid: int,
        silence: Silence | None = None,
    ) -> None:
        self.ready = asyncio.Event()
        self.blocked = False  # the server is given up because of a load, and no call is to blame
        self._settings = settings
        self._link = link
        self._table = table
        self._port = port
        self._tasks = tasks
        self._silence = silence
        self._told = (("mesh-data", data_address), ("mesh-pid", str(pid)))
        self._status: pb.RuntimeStatusResponse | None = None
        self._reported: Trailers = ()  # with the status
        self._asking = asyncio.Lock()
        self._connected = False

    def resume(self, status: pb.RuntimeStatusResponse) -> None:
        """Continues with a server that reported its status to a former relay."""
        self._status = status
        self._port.methods = Methods(status)
        self.ready.set()

    async def runtimeStatus(self, request: pb.RuntimeStatusRequest, context: spi.Context) -> pb.RuntimeStatusResponse:
        """Answers with the server's status. Once the server has reported READY, repeats this report without asking the
        server."""
        async with spi.answered(context), self._asking:
            status = self._status
            if status is None:
                status = await self._ask()
        context.set_trailing_metadata((*self._told, *self._reported))
        return status

    async def _ask(self) -> pb.RuntimeStatusResponse:
        await self._reach()
        status, told = await self._link.control.status(timeout=_STATUS_TIMEOUT)
        self._reported = self._link.note(told)
        if status.status == pb.RuntimeStatusResponse.READY:
            log.info("model server ready", server=self._settings.server, version=status.runtimeVersion)
            self._table.begin(status, former=self._link.control.former)
            self.resume(status)
        return status

    async def _reach(self) -> None:
        try:
            async with asyncio.timeout(_STATUS_TIMEOUT):
                await self._link.connected()
        except TimeoutError:
            server, waited = self._settings.server, f"{_STATUS_TIMEOUT:g} s"
            text = f"no connection to the model server at {server} for {waited}: check that it runs and listens there"
            raise MeshError(Reason.UNAVAILABLE, text) from None

    async def loadModel(self, request: pb.LoadModelRequest, context: spi.Context) -> pb.LoadModelResponse:
        """Loads a model at the server, and answers when the copy can serve. Refuses a second copy of the same id."""
        async with spi.answered(context):
            told = spi.sent(context)
            slot = spi.slot_of(request, told)
            token = told.get(headers.SPI_COPY, "").encode()
            if self._table.copies.get(request.modelId) is not None:
                text = "this model server holds one copy of an id at a time: register the new content under another id"
                raise MeshError(Reason.PRECONDITION, text)
            name = self._link.control.name(request.modelId)
            copy = RelayedCopy(request.modelId, token, self._table.row(slot), name=name)
            copy.row.loading(copytoken.revision(token), time.monotonic_ns())
            loaded = False
            try:
                response, reported = await self._load(request)
                loaded = True
            finally:
                if not loaded:
                    copy.row.mark(SlotState.FREE)
            context.set_trailing_metadata(reported)
            limits = self._status is not None and self._status.limitModelConcurrency
            self._table.loaded(copy, slot=slot, concurrency=response.maxConcurrency if limits else 0)
        return response

    async def _load(self, request: pb.LoadModelRequest) -> tuple[pb.LoadModelResponse, Trailers]:
        own = self._status.modelLoadingTimeoutMs / 1000 if self._status is not None else 0.0
        timeout = self._settings.load_timeout or own
        epoch, began = self._link.epoch, time.monotonic()
        try:
            with self._allowed(timeout + _CLEAN_UP if timeout else math.inf, began):
                response, told = await self._link.control.load(request, timeout=timeout or None)
        except grpc.aio.AioRpcError as error:
            lost = error.code() is grpc.StatusCode.UNAVAILABLE
            if lost and await self._link.broken(epoch, error.details() or ""):
                await self._link.survived()
            if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                raise
        except MeshError as error:
            if error.reason is not Reason.DEADLINE:
                raise
        except asyncio.CancelledError:
            if timeout:  # the agent asks for the unload
                within = max(0.0, timeout - (time.monotonic() - began)) + _CLEAN_UP
                self._tasks.start(self._answers(within, began), f"end load {request.modelId}")
            raise
        else:
            return response, self._link.note(told)
        # ModelMesh's contract: a load that was cancelled is followed by an unload.
        await self._clean_up(request.modelId)
        limit = "its pods' --load-timeout" if self._settings.load_timeout else "the limit that the model server reports"
        text = f"the load took longer than {timeout:g} s and was ended: if the model needs longer, raise {limit}"
        raise MeshError(Reason.DEADLINE, text)

    def _allowed(self, seconds: float, began: float) -> AbstractContextManager[None]:
        """Allows a server whose loads block it to be silent for a load."""
        return nullcontext() if self._silence is None else self._silence.loading(seconds, began=began)

    async def _answers(self, within: float, began: float) -> None:
        """Gives the server up if it does not answer within `within` seconds. An endless load blocks some servers, even
        if the load is cancelled."""
        try:
            with self._allowed(within, began):
                await self._link.holds("", timeout=within)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                self.blocked = True
                self._link.give_up(f"did not answer for {within:.0f} s after a load that was cancelled")

    async def _clean_up(self, model_id: str) -> None:
        """Has the server unload a model whose load was ended. A server that does not answer is probably still loading
        the model in the thread that answers calls, as MLServer does, so it counts as hung."""
        try:
            await self._link.control.unload(pb.UnloadModelRequest(modelId=model_id), timeout=_CLEAN_UP)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                raise
            self.blocked = True
            why = f"did not answer for {_CLEAN_UP:g} s after a load that was ended"
            # After the answer, by which the agent learns which model is to blame.
            asyncio.get_running_loop().call_later(_LAST_WORDS, self._link.give_up, why)
            raise MeshError(Reason.DEADLINE, f"the model server {why}", details={spi.STUCK: "1"}) from None

    async def unloadModel(self, request: pb.UnloadModelRequest, context: spi.Context) -> pb.UnloadModelResponse:
        """Waits for the copy's calls or ends them, has the server unload the model, and answers once it has."""
        async with spi.answered(context):
            token = spi.sent(context).get(headers.SPI_COPY, "").encode()
            copy = self._table.withdraw(request.modelId, token)
            if copy is not None:
                await copy.drain(spi.unload_grace(context, UNLOAD_GRACE))
            if self._table.copies.get(request.modelId) is None:  # otherwise another copy has been loaded since
                try:
                    await self._link.control.unload(request, timeout=context.time_remaining())
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.NOT_FOUND:
                        raise
            if copy is not None:
                self._table.unloaded(copy)
        return pb.UnloadModelResponse()

    async def modelSize(self, request: pb.ModelSizeRequest, context: spi.Context) -> pb.ModelSizeResponse:
        """Asks the server for the size of a copy that is here. Answers with NOT_FOUND if the relay or the server does
        not have it."""
        async with spi.answered(context):
            copy = self._table.copies.get(request.modelId)
            if copy is None:
                raise MeshError(Reason.UNKNOWN_MODEL, f"{request.modelId!r} is not loaded")
            try:
                response, told = await self._link.control.size(request, timeout=context.time_remaining())
                context.set_trailing_metadata(self._link.note(told))
            except grpc.aio.AioRpcError as error:
                if not verdicts.model_is_lost(error.code().value[0], error.details() or ""):
                    raise
                raise self._lost(copy) from None
            except MeshError as error:
                raise self._lost(copy) if error.reason is Reason.UNKNOWN_MODEL else error from None
        return response

    def _lost(self, copy: RelayedCopy) -> MeshError:
        why = "the model server does not have it"
        self._table.lose(copy, why)
        return MeshError(Reason.UNKNOWN_MODEL, f"{copy.model_id!r} is not loaded: {why}")

    async def predictModelSize(
        self, request: pb.PredictModelSizeRequest, context: spi.Context
    ) -> pb.PredictModelSizeResponse:
        """Asks the server for the size that a model will have."""
        async with spi.answered(context):
            return await self._link.control.predict(request, timeout=_PREDICT_TIMEOUT)
        raise AssertionError("not reached")
