"""Sending requests to etcd: the choice of member and token, retries, and time limits.

- One time limit covers all attempts of a request, and is passed to gRPC as a deadline. A caller may be cancelled at any
  time. Its request continues until the deadline, because each request cancelled from asyncio leaks 0.95 KB inside
  grpc.aio, and deadlines leak nothing.
- Reads are retried freely. A write is retried only if etcd certainly did not carry it out: the connection could not be
  made, or etcd refused the request without reading it. A failure that leaves open whether etcd has carried out a write
  is reported as ambiguous.
- Credentials may change between two attempts (`rotation`). A request that was refused for the old credentials is sent
  again with the new ones.
- Each request carries the metadata `hasleader`, so that a member which has lost its quorum refuses immediately. The
  request then goes to the next member.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

import grpc

from mesh.etcd import errors
from mesh.etcd.access import Access
from mesh.etcd.endpoints import Member
from mesh.etcd.rotation import Rotation
from mesh.etcd.stream import EOF, Stream
from mesh.options.etcdsettings import EtcdFiles, EtcdSettings
from mesh.pb import etcd_pb2 as pb
from mesh.statuses import Code

Method = Callable[[Member], Any]
"""A function that returns the method to call from a member's stubs."""

_PAUSE_FIRST, _PAUSE_MAX = 0.05, 0.5  # seconds between rounds over all members
_GRACE = 30.0  # seconds for requests to finish with replaced credentials
_SHARE_MIN = 1.0  # seconds a member gets for a read before the next is asked


@dataclass(frozen=True, slots=True)
class EtcdStatistics:
    """Counters of a client since it was created."""

    endpoint: str  # in use now
    requests: int
    repeats: int  # attempts beyond the first
    failures: int  # requests that raised
    rotations: int  # switches to the next member
    tokens: int  # fetched with the current password
    credential_changes: int  # times that changed credentials were adopted
    refusal: str  # why the current content of its files is not used; empty: it is


