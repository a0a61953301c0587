"""An open stream to etcd, whose failures are all EtcdErrors.

With `grpc.aio`, the end of a stream can be an AioRpcError, an InvalidStateError from a write, or an end with status OK.
If this client was closed, it is a CancelledError that looks as if the caller had been cancelled. This module converts
all of these to EtcdErrors.
"""

import asyncio
from typing import Any, Protocol

import grpc

from mesh.etcd import errors
from mesh.etcd.access import Access
from mesh.etcd.endpoints import Member

EOF: Any = vars(grpc.aio)["EOF"]  # not in the type stubs


class Opener(Protocol):
    """The part of a connection that its streams use."""

    closed: bool

    def blame(self, access: Access, member: Member, error: grpc.aio.AioRpcError | None, token: str) -> None:
        """Notes that a stream at `member` has failed."""


class Stream:
    """A stream that one task at a time reads. Unread messages wait in etcd."""

    def __init__(self, connection: Opener, access: Access, what: str, call: Any, member: Member, token: str) -> None:
        self._connection = connection
        self._access = access
        self._what = what
        self._call = call
        self._member = member
        self.token = token
        self._replaced = False
        access.streams.add(self)

    async def write(self, message: Any, timeout: float) -> None:
        """Sends one message. Raises EtcdError: EtcdUnavailable after `timeout` seconds. Cancellation ends the
        stream."""
        await self._run(self._call.write(message), timeout)

    async def read(self, timeout: float | None = None) -> Any:
        """Reads the next message. Raises EtcdError: EtcdUnavailable at the end of the stream, and after `timeout`
        seconds (None: no limit).

        Cancellation ends the stream."""
        message = await self._run(self._call.read(), timeout)
        if message is EOF:
            self._check()
            self._connection.blame(self._access, self._member, None, self.token)
            raise errors.EtcdUnavailable(f"{self._what}: etcd ended the stream")
        return message

    def replace(self) -> None:
        """Ends the stream with EtcdReplaced, for current and later readers and writers."""
        self._replaced = True
        self._call.cancel()

    def cancel(self) -> None:
        """Ends the stream. Does nothing if it has already ended."""
        self._call.cancel()

    async def _run(self, operation: Any, timeout: float | None) -> Any:
        try:
            if timeout is None:
                return await operation
            # wait_for would only cancel the operation; the stream must end, not be left half-used.
            task = asyncio.ensure_future(operation)
            try:
                done, _ = await asyncio.wait({task}, timeout=timeout)
            except asyncio.CancelledError:
                self.cancel()
                task.cancel()
                raise
            if not done:
                self.cancel()
                await asyncio.wait({task}, timeout=1.0)
                if task.done() and not task.cancelled():
                    task.exception()  # retrieved, or asyncio would log that the stream has ended
                self._connection.blame(self._access, self._member, None, self.token)
                raise errors.EtcdUnavailable(f"{self._what}: no answer within {timeout:g} s")
            return await task
        except grpc.aio.AioRpcError as error:
            self._check()
            self._connection.blame(self._access, self._member, error, self.token)
            raise errors.translate(error, self._what, write=False) from error
        except asyncio.InvalidStateError as error:
            self._check()
            self._connection.blame(self._access, self._member, None, self.token)
            raise errors.EtcdUnavailable(f"{self._what}: the stream has ended") from error
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if not (current and current.cancelling()):
                if self._connection.closed:
                    raise errors.EtcdClosed(f"{self._what}: this client was closed") from None
                self._check()
            raise

    def _check(self) -> None:
        if self._replaced:
            raise errors.EtcdReplaced(f"{self._what}: the credentials have changed")
