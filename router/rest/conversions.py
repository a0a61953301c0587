"""The conversion of large JSON bodies in a separate process (`router.rest.converter`), one body after another.

The first body starts the process. If the process dies or hangs, only the call whose body it was converting fails. The
next body starts a new process.
"""

import asyncio
import contextlib
import socket
from collections.abc import Sequence
from typing import Any

from mesh import process
from mesh.statuses import MeshError, Reason
from mesh.telemetry import logs
from router.rest import documents, papers
from router.rest.pieces import Piece

log = logs.get(__name__)

_MODULE = "router.rest.converter"
_MEMORY = 1 << 30  # bytes: 16 MB of JSON take up to 600 MB ("{}," 5 million times)
_PER_BYTE = 64
_TIMEOUT = 60.0  # seconds for one body: 16 MB take up to 5
_STOP = 2.0  # seconds for the process to end


class Conversions:
    """The converter of one worker."""

    def __init__(self, *, max_message: int, timeout: float = _TIMEOUT) -> None:
        """Makes a converter. `max_message` is in bytes. `timeout` is in seconds, for one body."""
        self._memory = max(_MEMORY, _PER_BYTE * max_message)
        self._limit = max_message
        self._timeout = timeout
        self._turn = asyncio.Lock()
        self._files = papers.Kept()
        self._trimming: asyncio.TimerHandle | None = None
        self._process: process.Process | None = None
        self._socket: socket.socket | None = None
        self._tasks: set[asyncio.Task[papers.Paper]] = set()
        self.starts = 0
        self.count = 0

    @property
    def pid(self) -> int | None:
        """The id of the running process, or None if none runs."""
        return None if self._process is None else self._process.pid

    async def to_message(
        self, model: str, version: str, body: Sequence[Piece], header_length: int | None
    ) -> tuple[bytes, documents.Form]:
        """Returns the framed gRPC message for a REST body, as `documents.decode_request` does. Raises MeshError."""
        head = {"to": "message", "model": model, "version": version, "header_length": header_length}
        paper = await self._convert(head, body)
        frame = bytes(paper.body)
        paper.close()
        return frame, documents.Form.load(paper.head["form"])

    async def to_body(self, frame: bytes, encoding: bytes, form: documents.Form) -> "tuple[papers.Paper, int | None]":
        """Returns the REST body for a framed reply, as `documents.encode_response` does, and the length of its JSON
        part. Raises MeshError."""
        head = {"to": "body", "form": form.dump(), "limit": self._limit, "encoding": encoding[:60].decode("latin-1")}
        paper = await self._convert(head, (frame,))
        return paper, paper.head["json_length"]

    async def close(self) -> None:
        """Ends the process. Conversions under way fail."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._end()
        self._trim()

    async def _convert(self, head: dict[str, Any], body: Sequence[Piece]) -> papers.Paper:
        await self._turn.acquire()
        # If a caller goes away, the process still finishes its body before it gets the next one.
        task = asyncio.get_running_loop().create_task(self._exchange(head, body))
        self._tasks.add(task)
        task.add_done_callback(self._done)
        try:
            paper = await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_discard)
            raise
        failed = paper.head.get("failed")
        if failed is None:
            return paper
        paper.close()
        reason = Reason[failed["reason"]]
        raise MeshError(reason, failed["text"], retry_after=failed["retry_after"], details=failed["details"])

    def _done(self, task: "asyncio.Task[papers.Paper]") -> None:
        self._tasks.discard(task)
        self._turn.release()

    async def _exchange(self, head: dict[str, Any], body: Sequence[Piece]) -> papers.Paper:
        files: list[papers.File] = []
        try:
            files.append(request := self._files.take(sum(map(len, body))))
            files.append(answer := self._files.take(None))
            connection = await self._connected()
            # Slice by slice, so that other calls run in between.
            with contextlib.closing(papers.sending(connection, head, body, request=request, answer=answer)) as slices:
                for _ in slices:
                    await asyncio.sleep(0)
            async with asyncio.timeout(self._timeout):
                paper = await _received(connection, answer, self._freed)
        except BaseException as error:
            # They are not used again, because the process may still write to them.
            for file in files:
                file.close()
            child = self._process
            await self._end()
            if isinstance(error, TimeoutError):
                why = f"took more than {self._timeout:g} s"
            elif isinstance(error, papers.Gone | OSError) and child is not None:
                why = f"ended meanwhile ({process.describe_exit(await child.wait())})"
            else:
                raise
            log.error("the process that converts large JSON was lost", why=why)
            text = f"the process that converts large JSON {why}: send large tensors as binary data"
            raise MeshError(Reason.INTERNAL, text) from error
        self.count += 1
        self._files.put(request)
        if self._trimming is not None:
            self._trimming.cancel()
        self._trimming = asyncio.get_running_loop().call_later(papers.IDLE, self._trim)
        return paper

    def _freed(self, file: papers.File) -> None:
        """Keeps the file of an answer for later ones, or frees it if no body has been converted for a while."""
        if self._trimming is None:
            file.close()
        else:
            self._files.put(file)

    def _trim(self) -> None:
        """Frees the kept files, and stops the timer that would do so."""
        if self._trimming is not None:
            self._trimming.cancel()
            self._trimming = None
        self._files.clear()

    async def _connected(self) -> socket.socket:
        if self._socket is not None and self._process is not None and self._process.returncode is None:
            return self._socket
        await self._end()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            ours.setblocking(False)
            argv = process.python(_MODULE, str(theirs.fileno()), str(self._memory))
            try:
                self._process = await process.spawn(
                    argv, name="converter", pass_fds=(theirs.fileno(),), on_line=lambda line: log.info(line)
                )
            except BaseException:
                ours.close()
                raise
        self._socket = ours
        self.starts += 1
        return ours

    async def _end(self) -> None:
        connection, self._socket = self._socket, None
        child, self._process = self._process, None
        if connection is not None:
            connection.close()
        if child is not None:
            child.kill()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(child.wait(), _STOP)


async def _received(connection: socket.socket, answer: papers.File, freed: papers.Freed) -> papers.Paper:
    loop = asyncio.get_running_loop()
    while True:
        readable = loop.create_future()
        loop.add_reader(connection.fileno(), _wake, readable)
        try:
            await readable
        finally:
            loop.remove_reader(connection.fileno())
        try:
            return papers.receive(connection, answer, freed)
        except BlockingIOError:
            continue


def _wake(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)


def _discard(task: "asyncio.Task[papers.Paper]") -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().close()