class Connection:
    """The connection that all parts of a client share. It belongs to the event loop of its first request."""

    def __init__(self, settings: EtcdSettings, *, follow: bool = False) -> None:
        self.closed = False
        self._access = Access(settings)
        self._rotation = Rotation(self) if follow and settings.files != EtcdFiles() else None
        self._last_read: pb.RangeRequest | None = None  # the last one that etcd answered
        self._retiring: dict[Access, asyncio.Task[None]] = {}
        self._requests = self._repeats = self._failures = 0

    @property
    def settings(self) -> EtcdSettings:
        """The settings in use."""
        return self._access.settings

    def statistics(self) -> EtcdStatistics:
        """Returns the connection's counters."""
        return EtcdStatistics(
            endpoint=self._access.endpoints.endpoint,
            requests=self._requests,
            repeats=self._repeats,
            failures=self._failures,
            rotations=self._access.endpoints.rotations,
            tokens=self._access.auth.renewals,
            credential_changes=self._rotation.changes if self._rotation else 0,
            refusal=self._rotation.refusal if self._rotation else "",
        )

    async def close(self) -> None:
        """Closes the connections. Requests and streams in progress end with EtcdClosed."""
        self.closed = True
        if self._rotation is not None:
            await self._rotation.end()
        await asyncio.gather(self._access.close(), *(access.close() for access in self._retiring))

    async def switch(self, settings: EtcdSettings, timeout: float) -> None:
        """Switches to other settings if etcd accepts them within `timeout` seconds. Otherwise raises EtcdError, and
        nothing changes. The test repeats the last read, if there was one, so it also covers the user's permissions.
        Raises ValueError for invalid settings (`endpoints.check`)."""
        heir = Connection(settings)
        try:
            if (last := self._last_read) is not None:
                request: Any = pb.RangeRequest(key=last.key, range_end=last.range_end, limit=1, keys_only=True)
                await heir.call("read", lambda m: m.kv.Range, request, repeatable=True, timeout=timeout)
            else:
                await heir.call(
                    "status", lambda m: m.maintenance.Status, pb.StatusRequest(), repeatable=True, timeout=timeout
                )
        except BaseException:
            await heir.close()
            raise
        former, self._access = self._access, heir._access
        retiring = asyncio.get_running_loop().create_task(former.retire(_GRACE), name="retire credentials for etcd")
        self._retiring[former] = retiring
        retiring.add_done_callback(lambda _: self._retiring.pop(former, None))

    async def call(
        self, what: str, method: Method, request: Any, *, repeatable: bool, timeout: float | None = None
    ) -> tuple[Any, Member]:
        """Sends a request. Returns the reply and the member that answered.

        `what` names the request in errors. `repeatable` says that etcd may carry it out twice, or again later, without
        harm. `timeout` is in seconds, for all attempts together (None: the timeout of the settings). Raises
        EtcdError.
        """
        loop = asyncio.get_running_loop()
        timeout = self.settings.timeout if timeout is None else timeout
        deadline = loop.time() + timeout
        renewed, failed = False, 0
        self._requests += 1
        while True:
            self._check(what)
            access = self._access
            endpoints, auth = access.endpoints, access.auth
            share = max(timeout / len(endpoints), _SHARE_MIN) if repeatable else timeout
            member, token, sent = endpoints.current, "", False
            try:
                budget = max(deadline - loop.time(), 0.001)
                token = await auth.token(member, min(budget, share))
                if access is not self._access:
                    continue
                budget, sent = max(deadline - loop.time(), 0.001), True
                call = method(member)(request, timeout=min(budget, share), metadata=_metadata(token))
                reply = await self._finish(call, what, repeatable)
                if isinstance(request, pb.RangeRequest):
                    self._last_read = request
                return reply, member
            except grpc.aio.AioRpcError as error:
                if sent and auth.enabled and not renewed and errors.is_stale_token(error):
                    auth.forget(token)
                    renewed = True
                    continue
                failure = errors.translate(error, f"{what} at {member.endpoint}", write=sent and not repeatable)
                if isinstance(failure, errors.EtcdDenied) and await self._rotated(access, deadline):
                    renewed = False
                    continue
                if not errors.is_transient(error):
                    self._failures += 1
                    raise failure from error
                self._leave(access, member)
                if not isinstance(failure, errors.EtcdUnavailable) or failure.ambiguous:
                    self._failures += 1
                    raise failure from error
                failed += 1
                pause = 0.0
                if failed % len(endpoints) == 0:
                    rounds = failed // len(endpoints)
                    pause = min(_PAUSE_FIRST * 2 ** min(rounds - 1, 8), _PAUSE_MAX) * random.uniform(0.5, 1.5)
                if loop.time() + pause >= deadline - 0.001:
                    self._failures += 1
                    raise failure from error
                self._repeats += 1
                await asyncio.sleep(pause)

    def _check(self, what: str) -> None:
        """Begins to follow the credential files, if it has not begun yet. Raises EtcdClosed if the client is closed.
        Called before each attempt."""
        if self.closed:
            raise errors.EtcdClosed(f"{what}: this client is closed")
        if self._rotation is not None:
            self._rotation.begin()

    def _leave(self, access: Access, member: Member) -> None:
        """Switches to the next member, and requests a check of the credential files, because etcd's certificates may
        have changed."""
        access.endpoints.leave(member)
        if self._rotation is not None:
            self._rotation.suspect()

    async def _rotated(self, refused: Access, deadline: float) -> bool:
        """Checks the credential files after a refusal. Returns True if the connection has switched to changed ones."""
        if self._rotation is not None and refused is self._access:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    await self._rotation.settle()
        return refused is not self._access

    async def _finish(self, call: Any, what: str, repeatable: bool) -> Any:
        """Awaits the reply. If the waiting task is cancelled, the call continues."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        call.add_done_callback(lambda _: None if done.done() else done.set_result(None))
        await done
        if call.cancelled():  # cancelled by this client: awaiting it would raise CancelledError in the caller
            kind = errors.EtcdClosed if self.closed else errors.EtcdReplaced
            raise kind(f"{what}: this connection was closed", ambiguous=not repeatable)
        return await call

    async def receive(self, what: str, method: Method, request: Any, *, idle: float) -> AsyncGenerator[Any, None]:
        """Sends a request to the member in use, and yields the parts of its answer. Raises EtcdError: EtcdUnavailable
        if no part arrives for `idle` seconds. A member without a leader answers too, from its own data."""
        self._check(what)
        access = self._access
        member = access.endpoints.current
        what = f"{what} at {member.endpoint}"
        call = None
        try:
            token = await access.auth.token(member, idle)
            if access is not self._access:
                raise errors.EtcdReplaced(f"{what}: the credentials have changed")
            call = method(member)(request, metadata=(("token", token),) if token else ())
            while True:
                part = await asyncio.wait_for(call.read(), idle)
                if part is EOF:
                    return
                yield part
        except TimeoutError as error:
            raise errors.EtcdUnavailable(f"{what}: no data arrived for {idle:g} s") from error
        except grpc.aio.AioRpcError as error:
            raise errors.translate(error, what, write=False) from error
        finally:
            if call is not None:
                call.cancel()

    async def open(self, what: str, method: Method, first: Any, timeout: float) -> Stream:
        """Opens a stream at the current member and writes its first message. Waits at most `timeout` seconds for a
        token, and as long for the write. Raises EtcdError."""
        deadline = asyncio.get_running_loop().time() + timeout
        while True:
            self._check(what)
            access = self._access
            member = access.endpoints.current
            try:
                token = await access.auth.token(member, timeout)
            except grpc.aio.AioRpcError as error:
                failure = errors.translate(error, f"{what} at {member.endpoint}", write=False)
                if isinstance(failure, errors.EtcdDenied) and await self._rotated(access, deadline):
                    continue
                self._leave(access, member)
                raise failure from error
            if access is self._access:
                break
        call = method(member)(metadata=_metadata(token))
        stream = Stream(self, access, f"{what} at {member.endpoint}", call, member, token)
        await stream.write(first, timeout)
        return stream

    def blame(self, access: Access, member: Member, error: grpc.aio.AioRpcError | None, token: str) -> None:
        """Handles the failure of a stream at `member`: switches to the next member, or drops a refused token."""
        if error is not None and errors.is_stale_token(error):
            access.auth.forget(token)
        elif error is None or errors.is_transient(error) or errors.code_of(error) is Code.INTERNAL:
            self._leave(access, member)

    def forget_token(self, token: str) -> bool:
        """Drops a token that etcd may have refused, although the error does not say so. Returns whether another token
        can help."""
        self._access.auth.forget(token)
        return self._access.auth.enabled


def _metadata(token: str) -> tuple[tuple[str, str], ...]:
    return (("hasleader", "true"), ("token", token)) if token else (("hasleader", "true"),)
