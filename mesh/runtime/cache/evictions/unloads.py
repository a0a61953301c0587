"""One copy out of memory: first it answers no more, then its key goes, then its memory, then its files.

New calls must be answered *not here* before the mesh is told that the copy has gone, and the mesh is told before the
memory is free, because calls in flight may take their time. The order of the steps: the server is asked to unload (it
answers *not here* from that moment, and marks the slot so); as soon as the board shows it the key is deleted; the
server's answer means that the last call has ended and the memory is free; only then the bytes count as free and the
slot is given back.

Where a call in flight cannot be ended, the server says so; the copy then stays on the books as what it is, memory in
use, until the server's next life. If etcd is away the key goes later; the unload itself goes on.
"""

import asyncio
import time

from mesh.process.tasks import Tasks
from mesh.runtime.cache.books.decisions import Decisions
from mesh.runtime.cache.books.entries import Entry, State
from mesh.runtime.cache.books.ledger import Ledger
from mesh.runtime.cache.books.meters import Meters
from mesh.runtime.cache.books.space import Space
from mesh.runtime.cache.disk.files import Files
from mesh.runtime.presence.publishing import Presence
from mesh.runtime.servers.serverprocess import ServerProcess
from mesh.runtime.servers.spi import SpiError
from mesh.runtime.sharedmemory.slot import State as SlotState
from mesh.schema import copytoken
from mesh.telemetry import logs

log = logs.get(__name__)

GRACE = 30.0
"""Seconds that the server gives calls in flight; it ends them then."""

_TIMEOUT = GRACE + 12.0  # of one unload call
_RETRY = 10.0  # seconds between attempts at a copy that does not go
_LOOK_FIRST, _LOOK_MAX = 0.0005, 0.02  # seconds between two looks at the slot
_KEY_WAIT = 2.0  # seconds that whoever asked waits for the key to go


class _Going:
    """One unload under way."""

    __slots__ = ("entry", "silent", "task")

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.silent = asyncio.Event()  # set once no call is answered and the key has gone, or etcd is away
        self.task: asyncio.Task[None] | None = None


class Unloads:
    """Carries them out, one a copy."""

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
        self._going: dict[Entry, _Going] = {}
        self._tasks = Tasks()

    def start(self, entry: Entry, why: str) -> None:
        """Begins to unload a copy, or what a load has left. Nothing happens where that is under way."""
        if self.begin(entry):
            log.info("unloading", model=entry.model_id, why=why)
            self._decisions.note("unload", entry.model_id, why=why)

    def begin(self, entry: Entry, *, evicted: bool = False) -> bool:
        """Begins to unload a copy, and leaves it to the caller to say why. Returns whether that was not under way.
        `evicted`: it makes way for another, which some policies learn from."""
        if entry in self._going or entry not in self._ledger:
            return False
        self._ledger.enter(entry, State.UNLOADING, evicted=evicted)
        going = self._going[entry] = _Going(entry)
        going.task = self._tasks.start(self._unload(going), f"unload {entry.model_id}")
        return True

    async def take_out(self, entry: Entry) -> bool:
        """Takes a load out of the server that is to begin again: its entry, its key and its files stay. One attempt;
        returns whether nothing is left of it there."""
        return await self._free(entry)

    async def silent(self, model_id: str) -> None:
        """Returns once the unloads of that model under way have come so far that no call is answered."""
        for going in self._of(model_id):
            await going.silent.wait()

    async def gone(self, model_id: str) -> None:
        """Returns once nothing of the copies of that model that are being unloaded is left."""
        for going in self._of(model_id):
            if going.task is not None:
                await asyncio.wait({going.task})

    def _of(self, model_id: str) -> list[_Going]:
        return [going for going in self._going.values() if going.entry.model_id == model_id]

    def clear(self) -> None:
        """The server has died, and all memory with it: whoever waits goes on."""
        for going in list(self._going.values()):
            if going.task is not None:
                going.task.cancel()
            going.silent.set()
        self._going.clear()

    async def close(self) -> None:
        """Ends what is under way; the server frees the memory by ending."""
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
                if not entry.aside and self._ledger.aside_of(model_id) is None:  # else they are the other one's
                    await self._files.remove(model_id)
            except OSError as error:
                log.warning("files of a model were not removed", model=model_id, error=str(error))
        finally:
            going.silent.set()
            if self._going.get(entry) is going:
                del self._going[entry]
            if entry in self._ledger:
                self._ledger.remove(entry)
                self._space.freed()

    async def _free(self, entry: Entry) -> bool:
        """One attempt. Whether nothing of it is left in the server."""
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
        # A copy of which a call could not be ended is forgotten by the server, but the board shows it.
        use = self._ledger.use(entry)
        return use is None or use.state is SlotState.FREE

    async def _announce(self, going: _Going) -> None:
        """Waits until the server answers no more for the copy, then takes its key away."""
        entry, pause = going.entry, _LOOK_FIRST
        while going.task is not None and not going.task.done():
            use = self._ledger.use(entry)
            if use is None or use.state is not SlotState.LOADED:
                break
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, _LOOK_MAX)
        if not entry.aside:  # else the key is the other one's
            self._presence.drop(entry.model_id)
            await self._presence.settled(entry.model_id, _KEY_WAIT)
        going.silent.set()
