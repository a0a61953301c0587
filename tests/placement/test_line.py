"""The line of loads that wait for room: who comes first, who waits, and who gives way."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.footprint import Footprint
from placement.line import Fate, Step, WaitingLoad, look
from placement.room import FRESH_MS, Need, ResidentCopy, RoomDecision, RoomVerdict, make_room

FITS = RoomDecision(RoomVerdict.FITS, (), "free")
HASTY = RoomDecision(RoomVerdict.EVICT, ("a",), "evicts", hasty=True)
PASSES = RoomDecision(RoomVerdict.NO_ROOM, (), "busy", passes=True)
HOPELESS = RoomDecision(RoomVerdict.NO_ROOM, (), "kept")
TOO_LARGE = RoomDecision(RoomVerdict.TOO_LARGE, (), "too large")


def newcomer(key: str, place: int, least: int | None = 100, *, since_ms: int = 0) -> WaitingLoad[str]:
    return WaitingLoad(key, place, since_ms, None if least is None else Footprint(least))


def in_memory(key: str, place: int) -> WaitingLoad[str]:
    return WaitingLoad(key, place, 0, Footprint(100), in_memory=True)


def fates(
    waiters: list[WaitingLoad[str]], rooms: dict[str, RoomDecision], *, now_ms: int = FRESH_MS
) -> list[tuple[str, str]]:
    """Returns each waiter's key and fate, in the order of the steps."""
    return [(step.waiter.key, step.fate.value) for step in look(waiters, rooms.__getitem__, now_ms=now_ms)]


def test_who_is_in_memory_comes_first_then_newcomers_in_the_order_of_their_places() -> None:
    waiters = [newcomer("c", 3), newcomer("a", 1), in_memory("d", 4), in_memory("b", 2)]
    assert [key for key, _ in fates(waiters, dict.fromkeys("abcd", FITS))] == ["b", "d", "a", "c"]


@pytest.mark.parametrize(
    ("room", "fate"),
    [
        pytest.param(FITS, "goes", id="room"),
        pytest.param(PASSES, "waits", id="what is at work is in the way"),
        pytest.param(HOPELESS, "refused", id="what stays is in the way"),
        pytest.param(TOO_LARGE, "refused", id="larger than the pod"),
    ],
)
@pytest.mark.parametrize("waiter", [newcomer("m", 1), in_memory("m", 1)], ids=["newcomer", "in memory"])
def test_one_alone(waiter: WaitingLoad[str], room: RoomDecision, fate: str) -> None:
    assert fates([waiter], {"m": room}) == [("m", fate)]


def test_one_waits_a_moment_for_callers_on_their_way_and_no_longer() -> None:
    assert fates([newcomer("m", 1)], {"m": HASTY}, now_ms=FRESH_MS - 1) == [("m", "waits")]
    assert fates([newcomer("m", 1)], {"m": HASTY}, now_ms=FRESH_MS) == [("m", "goes")]


def test_one_without_room_lets_smaller_ones_pass_and_spares_the_question_for_larger_ones() -> None:
    waiters = [newcomer("large", 1, 500), newcomer("larger", 2, 501), newcomer("small", 3, 499)]
    assert fates(waiters, {"large": PASSES, "small": FITS}) == [("large", "waits"), ("small", "goes")]


def test_one_that_cannot_be_compared_is_asked_about_and_spares_nobody_the_question() -> None:
    waiters = [newcomer("a", 1, None), newcomer("b", 2, 500), newcomer("c", 3, None)]
    assert fates(waiters, dict.fromkeys("abc", PASSES)) == [("a", "waits"), ("b", "waits"), ("c", "waits")]


def test_a_waiter_for_callers_on_their_way_does_not_hold_up_one_that_has_waited_for_them() -> None:
    now = 10 * FRESH_MS
    waiters = [newcomer("back", 1, since_ms=now), newcomer("new", 2, since_ms=now), newcomer("old", 3)]
    assert fates(waiters, dict.fromkeys(["back", "old"], HASTY), now_ms=now) == [("back", "waits"), ("old", "goes")]


def test_no_room_for_one_in_memory_says_nothing_about_newcomers() -> None:
    """A load that is in memory and finds no room does not block newcomers, because a copy that it is about to replace
    may be evicted for them."""
    waiters = [in_memory("a", 1), newcomer("b", 2, 1000)]
    assert fates(waiters, {"a": PASSES, "b": FITS}) == [("a", "waits"), ("b", "goes")]


def test_of_those_that_wait_for_each_other_the_last_gives_way() -> None:
    waiters = [in_memory("a", 1), in_memory("b", 2), in_memory("c", 3), newcomer("d", 4)]
    rooms = {**dict.fromkeys("abc", HOPELESS), "d": PASSES}
    assert fates(waiters, rooms) == [("a", "waits"), ("b", "waits"), ("c", "gives way"), ("d", "waits")]


