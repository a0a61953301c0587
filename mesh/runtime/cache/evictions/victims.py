"""The choice of the copies to evict in this pod. `placement.room` makes the choice.

Memory and disk use the same question and the same order of eviction. The latest questions and answers are kept for
`mesh replay`. `eviction` carries out the answers.
"""

import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace

from mesh.runtime.cache.books.entries import EntryState
from mesh.runtime.cache.books.ledger import Ledger
from placement import room
from placement.footprint import Footprint
from placement.replay import Question

QUESTIONS = 256
"""The number of questions that are kept. Each needs one or two kilobytes."""


class Victims:
    """The search for victims among the ledger's copies."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.questions: deque[tuple[Question, room.RoomDecision]] = deque(maxlen=QUESTIONS)  # the latest, about room

    def candidates(self, need: Footprint) -> list[str]:
        """Returns the models whose number of copies elsewhere must be known before room is made for `need`. Returns an
        empty list if `need` fits without evictions."""
        if self._ledger.fits(need):
            return []
        count = itertools.count(1)
        return [entry.model_id for entry in self._ledger.order(lambda entry: next(count) >= room.CANDIDATES)]

    def room_for(
        self,
        need: Footprint,
        *,
        idle_ms: int = 0,
        spares: Mapping[str, int] | None = None,
        keep: Collection[str] = (),
        for_whom: str = "",
        growing: Collection[str] | None = None,
    ) -> room.RoomDecision:
        """Decides which copies must be evicted so that `need` fits.

        `idle_ms` is the time since the last use of the model that needs the room, or 0 if a caller waits. `spares` is
        the number of copies in other pods, for each model asked about. `keep` has the keys of entries that are never
        victims. `growing` is given for a load that is in memory already and needs more: it has the keys of all such
        loads that wait. Such loads may use memory that is reserved for other loads, and their own memory does not
        become free before they have grown.
        """
        ledger = self._ledger
        need = need.on(device=ledger.has_device)
        free = ledger.free if growing is None else ledger.free + ledger.promised()
        busy = [
            room.ResidentCopy(
                entry.model_id,
                entry.footprint.host_bytes,
                0,
                busy_reason="growing" if growing and entry.key in growing else "loading",
                device_bytes=entry.footprint.device_bytes,
            )
            for entry in ledger.under_way()
            if entry.weight and entry.key not in keep and (growing is None or entry.state is not EntryState.WAITING)
        ]
        question = Question(for_whom, room.Need(need, free, ledger.capacity), idle_ms)
        return self._ask(question, self._look(spares, keep), spares, busy)

    def disk_room_for(
        self,
        short_bytes: int,
        *,
        idle_ms: int = 0,
        spares: Mapping[str, int] | None = None,
        for_whom: str = "",
        without: Collection[str] = (),
    ) -> room.RoomDecision:
        """Decides which copies must be evicted to free this many bytes of the disk, by the same rules as `room_for`.

        A pull under way counts with all the space that it may need. `without` has the keys of loads without files on
        disk, because they wait for space.
        """
        ledger, look = self._ledger, self._look(spares, (for_whom,))

        def on_disk(key: str) -> room.ResidentCopy:
            return replace(look(key), bytes=ledger.entries[key].disk_bytes, device_bytes=0)

        busy = [
            room.ResidentCopy(entry.model_id, entry.disk_bytes or short_bytes, 0, busy_reason=entry.state.value)
            for entry in ledger.entries.values()
            if entry.state is not EntryState.LOADED
            and (entry.disk_bytes or (entry.state is EntryState.PULLING and entry.key not in without))
        ]
        all_bytes = sum(entry.disk_bytes for entry in ledger.entries.values())
        question = Question(for_whom, room.Need.of_host(short_bytes, 0, max(short_bytes, all_bytes)), idle_ms)
        return self._ask(question, on_disk, spares, busy)

    def leaving_disk_bytes(self, promised: Collection[str]) -> int:
        """Returns the number of bytes on disk that copies being unloaded will soon free. Copies whose keys are in
        `promised` do not count, because their space is reserved for a load."""
        ledger = self._ledger
        return sum(
            entry.disk_bytes
            for entry in ledger.entries.values()
            if entry.state is EntryState.UNLOADING
            and entry.key not in promised
            and ledger.age(entry) < room.FRESH_MS / 1000
        )

    def _ask(
        self,
        question: Question,
        look: Callable[[str], room.ResidentCopy],
        spares: Mapping[str, int] | None,
        busy: Iterable[room.ResidentCopy],
    ) -> room.RoomDecision:
        looked: list[room.ResidentCopy] = []
        found = room.search(
            question.need,
            self._ledger.policy,
            look,
            idle_ms=question.idle_ms,
            spares=spares,
            busy=busy,
            on_looked=looked.extend,
        )
        if found.verdict is not room.RoomVerdict.FITS:
            self.questions.append((replace(question, held=tuple(looked)), found))
        return found

    def _look(self, spares: Mapping[str, int] | None, keep: Collection[str]) -> Callable[[str], room.ResidentCopy]:
        """Returns a function that reads a copy's present state."""
        ledger, now = self._ledger, self._ledger.now_ns()

        def look(key: str) -> room.ResidentCopy:
            entry = ledger.entries[key]
            use = ledger.use(entry)
            others = spares.get(key, 0) if spares else 0
            # The caller that it was loaded for has not called it yet.
            awaited = not entry.idle_ms and (use is None or not use.calls)
            return room.ResidentCopy(
                key,
                entry.footprint.host_bytes,
                ledger.idle_ms(entry),
                device_bytes=entry.footprint.device_bytes,
                in_flight=use.in_flight if use else 0,
                busy_reason="kept" if key in keep else "pinned" if entry.pinned else "",
                other_copies=others,
                standing=ledger.policy.standing(key, now=now, spare=others > 0),
                fresh=awaited and now - entry.loaded_ns < room.FRESH_MS * 1_000_000,
            )

        return look
