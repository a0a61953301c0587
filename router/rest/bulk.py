"""Registration or unregistration of many models at once. Request and answer are streams of newline-delimited JSON.

A million models make a body of 100 MB. The body is read line by line, and carried out in batches, a few at a time, so
that memory is bounded and etcd is kept busy. While a batch waits for etcd, the next one is parsed. A bad line is
reported, and does not affect other lines.

A line may be a single byte, and a few kilobytes of gzip may hold millions of lines. Therefore the numbers of lines, bad
lines, decompressed bytes and concurrent imports are limited, and other calls can run after every `SLICE` seconds of
work.
"""

import abc
import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from mesh.statuses import MeshError, Reason
from mesh.wire import inflate
from router.access.audit import OK
from router.management.requests import Item
from router.rest import modeldocuments
from router.state.differing import DifferentError

if TYPE_CHECKING:
    from router.management.registration import Registrar

T = TypeVar("T")

MAX_LINE = 64 * 1024
"""Maximum bytes of one line."""

MAX_LINES = 5_000_000
"""Maximum number of lines of one import."""

MAX_BYTES = 4 << 30
"""Maximum bytes of one import, decompressed."""

MAX_BAD = 10_000
"""Number of bad lines after which an import ends, because the file is probably the wrong one."""

AT_ONCE = 2
"""Maximum number of concurrent imports in one worker. Each uses up to `SLICE` seconds in every iteration of the event
loop."""

SLICE = 0.005
"""Seconds of work after which other calls run."""

MAX_REPORTED = 1000  # bad lines reported individually: a caller may send all lines before it reads anything

BATCH = 500
"""Number of models in one call to management, which divides them into transactions."""

BATCH_BYTES = 256 * 1024
"""Maximum bytes of a batch's lines. Their comparison with the registered models takes 12 ms."""

MAX_TYPES = 100
"""Maximum number of model types that an import counts: a caller may send a new one in each line."""

IN_FLIGHT = 4
"""Maximum number of concurrent batches of one import."""

_PROGRESS = 0.5  # seconds between lines of progress
_LOOK = 64  # short lines between two readings of the clock: 0.3 ms if all are bad
_LONG = 1024  # bytes of a line that may take 0.1 ms; 64 KiB take up to 10
_SHOWN = 256  # characters of an id in a report
_PIECE = 64 * 1024  # bytes cut into lines at once: 2 ms if all lines are empty

Write = Callable[[dict[str, Any]], Awaitable[None]]


@dataclass(slots=True)
class Totals:
    """The numbers of lines by outcome."""

    changed: int = 0
    unchanged: int = 0
    failed: int = 0

    def document(self, changed: str, unchanged: str) -> dict[str, Any]:
        """Returns the totals as a document for the caller, under the given names of the outcomes."""
        done = self.changed + self.unchanged + self.failed
        return {"done": done, changed: self.changed, unchanged: self.unchanged, "failed": self.failed}