@pytest.mark.parametrize("room", [FITS, PASSES], ids=["goes", "waits"])
def test_none_gives_way_where_another_one_in_memory_has_hope(room: RoomDecision) -> None:
    waiters = [in_memory("a", 1), in_memory("b", 2), in_memory("c", 3)]
    found = fates(waiters, {"a": HOPELESS, "b": room, "c": HOPELESS})
    assert [fate for key, fate in found if key != "b"] == ["waits", "waits"]


# --- any order of events, on a pod that is nothing but sums


class Pod:
    """A pod with copies, loads in memory and newcomers, which carries out the line's answers at once."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held: dict[str, int] = {}  # bytes on the books by copy and load
        self.wants: dict[str, int] = {}  # total bytes by waiting load
        self.grown: dict[str, int] = {}  # bytes that each load will be measured to take
        self.copies: set[str] = set()  # keys of `held` that are loaded copies
        self.waiting: dict[str, WaitingLoad[str]] = {}
        self.told: list[str] = []
        self.places = 0

    def come(self, key: str, guess: int, size: int) -> None:
        self.wants[key], self.grown[key] = min(guess, size), size
        self._wait(key, self.places)
        self.places += 1

    def _wait(self, key: str, place: int, *, in_memory: bool = False) -> None:
        least = Footprint(self.wants[key] - self.held.get(key, 0))
        self.waiting[key] = WaitingLoad(key, place, 0, least, in_memory=in_memory)

    def loaded(self, key: str) -> None:
        """Measures a load, which then needs room for its measured size."""
        if self.grown[key] <= self.held[key]:
            self.copies.add(key)
            return
        self.wants[key] = self.grown[key]
        self.places += 1
        self._wait(key, self.places, in_memory=True)

    @property
    def loading(self) -> list[str]:
        """Returns the keys of the loads that are in the server."""
        return [key for key in self.held if key not in self.copies and key not in self.waiting]

    def ask(self, key: str) -> RoomDecision:
        waiter = self.waiting[key]
        held = [
            ResidentCopy(other, size, 1, busy_reason=self._busy(other, waiter))
            for other, size in self.held.items()
            if other != key
        ]
        need = self.wants[key] - self.held.get(key, 0)
        return make_room(Need.of_host(need, self.capacity - sum(self.held.values()), self.capacity), held)

    def _busy(self, other: str, waiter: WaitingLoad[str]) -> str:
        if other in self.copies:
            return ""
        return "growing" if waiter.in_memory and other in self.waiting else "loading"

    def serve(self) -> None:
        """Repeats the line's decisions until nothing changes, as the agent does whenever memory is freed."""
        while self._look():
            pass

    def _look(self) -> bool:
        changed = False
        for step in look(list(self.waiting.values()), self.ask, now_ms=FRESH_MS):
            key = step.waiter.key
            if step.fate is Fate.WAITS:
                continue
            changed = True
            waiter = self.waiting.pop(key)
            if step.fate is Fate.GOES:
                self._go(key, step)
            elif step.fate is Fate.GIVES_WAY:
                del self.held[key]
                self.wants[key] = self.grown[key]
                self._wait(key, waiter.place)
            else:
                self.told.append(f"{key} refused")
        return changed

    def _go(self, key: str, step: Step[str]) -> None:
        for victim in step.room.victims:
            del self.held[victim]
            self.copies.discard(victim)
        self.held[key] = self.wants[key]
        if step.waiter.in_memory:
            self.copies.add(key)
        self.told.append(f"{key} in memory" if step.waiter.in_memory else f"{key} goes")


EVENTS = st.lists(st.tuples(st.integers(1, 100), st.integers(1, 100), st.integers(0, 3)), min_size=1, max_size=20)


@given(events=EVENTS, pick=st.functions(like=lambda count: 0, returns=st.integers(0, 100), pure=True))
def test_everybody_goes_once_whatever_comes_and_ends_in_whatever_order(
    events: list[tuple[int, int, int]], pick: Callable[[int], int]
) -> None:
    pod = Pod(100)
    for number, (guess, size, ends) in enumerate(events):
        pod.come(f"m{number}", guess, size)
        pod.serve()
        for _ in range(ends):
            if loading := pod.loading:
                pod.loaded(loading[pick(number) % len(loading)])
                pod.serve()
            assert sum(pod.held.values()) <= pod.capacity, "the same room was promised twice"
    for number in range(200):
        pod.serve()
        if not (loading := pod.loading):
            break
        pod.loaded(loading[pick(number) % len(loading)])
    assert not pod.waiting, "a load waits though nothing is at work"
    assert not any(told.endswith("refused") for told in pod.told)
    assert len({told for told in pod.told if told.endswith("goes")}) == len(events)


def test_a_step_may_change_what_the_next_one_finds() -> None:
    """With room for one of two loads, the line asks about the second only after the first has taken the room."""
    free = [150]

    def ask(key: str) -> RoomDecision:
        return FITS if free[0] >= 100 else PASSES

    found = []
    for step in look([newcomer("a", 1), newcomer("b", 2)], ask, now_ms=0):
        if step.fate is Fate.GOES:
            free[0] -= 100
        found.append(step.fate)
    assert found == [Fate.GOES, Fate.WAITS]
