"""Requests to agents. The channel to an agent is opened when it is first needed, and closed when the agent's pod
disappears.

Control traffic is rare, so plain `grpc.aio` is fast enough. Every request has a timeout. A request raises `Unreachable`
if the agent cannot be reached or does not answer. This says nothing about the requested model.
"""

import asyncio
from collections.abc import Iterable
from typing import Protocol, TypeVar

import grpc

from mesh.identity import Identity, rpc
from mesh.pb import agent_pb2, agent_pb2_grpc
from router.state.pods import Pod
from router.state.registry import Registration

_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),  # also the timeout for connecting
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", 10_000),  # a load may be silent for minutes: detects a dead host meanwhile
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.max_receive_message_length", 64 << 20),  # a pod's description names all its copies
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)

_RETIRED = 900.0  # seconds for which requests under way may still use a channel with an old certificate

_Request = TypeVar("_Request")
_Reply = TypeVar("_Reply")


def load_request(
    registration: Registration,
    *,
    idle_ms: int,
    reason: str,
    pinned: bool,
    expected_copies: int = 0,
    generation: int = 0,
) -> agent_pb2.LoadRequest:
    """Returns a request to load a registration. The arguments are fields of the message."""
    record = registration.record
    return agent_pb2.LoadRequest(
        model_id=registration.model_id,
        create_revision=registration.created,
        model_type=record.type,
        model_path=record.path,
        model_key=record.key,
        sha256=record.sha256,
        host_bytes=record.host_bytes,
        device_bytes=record.device_bytes,
        idle_ms=idle_ms,
        expected_copies=expected_copies,
        reason=reason,
        pinned=pinned,
        generation=generation,
    )


class Unreachable(Exception):
    """The error that a request to an agent got no answer. If `refused` is True, the agent certainly did not get the
    request.

    `text` is for callers. The string form is for the log, and includes gRPC's text."""

    def __init__(self, text: str, *, refused: bool, detail: str = "") -> None:
        super().__init__(f"{text} ({detail})" if detail else text)
        self.text = text
        self.refused = refused


class Timeout(Unreachable):
    """The error that an agent did not answer within the timeout. The agent may be alive."""


class Agent(Protocol):
    """The requests to agents, as a protocol that tests can implement. All methods raise `Unreachable`. Timeouts are in
    seconds."""

    async def load(self, pod: Pod, request: agent_pb2.LoadRequest, *, timeout: float) -> agent_pb2.LoadReply:
        """Loads a model, or joins the load under way."""

    async def unload(self, pod: Pod, request: agent_pb2.UnloadRequest, *, timeout: float) -> agent_pb2.UnloadReply:
        """Unloads a copy."""

    async def describe(self, pod: Pod, model_id: str = "", *, timeout: float) -> agent_pb2.DescribeReply:
        """Returns the pod's description; with an id, only that model's copy and the decisions about it."""

    async def active(self, pod: Pod, models: Iterable[str], *, timeout: float) -> agent_pb2.DescribeReply:
        """Returns the state of the copies that plans need, and of the copies of `models`."""

    async def questions(self, pod: Pod, *, timeout: float) -> agent_pb2.DescribeReply:
        """Returns the latest requests for room, and their answers."""

    def forget(self, name: str) -> None:
        """Closes the channel to a pod that has disappeared; requests under way fail."""


