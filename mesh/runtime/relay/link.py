"""The connection to the foreign server, and the check that the server is still the same one.

A server may end, hang, or be replaced by a new one at the same address, and gRPC hides all of that: it reconnects, and
only single calls fail. But a new server has no models, and must be asked for its status. When a connection is lost,
calls and loads therefore wait while this module finds out what happened. If a new connection is refused, the server has
ended. If the connection is accepted, the server is asked for its copies. A server that has one of them is the same
server, and work continues. Otherwise the old server has ended, so this process exits with a status that says so, and
the agent begins again with an empty server.

While the connection lasts, the server is asked about one copy after the other, because a server may lose a model
without ending.
"""

import asyncio
import re
from collections.abc import Callable, Iterable
from typing import Protocol

import grpc

from mesh.pb import modelruntime_pb2 as pb
from mesh.process.tasks import turned
from mesh.runtime.port.outcomes import GONE, HUNG
from mesh.runtime.relay import handshake, reported, verdicts
from mesh.runtime.relay.control import Control, SpiControl
from mesh.statuses import Code, MeshError, Reason
from mesh.telemetry import logs

log = logs.get(__name__)

LOOK = 5.0
"""Seconds between two requests to the server."""

_ANSWER = 3.0  # seconds for an answer; without one, a handshake shows whether the server is stopped
_NOTICING, _LOOKS = 0.01, 100  # seconds between looks at whether a lost connection was noticed, and their number
_LOCAL = re.compile("closed|removed|reset|refused|failed to connect|pipe|GOAWAY|recvmsg|transport", re.IGNORECASE)
"""Words in the texts of failures that gRPC itself reports."""

_AT_ONCE = 16  # copies asked for at a time


class Holding(Protocol):
    """The copies that the server should have."""

    def ids(self) -> list[str]:
        """Returns the ids of the copies."""

    def lost(self, model_id: str, why: str) -> None:
        """Notes that the server no longer has a copy."""


