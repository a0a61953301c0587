"""Sending requests to etcd: which member, which token, how often, how long.

- Every request has one bound for all its attempts, passed to gRPC as a deadline. A caller may be cancelled at any time;
  the request in flight is then left to its deadline, because each one cancelled from asyncio leaks 0.95 KB inside
  grpc.aio and deadlines leak nothing.
- Reads are repeated at will. A write is sent again only if it certainly was not done: the connection was not made, or
  etcd refused it before looking at it. Any other failure of a write is reported as ambiguous.
- Each request carries `hasleader`: a member that has lost its quorum refuses at once, and the next one is asked.
"""

import asyncio
import random
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

import grpc

from mesh.etcd import errors
from mesh.etcd.auth import Auth
from mesh.etcd.endpoints import Endpoints, Member
from mesh.etcd.stream import EOF, Stream
from mesh.settings import EtcdSettings
from mesh.statuses import Code

Method = Callable[[Member], Any]
"""Picks a stub's method from a member."""

_PAUSE_FIRST, _PAUSE_MAX = 0.05, 0.5  # seconds between rounds over all members
_SHARE_MIN = 1.0  # seconds a member gets for a read before the next is asked


@dataclass(frozen=True, slots=True)
class EtcdStatistics:
    """How a client has fared since it was made."""

    endpoint: str  # in use now
    requests: int
    repeats: int  # attempts beyond the first
    failures: int  # requests that raised
    rotations: int  # times a member was left for the next
    tokens: int  # fetched with the password


class Connection:
    """What the parts of a client share. Belongs to the event loop of its first request."""

    def __init__(self, settings: EtcdSettings) -> None:
        self.settings = settings
        self.closed = False
        self._endpoints = Endpoints(settings)
        self._auth = Auth(settings)
        self._requests = self._repeats = self._failures = 0

    def statistics(self) -> EtcdStatistics:
        """Counters, for metrics and people."""
        return EtcdStatistics(
            endpoint=self._endpoints.endpoint,
            requests=self._requests,
            repeats=self._repeats,
            failures=self._failures,
            rotations=self._endpoints.rotations,
            tokens=self._auth.renewals,
        )

    async def close(self) -> None:
        """Closes the connections. Requests and streams in progress end with EtcdClosed."""
        self.closed = True
        await self._endpoints.close()

    async def call(
        self, what: str, method: Method, request: Any, *, repeatable: bool, timeout: float | None = None
    ) -> tuple[Any, Member]:
        """Sends one request and gives its reply and the member that gave it.

        `what` names the request in errors; `repeatable`: doing it twice, or once more later, does no harm.
        `timeout` is in seconds (None: the settings'), over all attempts. Raises EtcdError."""
        loop = asyncio.get_running_loop()
        timeout = self.settings.timeout if timeout is None else timeout
        deadline = loop.time() + timeout
        share = max(timeout / len(self._endpoints), _SHARE_MIN) if repeatable else timeout
        renewed, failed = False, 0
        self._requests += 1
        while True:
            if self.closed:
                raise errors.EtcdClosed(f"{what}: this client is closed")
            member, token, sent = self._endpoints.current, "", False
            try:
                budget = max(deadline - loop.time(), 0.001)
                token = await self._auth.token(member, min(budget, share))
                budget, sent = max(deadline - loop.time(), 0.001), True
                call = method(member)(request, timeout=min(budget, share), metadata=_metadata(token))
                return await self._finish(call, what, repeatable), member
            except grpc.aio.AioRpcError as error:
                if sent and self._auth.enabled and not renewed and errors.is_stale_token(error):
                    self._auth.forget(token)
                    renewed = True
                    continue
                failure = errors.translate(error, f"{what} at {member.endpoint}", write=sent and not repeatable)
                if not errors.is_transient(error):
                    self._failures += 1
                    raise failure from error
                self._endpoints.leave(member)
                if not isinstance(failure, errors.EtcdUnavailable) or failure.ambiguous:
                    self._failures += 1
                    raise failure from error
                failed += 1
                pause = 0.0
                if failed % len(self._endpoints) == 0:
                    rounds = failed // len(self._endpoints)
                    pause = min(_PAUSE_FIRST * 2 ** min(rounds - 1, 8), _PAUSE_MAX) * random.uniform(0.5, 1.5)
                if loop.time() + pause >= deadline - 0.001:
                    self._failures += 1
                    raise failure from error
                self._repeats += 1
                await asyncio.sleep(pause)

    async def _finish(self, call: Any, what: str, repeatable: bool) -> Any:
        """The reply, without cancelling the call when whoever waits for it is cancelled."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        call.add_done_callback(lambda _: None if done.done() else done.set_result(None))
        await done
        if call.cancelled() and self.closed:  # awaiting it would raise CancelledError, as if the caller were cancelled
            raise errors.EtcdClosed(f"{what}: this client was closed", ambiguous=not repeatable)
        return await call

    async def receive(self, what: str, method: Method, request: Any, *, idle: float) -> AsyncGenerator[Any, None]:
        """Sends one request to the member in use and gives the parts of its answer as they come. EtcdUnavailable where
        none comes for `idle` s. A member without a leader answers too: for what it has itself."""
        if self.closed:
            raise errors.EtcdClosed(f"{what}: this client is closed")
        member = self._endpoints.current
        what = f"{what} at {member.endpoint}"
        call = None
        try:
            token = await self._auth.token(member, idle)
            call = method(member)(request, metadata=(("token", token),) if token else ())
            while True:
                part = await asyncio.wait_for(call.read(), idle)
                if part is EOF:
                    return
                yield part
        except TimeoutError as error:
            raise errors.EtcdUnavailable(f"{what}: nothing came for {idle:g} s") from error
        except grpc.aio.AioRpcError as error:
            raise errors.translate(error, what, write=False) from error
        finally:
            if call is not None:
                call.cancel()

    async def open(self, what: str, method: Method, first: Any, timeout: float) -> Stream:
        """Opens a stream at the current member and writes its first message, within `timeout` s. Raises EtcdError."""
        if self.closed:
            raise errors.EtcdClosed(f"{what}: this client is closed")
        member, token = self._endpoints.current, ""
        try:
            token = await self._auth.token(member, timeout)
        except grpc.aio.AioRpcError as error:
            self._endpoints.leave(member)
            raise errors.translate(error, f"{what} at {member.endpoint}", write=False) from error
        stream = Stream(self, f"{what} at {member.endpoint}", method(member)(metadata=_metadata(token)), member, token)
        await stream.write(first, timeout)
        return stream

    def blame(self, member: Member, error: grpc.aio.AioRpcError | None, token: str) -> None:
        """A stream at `member` has failed: takes the next member, and another token where that was refused."""
        if error is not None and errors.is_stale_token(error):
            self._auth.forget(token)
        elif error is None or errors.is_transient(error) or errors.code_of(error) is Code.INTERNAL:
            self._endpoints.leave(member)

    def forget_token(self, token: str) -> bool:
        """A token may have been refused under another name. Whether asking for a new one can help."""
        self._auth.forget(token)
        return self._auth.enabled


def _metadata(token: str) -> tuple[tuple[str, str], ...]:
    return (("hasleader", "true"), ("token", token)) if token else (("hasleader", "true"),)