class Agents:
    """The agents of a mesh, reached at the control addresses that their pods have published."""

    def __init__(self, identity: Identity | None = None) -> None:
        self._identity = identity
        self._channels: dict[str, tuple[tuple[str, int], grpc.aio.Channel, agent_pb2_grpc.AgentStub]] = {}  # by pod
        self._closing: set[asyncio.Task[None]] = set()
        self._retiring: set[asyncio.Task[None]] = set()

    def _stub(self, pod: Pod) -> agent_pb2_grpc.AgentStub:
        if pod.record is None:
            raise Unreachable(f"the agent of {pod.name} has not published its address", refused=True)
        address = pod.record.control_address
        identity = self._identity
        reached = (address, identity.changes if identity is not None else 0)
        known = self._channels.get(pod.name)
        if known is not None and known[0] == reached:
            return known[2]
        if known is not None and known[0][0] == address:
            self._retire(pod.name)
        elif known is not None:
            self.forget(pod.name)
        channel = rpc.channel(address, _OPTIONS, identity)
        stub = agent_pb2_grpc.AgentStub(channel)
        self._channels[pod.name] = (reached, channel, stub)
        return stub

    def _retire(self, name: str) -> None:
        """Retires the channel to a pod, because a channel keeps the certificate that it was opened with. Requests under
        way continue on the channel. The next request opens a new one."""
        channel = self._channels.pop(name)[1]
        task = asyncio.get_running_loop().create_task(channel.close(_RETIRED), name=f"retire channel to {name}")
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def load(self, pod: Pod, request: agent_pb2.LoadRequest, *, timeout: float) -> agent_pb2.LoadReply:
        """Loads a model, or joins the load under way."""
        return await self._ask(pod, self._stub(pod).Load, request, timeout)

    async def unload(self, pod: Pod, request: agent_pb2.UnloadRequest, *, timeout: float) -> agent_pb2.UnloadReply:
        """Unloads a copy."""
        return await self._ask(pod, self._stub(pod).Unload, request, timeout)

    async def describe(self, pod: Pod, model_id: str = "", *, timeout: float) -> agent_pb2.DescribeReply:
        """Returns the pod's description; with an id, only that model's copy and the decisions about it."""
        return await self._ask(pod, self._stub(pod).Describe, agent_pb2.DescribeRequest(model_id=model_id), timeout)

    async def active(self, pod: Pod, models: Iterable[str], *, timeout: float) -> agent_pb2.DescribeReply:
        """Returns the state of the copies that plans need, and of the copies of `models`."""
        request = agent_pb2.DescribeRequest(active=True, models=models)
        return await self._ask(pod, self._stub(pod).Describe, request, timeout)

    async def questions(self, pod: Pod, *, timeout: float) -> agent_pb2.DescribeReply:
        """Returns the latest requests for room, and their answers."""
        request = agent_pb2.DescribeRequest(questions=True)
        return await self._ask(pod, self._stub(pod).Describe, request, timeout)

    @staticmethod
    async def _ask(
        pod: Pod, method: "grpc.aio.UnaryUnaryMultiCallable[_Request, _Reply]", request: _Request, timeout: float
    ) -> _Reply:
        try:
            assert pod.record is not None  # it has a stub
            return await method(request, timeout=timeout, metadata=rpc.shown(pod.record.token))
        except grpc.aio.AioRpcError as error:
            detail = error.details() or error.code().name
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                text = f"the agent of {pod.name} did not answer within {timeout:g} s"
                raise Timeout(text, refused=False, detail=detail) from error
            refused = "failed to connect" in detail.lower()
            outcome = "cannot be reached" if refused else "does not answer"
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                outcome = "does not accept this router's credentials"
            raise Unreachable(f"the agent of {pod.name} {outcome}", refused=refused, detail=detail) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # grpc.aio reports a closed channel in this way: the pod has disappeared.
            raise Unreachable(f"{pod.name} has disappeared", refused=False) from None

    def forget(self, name: str) -> None:
        """Closes the channel to a pod that has disappeared; requests under way fail."""
        known = self._channels.pop(name, None)
        if known is not None:
            task = asyncio.get_running_loop().create_task(known[1].close(None), name=f"close channel to {name}")
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Closes every channel."""
        for name in list(self._channels):
            self.forget(name)
        for task in self._retiring:
            task.cancel()
        if ending := (*self._closing, *self._retiring):
            await asyncio.gather(*ending, return_exceptions=True)