class Link:
    """The connection to the foreign server. `up` waits until the server can be used. The result of `ended` is the exit
    status, once the server is lost."""

    def __init__(
        self,
        server: str,
        holding: Holding,
        *,
        hang_timeout: float,
        max_message: int,
        calls: str = "",
        managed: Callable[[grpc.aio.Channel], Control] = SpiControl,
    ) -> None:
        """Opens the channels. `calls` is the address for inference calls, if it differs from `server`. `managed` makes
        the control of the server from the channel to it."""
        self.channel = _channel(server, max_message)
        self.calls = _channel(calls, max_message) if calls and calls != server else self.channel
        self.control = managed(self.channel)
        self.epoch = 0  # number of connections lost so far
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.why = ""
        self.device_bytes = 0  # in use on the server's device, as last reported
        self._server = server
        self._holding = holding
        self._hang_timeout = hang_timeout
        self._up = asyncio.Event()
        self._next = 0

    @property
    def is_up(self) -> bool:
        """True while the server can be used, as far as is known."""
        return self._up.is_set() and not self.ended.done()

    async def up(self) -> bool:
        """Waits until the server can be used. Returns False if the server is lost."""
        if not self._up.is_set():
            await self._up.wait()
        return not self.ended.done()

    def give_up(self, why: str) -> None:
        """Treats the server as hung, although the connection still exists."""
        self._end(HUNG, why)

    async def survived(self) -> None:
        """Waits until it is known that the server has outlived a lost connection. If the server has ended, never
        returns, because this process ends. The use board then still shows the work that was under way, which may have
        killed the server."""
        if not await self.up():
            await asyncio.Event().wait()

    async def noticed(self, epoch: int) -> None:
        """Waits until this link has noticed the loss of the connection of `epoch`, but at most for a second, because a
        call may also fail while the connection lasts."""
        for _ in range(_LOOKS):
            if self.epoch != epoch or self.ended.done():
                return
            await asyncio.sleep(_NOTICING)

    async def broken(self, epoch: int, text: str, channel: grpc.aio.Channel | None = None) -> bool:
        """Returns whether a call failed with UNAVAILABLE because its connection, of `epoch`, was lost, and not because
        the server answered so. `text` is the text of the failure, which may arrive before the channel changes its
        state, so this method waits for up to a second. `channel` is the channel that carried the call. If it is a
        separate channel, which is not watched here, only the epoch and the text decide."""
        ready = grpc.ChannelConnectivity.READY
        if channel is not None and channel is not self.channel:
            return self.epoch != epoch or _LOCAL.search(text) is not None
        for _ in range(_LOOKS):
            if self.epoch != epoch:
                return True
            if self.channel.get_state() is ready and not _LOCAL.search(text):
                return False
            await asyncio.sleep(_NOTICING)  # until `run` has noticed as well
        return False

    async def connected(self) -> None:
        """Waits for the first connection."""
        while (state := self.channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
            await self.channel.wait_for_state_change(state)

    async def run(self, *, resumed: bool = False) -> None:
        """Watches the connection until the server is lost. Call it once the server has reported that it is ready.
        `resumed` means that it reported this to a former relay, from which the copies come."""
        ready = grpc.ChannelConnectivity.READY
        while True:
            if not resumed and self.channel.get_state() is ready:
                self._up.set()
                await self.channel.wait_for_state_change(ready)
                self.epoch += 1
                self._up.clear()
                log.warning("connection to the model server lost", server=self._server)
            try:
                async with asyncio.timeout(self._hang_timeout):
                    why = await self._look(trusting=resumed)
            except TimeoutError:
                self._end(HUNG, f"has not answered for {self._hang_timeout:g} s")
                return
            if why:
                self._end(GONE, why)
                return
            resumed = False
            log.info("connected to the same model server again", server=self._server)

    async def watch(self) -> None:
        """Asks the server every `LOOK` seconds about one copy, one after the other. Withdraws a copy that the server no
        longer has, and gives the server up if it hangs."""
        while True:
            await asyncio.sleep(LOOK)
            turned()
            if not self._up.is_set():
                continue
            if await self._asked() or await handshake.runs(self._server, within=self._hang_timeout):
                continue
            if self._up.is_set():
                self._end(HUNG, f"has not answered for {self._hang_timeout:g} s")

    async def survey(self) -> bool:
        """Asks the server about every copy. Withdraws the copies that it has lost, and returns True. If it has lost
        all, withdraws none and returns False. Raises AioRpcError if the connection is lost."""
        limit = asyncio.Semaphore(_AT_ONCE)

        async def held(model_id: str) -> tuple[str, bool | None]:
            async with limit:
                return model_id, await self.holds(model_id)

        found = await asyncio.gather(*(held(model_id) for model_id in self._holding.ids()))
        missing = [model_id for model_id, there in found if there is False]
        if found and len(missing) == len(found):
            return False
        for model_id in missing:
            self._holding.lost(model_id, "the model server does not have it")
        return True

    async def holds(self, model_id: str, *, timeout: float | None = None) -> bool | None:
        """Returns whether the server has a model, or None if the server does not say. Raises AioRpcError if the server
        cannot be reached or does not answer within `timeout` seconds."""
        try:
            _, told = await self.control.size(pb.ModelSizeRequest(modelId=model_id), timeout=timeout)
            self.note(told)
        except grpc.aio.AioRpcError as error:
            code = error.code().value[0]
            if verdicts.model_is_lost(code, error.details() or ""):
                return False
            if code in (Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED, Code.CANCELLED):
                raise
            return None
        except MeshError as error:
            return False if error.reason is Reason.UNKNOWN_MODEL else None
        return True

    def note(self, trailers: Iterable[tuple[str, str | bytes]] | None) -> reported.Trailers:
        """Notes what an answer of the server reports about its device. Returns the trailers for the agent, also those
        about the disk."""
        used = reported.used(trailers)
        if used is not None:
            self.device_bytes = used
        return reported.passed_on(trailers)

    async def close(self) -> None:
        """Closes the connections."""
        await self.channel.close(None)
        if self.calls is not self.channel:
            await self.calls.close(None)

    async def _look(self, *, trusting: bool) -> str:
        """Returns the reason why the server at the address is not the one that was connected, or "" if it is the same.
        With `trusting`, a server that does not say which models it has counts as the same."""
        states = grpc.ChannelConnectivity
        while (state := self.channel.get_state(try_to_connect=True)) is not states.READY:
            if state is states.TRANSIENT_FAILURE:
                return "has ended: it accepts no connection"
            await self.channel.wait_for_state_change(state)
        ids = self._holding.ids()
        try:
            # A server that holds no models has none to lose, and may be a new one that waits for the agent.
            silent = not ids or await self.holds(ids[0]) is None
            if (silent and not trusting) or not await self.survey():
                return "counts as restarted: it confirms none of its models"
        except grpc.aio.AioRpcError:
            return "has ended: the connection was lost again"
        return ""

    async def _asked(self) -> bool:
        """Asks the server about the next copy. Returns whether it answered, or False if there are no copies."""
        ids = self._holding.ids()
        if not ids:
            return False
        self._next = (self._next + 1) % len(ids)
        model_id = ids[self._next]
        try:
            there = await self.holds(model_id, timeout=_ANSWER)
        except grpc.aio.AioRpcError:
            return False
        if there is False:
            self._holding.lost(model_id, "the model server does not have it")
        return True

    def _end(self, status: int, why: str) -> None:
        if not self.ended.done():
            self.why = why
            log.error("the model server can no longer be used", server=self._server, why=why)
            self.ended.set_result(status)
            self._up.set()


def _channel(address: str, max_message: int) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(
        address,
        options=(
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_http_proxy", 0),
            ("grpc.enable_retries", 0),  # no retries by gRPC, because routers decide which calls may be sent twice
            ("grpc.initial_reconnect_backoff_ms", 50),
            ("grpc.min_reconnect_backoff_ms", 1000),
            ("grpc.max_reconnect_backoff_ms", 500),
            ("grpc.max_receive_message_length", max_message),
            ("grpc.max_send_message_length", -1),
        ),
    )
