"""The unloading of copies: a copy stops answering, then its key is deleted, its memory freed, and its files removed.

The copy must answer new calls with *not here* before its key is deleted, and the key must be deleted before the memory
is free, because calls in flight may take long. First the agent asks the server to unload the copy. From then on the
server answers *not here*, and marks the copy's slot. As soon as the board shows the mark, the key is deleted. The
server's answer to the agent means that the last call has ended and that the memory is free. Only then do the bytes
count as free, and the slot is released.

If a call in flight cannot be ended, the server says so. The copy then stays on the books, as memory in use, until the
server is restarted. If etcd is unavailable, the key is deleted later; the unload itself continues.
"""

import asyncio
import time

from mesh.process.tasks import Tasks
from mesh.runtime.cache.books.decisions import Decisions
from mesh.runtime.cache.books.entries import CacheEntry, EntryState
from mesh.runtime.cache.books.ledger import Ledger
from mesh.runtime.cache.books.meters import Meters
from mesh.runtime.cache.books.space import Space
from mesh.runtime.cache.disk.files import Files
from mesh.runtime.presence.publishing import Presence
from mesh.runtime.servers.serverprocess import ServerProcess
from mesh.runtime.servers.spi import SpiError
from mesh.runtime.sharedmemory.slot import SlotState as SlotState
from mesh.schema import copytoken
from mesh.telemetry import logs

log = logs.get(__name__)

GRACE = 30.0
"""Seconds that calls in flight get before the server ends them."""

_TIMEOUT = GRACE + 12.0  # of one unload call
_RETRY = 10.0  # seconds between attempts at a copy that cannot be unloaded
_LOOK_FIRST, _LOOK_MAX = 0.0005, 0.02  # seconds between two looks at the slot
_KEY_WAIT = 2.0  # seconds that a caller waits for the key to be deleted


class _Going:
    """An unload under way."""

    __slots__ = ("entry", "silent", "task")

    def __init__(self, entry: CacheEntry) -> None:
        self.entry = entry
        self.silent = asyncio.Event()  # set once no call is answered, and the key is deleted or etcd is unavailable
        self.task: asyncio.Task[None] | None = None


class Unloads:
    """The unloads of one pod, at most one per copy."""

    def __init__(
        self,
        ledger: Ledger,
        server: ServerProcess,
        presence: Presence,
        files: Files,
        space: Space,
        *,
        incarnation: str,
        meters: Meters,
        decisions: Decisions,
    ) -> None:
        self._ledger = ledger
        self._server = server
        self._presence = presence
        self._files = files
        self._space = space
        self._incarnation = incarnation
        self._meters = meters
        self._decisions = decisions
        self._going: dict[CacheEntry, _Going] = {}
        self._tasks = Tasks()

    def start(self, entry: CacheEntry, why: str) -> None:
        """Begins to unload a copy, or the remains of a load, unless its unload is under way or it is gone."""
        if self.begin(entry):
            log.info("unloading", model=entry.model_id, why=why)
            self._decisions.note("unload", entry.model_id, why=why)

    def begin(self, entry: CacheEntry, *, evicted: bool = False) -> bool:
        """Begins to unload a copy. The caller notes the reason. Returns False if an unload of the copy is already under
        way, or if the copy is gone. `evicted` is True if the copy is evicted; some policies learn from evictions."""
        if entry in self._going or entry not in self._ledger:
            return False
        self._ledger.enter(entry, EntryState.UNLOADING, evicted=evicted)
        going = self._going[entry] = _Going(entry)
        going.task = self._tasks.start(self._unload(going), f"unload {entry.model_id}")
        return True

    async def take_out(self, entry: CacheEntry) -> bool:
        """Makes one attempt to remove from the server a load that will begin again. The load's entry, key and files
        stay. Returns whether nothing is left in the server."""
        return await self._free(entry)

    async def silent(self, model_id: str) -> None:
        """Waits until the model's copies that are being unloaded no longer answer calls, and a short time for the key
        to be deleted."""
        for going in self._of(model_id):
            await going.silent.wait()

    async def gone(self, model_id: str) -> None:
        """Waits until nothing is left of the model's copies that are being unloaded."""
        for going in self._of(model_id):
            if going.task is not None:
                await asyncio.wait({going.task})

    def _of(self, model_id: str) -> list[_Going]:
        return [going for going in self._going.values() if going.entry.model_id == model_id]

    def clear(self) -> None:
        """Ends all unloads, because the server has died, and its memory is gone."""
        for going in list(self._going.values()):
            if going.task is not None:
                going.task.cancel()
            going.silent.set()
        self._going.clear()

    async def close(self) -> None:
        """Cancels the unloads under way. The server frees the memory when it ends."""
        await self._tasks.close()

    async def _unload(self, going: _Going) -> None:
        entry, model_id = going.entry, going.entry.model_id
        began = time.monotonic()
        announcing = self._tasks.start(self._announce(going), f"withdraw {model_id}")
        try:
            stuck = 0
            while not await self._free(entry):
                stuck += 1
                self._meters.unload_attempt_failures.inc()
                if stuck == 1:
                    self._meters.unload_failures.inc()
                    log.error("a copy cannot be unloaded: its memory stays in use", model=model_id, bytes=entry.weight)
                await asyncio.sleep(_RETRY)
            self._meters.unload_ms.observe((time.monotonic() - began) * 1000)
            await asyncio.wait({announcing})
            try:
                if not entry.aside and self._ledger.aside_of(model_id) is None:  # the other one keeps them
                    await self._files.remove(model_id)
            except OSError as error:
                log.warning("the files of a model could not be removed", model=model_id, error=str(error))
        finally:
            going.silent.set()
            if self._going.get(entry) is going:
                del self._going[entry]
            if entry in self._ledger:
                self._ledger.remove(entry)
                self._space.freed()

    async def _free(self, entry: CacheEntry) -> bool:
        """Makes one attempt to unload a copy. Returns whether nothing of it is left in the server."""
        life = self._server.lives
        spi = await self._server.ready(0.0)
        if spi is None:
            return entry not in self._ledger
        token = copytoken.make(self._incarnation, entry.revision, entry.generation)
        try:
            await spi.unload(entry.model_id, copy=token, timeout=_TIMEOUT)
        except SpiError as error:
            if self._server.lives == life:
                log.warning("unloading failed", model=entry.model_id, error=error.text)
            return False
        # The server forgets a copy with a call that could not be ended, but the board shows it.
        use = self._ledger.use(entry)
        return use is None or use.state is SlotState.FREE

    async def _announce(self, going: _Going) -> None:
        """Waits until the server answers no more calls for the copy, then deletes its key."""
        entry, pause = going.entry, _LOOK_FIRST
        while going.task is not None and not going.task.done():
            use = self._ledger.use(entry)
            if use is None or use.state is not SlotState.LOADED:
                break
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, _LOOK_MAX)
        if not entry.aside:  # otherwise the key belongs to the other one
            self._presence.drop(entry.model_id)
            await self._presence.settled(entry.model_id, _KEY_WAIT)
        going.silent.set()