class ImportPace:
    """Pauses for other calls, during work that has no pauses of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._until = self._loop.time() + SLICE

    async def rest(self) -> None:
        """Lets other calls run if this work has taken `SLICE` seconds since the last pause."""
        if self._loop.time() >= self._until:
            await asyncio.sleep(0)
            self._until = self._loop.time() + SLICE


class Bulk(abc.ABC, Generic[T]):
    """One stream of lines, each of which names one model. `write` sends one line of the answer."""

    outcomes: tuple[str, str]
    """The names of the two good outcomes: something was changed, and no change was needed."""

    def __init__(
        self,
        registration: "Registrar",
        write: Write,
        may: Callable[[str], None] = lambda _: None,
        *,
        untaken: Callable[[str], str] = lambda _: "",
        noted: Callable[[str, str], None] = lambda *_: None,
    ) -> None:
        """Makes a stream. `may` raises MeshError for a model that the caller may not change. `untaken` returns the
        reason why no pod accepts models of a type, or "". `noted` is called with each model that was changed or
        refused, and `OK` or the reason."""
        self._registration = registration
        self._may = may
        self._untaken = untaken
        self._noted = noted
        self._write = write
        self._totals = Totals()
        self._reported = 0
        self._running: set[asyncio.Task[None]] = set()
        self._bad = 0
        self._progress_at = 0.0

    async def run(self, lines: AsyncIterator[bytes]) -> None:
        """Carries out each line and writes the outcomes, followed by the totals.

        Ends early if the registry is unavailable, or if the stream exceeds a limit or cannot be read. The changes made
        until then remain, and the last line says `"finished": false`."""
        loop = asyncio.get_running_loop()
        self._progress_at = loop.time() + _PROGRESS
        pace = ImportPace()
        batch: list[tuple[int, T]] = []
        number = size = 0
        try:
            async for line in lines:
                number += 1
                if not number % _LOOK or len(line) > _LONG:
                    await pace.rest()
                if number > MAX_LINES:
                    raise _too_much(f"more than {MAX_LINES} lines")
                if not line or line.isspace():
                    continue
                try:
                    item = self.parse(line)
                except MeshError as error:
                    await self._fail(number, None, error)
                    self._bad += 1
                    if self._bad >= MAX_BAD:
                        text = f"{MAX_BAD} lines are not valid; those after line {number} are not read: check the file"
                        raise MeshError(Reason.BAD_REQUEST, text) from error
                    continue
                try:
                    self._may(self.model_of(item))
                except MeshError as error:
                    await self._fail(number, self.model_of(item), error)
                    continue
                batch.append((number, item))
                size += len(line)
                if len(batch) >= BATCH or size >= BATCH_BYTES:
                    await self._submit(batch)
                    batch, size = [], 0
                    if loop.time() >= self._progress_at:
                        self._progress_at = loop.time() + _PROGRESS
                        await self._write(self._totals.document(*self.outcomes))
            await self._submit(batch)
            await self._wait(0)
        except MeshError as error:
            await self._wait_quietly()
            await self._write({"error": {"line": None, "id": None, "reason": error.reason.name, "text": error.text}})
            await self._write({"finished": False, **self._totals.document(*self.outcomes)})
            return
        finally:
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)
        await self._write({"finished": True, **self._totals.document(*self.outcomes), **self.remarks()})

    def remarks(self) -> dict[str, Any]:
        """Returns further properties of the last line of the answer."""
        return {}

    @abc.abstractmethod
    def parse(self, line: bytes) -> T:
        """Parses a line. Raises MeshError."""

    @abc.abstractmethod
    def model_of(self, asked: T) -> str:
        """Returns the id of the model."""

    @abc.abstractmethod
    async def carry_out(self, asked: list[T]) -> Sequence[str | MeshError | None]:
        """Carries out several lines. For each line, returns None if it made a change, a text if no change was needed,
        or the error."""

    async def _submit(self, batch: list[tuple[int, T]]) -> None:
        if not batch:
            return
        await self._wait(IN_FLIGHT - 1)
        self._running.add(asyncio.create_task(self._batch(batch)))

    async def _wait(self, most: int) -> None:
        """Waits until at most `most` batches are under way. Raises the error of a batch that failed."""
        while len(self._running) > most:
            done, self._running = await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()

    async def _wait_quietly(self) -> None:
        results = await asyncio.gather(*self._running, return_exceptions=True)
        self._running.clear()
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, MeshError):
                raise result

    async def _batch(self, batch: list[tuple[int, T]]) -> None:
        fates = await self.carry_out([item for _, item in batch])
        away: MeshError | None = None
        for (number, item), fate in zip(batch, fates, strict=True):
            if fate is None:
                self._totals.changed += 1
                self._noted(self.model_of(item), OK)
            elif isinstance(fate, MeshError):
                await self._fail(number, self.model_of(item), fate)
                if fate.reason is Reason.REGISTRY_AWAY:
                    away = fate
            else:
                self._totals.unchanged += 1
        if away is not None:  # the rest would fail too, one timeout after another
            raise away

    async def _fail(self, number: int, model_id: str | None, error: MeshError) -> None:
        self._totals.failed += 1
        if model_id is not None:
            self._noted(model_id, error.reason.name)
        self._reported += 1
        if self._reported > MAX_REPORTED:
            return
        told = {"line": number, "id": model_id and model_id[:_SHOWN], "reason": error.reason.name, "text": error.text}
        await self._write({"error": told})


class Import(Bulk[Item]):
    """A stream of models to be registered."""

    outcomes = ("created", "existing")

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._types: Counter[str] = Counter()  # of the registered models

    def parse(self, line: bytes) -> Item:
        """Returns the model that a line describes. Raises MeshError."""
        return parse(line)

    def model_of(self, asked: Item) -> str:
        """Returns the id of the model."""
        return asked.model_id

    async def carry_out(self, asked: list[Item]) -> Sequence[str | MeshError | None]:
        """Registers models. Returns the outcome of each."""
        fates = await self._registration.register_many(asked)
        for item, fate in zip(asked, fates, strict=True):
            if not isinstance(fate, MeshError) and (item.type in self._types or len(self._types) < MAX_TYPES):
                self._types[item.type] += 1
        return [modeldocuments.different(fate) if isinstance(fate, DifferentError) else fate for fate in fates]

    def remarks(self) -> dict[str, Any]:
        """Returns the types of registered models that no pod accepts, so that no call can load these models."""
        untaken = [
            {"type": kind[:_SHOWN], "models": count, "text": why}
            for kind, count in self._types.items()
            if (why := self._untaken(kind))
        ]
        return {"untaken": untaken} if untaken else {}


class Removal(Bulk[str]):
    """A stream of models to be unregistered."""

    outcomes = ("unregistered", "missing")

    def parse(self, line: bytes) -> str:
        """Returns the id that a line names. Raises MeshError."""
        document = _object(line)
        modeldocuments.check_names(document, ("id",), "a removal")
        model_id = document.get("id")
        if not isinstance(model_id, str):
            raise MeshError(Reason.BAD_REQUEST, "id must be a string")
        return model_id

    def model_of(self, asked: str) -> str:
        """Returns the id of the model."""
        return asked

    async def carry_out(self, asked: list[str]) -> Sequence[str | MeshError | None]:
        """Unregisters models. Returns the outcome of each."""
        return await self._registration.unregister_many(asked)


def parse(line: bytes) -> Item:
    """Returns the model that a line describes. Raises MeshError."""
    document = _object(line)
    modeldocuments.check_names(document, ("id", *modeldocuments.MODEL), modeldocuments.MODELS)
    return modeldocuments.item_of(document, document.get("id"))


def _object(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE:
        raise MeshError(
            Reason.BAD_REQUEST, f"the line has {len(line)} bytes or more; a line for one model has at most {MAX_LINE}"
        )
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise MeshError(Reason.BAD_REQUEST, f"the line is not JSON: {error}") from error
    if not isinstance(item, dict):
        raise MeshError(Reason.BAD_REQUEST, "the line is not a JSON object")
    return item


def _too_much(what: str) -> MeshError:
    return MeshError(Reason.TOO_LARGE, f"{what} in one request: send the rest in another request")


async def bounded(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Passes on a stream in small pieces, with pauses. Raises MeshError once it has more than MAX_BYTES."""
    pace = ImportPace()
    total = 0
    async for chunk in chunks:
        total += len(chunk)
        if total > MAX_BYTES:
            raise _too_much(f"more than {MAX_BYTES} bytes")
        for start in range(0, len(chunk), _PIECE):
            await pace.rest()
            yield chunk[start : start + _PIECE]


async def lines_of(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Cuts a stream into lines. Of a line that is too long, keeps only as much as `parse` needs to refuse it."""
    rest = b""
    dropping = False  # within a line that is already too long
    async for chunk in chunks:
        lines = chunk.split(b"\n")
        lines[0] = rest + lines[0]
        rest = lines.pop()
        for line in lines:
            if dropping:
                dropping = False
                continue
            yield line
        if len(rest) > MAX_LINE:
            if not dropping:
                yield rest
            dropping, rest = True, b""
    if rest and not dropping:
        yield rest


async def gunzip(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Decompresses all members of a gzip stream, piece by piece. Raises MeshError."""
    inflater = inflate.Inflater(inflate.GZIP)
    try:
        async for chunk in chunks:
            for piece in inflater.feed(chunk):
                yield piece
        inflater.end()
    except inflate.InflateError as error:
        raise MeshError(Reason.BAD_REQUEST, f"the body is not valid gzip: {error}") from error
