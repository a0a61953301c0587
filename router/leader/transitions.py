"""The moves of virtual models to their targets, without a failed call.

A vmodel moves while its record names a target other than its active model. The leader has copies of the target loaded
(`moving`), then makes the target the active model in the record. Until then the old active model serves. The record and
the view contain everything that a move needs, so if a leader dies, the next one continues.

If the target cannot be loaded, the active model keeps serving, and the record says why. The load is retried after a
back-off. It is retried sooner if the target gets a copy, or if the target's registration changes, because this may have
removed the cause.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from mesh.etcd import EtcdError
from mesh.process.tasks import Tasks
from mesh.statuses import MeshError
from mesh.telemetry import logs
from placement.vmodels import changes
from placement.vmodels.changes import Change, Models
from placement.vmodels.record import VModelRecord
from router.leader.moving import Loads, MoveNotes
from router.state.registry import Registration, Registry
from router.vmodels.store import VModelStore

log = logs.get(__name__)

INTERVAL = 0.5
"""Seconds between two checks for moves whose back-off is over, if the feed reports no change."""

AT_ONCE = 32
"""Maximum number of vmodels moved at the same time."""

REST = 10.0
"""Seconds of back-off for a move whose target could not be loaded; doubled after each further failure."""

REST_MOST = 600.0
"""Longest back-off of a move, in seconds."""

CHECK = 5.0
"""Seconds between two reads of the registration of a target that could not be loaded."""

_AGAIN = 1.0  # shortest pause before a retry, in seconds


class Records(Protocol):
    """The records of vmodels that the feed reports."""

    @property
    def get(self) -> Callable[[str], VModelRecord | None]:
        """A function that returns the record of a vmodel, or None if the vmodel does not exist."""

    def names(self) -> list[str]:
        """Returns the names of all vmodels."""

    def listen(self, listener: Callable[[str], None]) -> None:
        """Calls the listener with the name of each vmodel that is created, changed or deleted."""


_Names = tuple[str, str, str]
"""The names in a move: vmodel, active model, target."""


@dataclass(frozen=True, slots=True)
class TransitionsStatistics:
    """Counts of moves."""

    moving: int  # now
    parked: int  # now: their targets could not be loaded
    moved: int  # so far
    failures: int  # so far, each attempt


class Parked:
    """A move whose target could not be loaded."""

    def __init__(self, pause: float, target: Registration | None) -> None:
        self.pause = pause  # seconds
        self.since = self.checked = time.monotonic()
        self.until = self.since + pause
        self.modified = 0 if target is None else target.modified  # revision of the target's record; 0: unknown
        self.checking = False


class Transitions:
    """The moves of one leader."""

    def __init__(self, *, records: Records, loads: Loads, registry: Registry, store: VModelStore) -> None:
        self._records = records
        self._loads = loads
        self._registry = registry
        self._store = store
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._candidates: set[str] = set()  # vmodels that move, or have just changed
        self._news = asyncio.Event()
        self._moves: dict[str, asyncio.Task[None]] = {}
        self._parked: dict[_Names, Parked] = {}
        self._tasks = Tasks()
        self._moved = self._failures = 0
        records.listen(self._on_change)

    def moving(self) -> list[str]:
        """Returns the vmodels being moved now."""
        return list(self._moves)

    def statistics(self) -> TransitionsStatistics:
        """Returns the current counts of moves."""
        return TransitionsStatistics(len(self._moves), len(self._parked), self._moved, self._failures)

    async def run(self) -> None:
        """Starts the moves that are due, after each change of a vmodel and every INTERVAL seconds, until cancelled."""
        self._candidates.update(self._records.names())
        self._parked.clear()  # another leader may have made progress
        while True:
            self._news.clear()
            self.round()
            try:
                async with asyncio.timeout(INTERVAL):
                    await self._news.wait()
            except TimeoutError:
                pass

    def round(self) -> None:
        """Starts the moves that are due and whose back-off is over."""
        for vmodel_id in list(self._candidates):
            record = self._records.get(vmodel_id)
            if record is None or not record.moving:
                self._candidates.discard(vmodel_id)
                continue
            if vmodel_id not in self._moves and self._due((vmodel_id, record.active, record.target)):
                task = self._tasks.start(self._move(vmodel_id, record), f"move {vmodel_id}")
                self._moves[vmodel_id] = task
                task.add_done_callback(lambda _, vmodel_id=vmodel_id: self._ended(vmodel_id))  # type: ignore[misc]
        moves = {(name, record.active, record.target) for name, record in self._present()}
        self._parked = {names: parked for names, parked in self._parked.items() if names in moves}

    async def close(self) -> None:
        """Stops the moves in progress. Agents continue the loads that they were asked for."""
        await self._tasks.close()

    def _present(self) -> list[tuple[str, VModelRecord]]:
        found = ((name, self._records.get(name)) for name in self._candidates)
        return [(name, record) for name, record in found if record is not None]

    def _on_change(self, vmodel_id: str) -> None:
        self._candidates.add(vmodel_id)
        self._news.set()

    def _ended(self, vmodel_id: str) -> None:
        self._moves.pop(vmodel_id, None)
        self._news.set()  # it may have been given another target meanwhile

    def _due(self, names: _Names) -> bool:
        """Returns whether a move should be tried now. From time to time, starts a check of a parked move's target."""
        parked = self._parked.get(names)
        now = time.monotonic()
        if parked is None or parked.until <= now:
            return True
        if now - parked.since >= _AGAIN and self._loads.active(names[2]).loaded:
            return True  # a call, or another request, has had the target loaded
        if now - parked.checked >= CHECK and not parked.checking:
            parked.checking = True
            self._tasks.start(self._check(names[2], parked), f"check {names[2]}")
        return False

    async def _check(self, target: str, parked: Parked) -> None:
        """Ends the back-off of a move if the registration of its target has changed since the failed load."""
        try:
            registration = await self._registry.read(target, fresh=True)
            if (0 if registration is None else registration.modified) != parked.modified:
                parked.until = 0.0
                self._news.set()
        except MeshError as error:
            log.debug("a vmodel's target is not checked", model=target, why=error.text)
        finally:
            parked.checked, parked.checking = time.monotonic(), False

    # --- one move ---

    async def _move(self, vmodel_id: str, record: VModelRecord) -> None:
        """Works on the move of a vmodel until it is complete, has failed, or was replaced by another move."""
        notes = MoveNotes()
        active, target = record.active, record.target
        async with self._turns:
            try:
                while (now := self._records.get(vmodel_id)) is not None and (now.active, now.target) == (
                    active,
                    target,
                ):
                    registration = await self._registry.read(target, fresh=True)
                    if registration is None:
                        await self._park(vmodel_id, record, None, f"model {target} is not registered")
                        return
                    if changes.due(now, self._loads.active(active), self._loads.target(registration), notes.most):
                        await self._finish(vmodel_id, record, registration)
                        return
                    why = await self._loads.load(registration, active, notes)
                    if why is not None:
                        await self._park(vmodel_id, record, registration, why)
                        return
                    await asyncio.sleep(notes.pause())
            except (EtcdError, MeshError) as error:
                log.info("a vmodel's move is postponed", vmodel=vmodel_id, why=str(error))
                parked = self._parked[vmodel_id, active, target] = Parked(_AGAIN, None)
                parked.checked += CHECK

    async def _finish(self, vmodel_id: str, record: VModelRecord, registration: Registration) -> None:
        def decide(before: VModelRecord | None, models: Models) -> Change:
            return changes.finish_move(before, models, record.active, record.target)

        change, _ = await self._store.change(vmodel_id, decide)
        if not change.nothing:
            self._moved += 1
            log.info("a vmodel has moved", vmodel=vmodel_id, before=record.active, after=record.target)
        self._parked.pop((vmodel_id, record.active, record.target), None)

    async def _park(self, vmodel_id: str, record: VModelRecord, target: Registration | None, why: str) -> None:
        """Records why the target could not be loaded, and starts a back-off."""
        self._failures += 1
        names = (vmodel_id, record.active, record.target)
        before = self._parked.get(names)
        pause = min(REST if before is None else max(REST, 2 * before.pause), REST_MOST)
        log.warning("a vmodel's target was not loaded; its active model stays", vmodel=vmodel_id, why=why, rest=pause)
        await self._store.change(
            vmodel_id, lambda before, _: changes.park_move(before, record.active, record.target, why)
        )
        target = await self._registry.read(record.target, fresh=True) if target is not None else None
        self._parked[names] = Parked(pause, target)
