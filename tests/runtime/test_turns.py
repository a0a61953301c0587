"""Turns of loads in the model server: callers first, then recently used models, and no turn is lost."""

import asyncio

import pytest

from mesh.runtime import turns
from mesh.runtime.turns import Turns


async def settle() -> None:
    """Runs the event loop until nothing more happens."""
    for _ in range(10):
        await asyncio.sleep(0)


class Loads:
    """Loads that end when the test says so."""

    def __init__(self, count: int, *, long: float | None = None) -> None:
        self.turns = Turns(count, long=long)
        self.long: list[str] = []
        self.begun: list[str] = []
        self.ends: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def begin(self, name: str, idle_ms: int = 0) -> None:
        self.ends[name] = asyncio.Event()
        self.tasks[name] = asyncio.ensure_future(self._run(name, idle_ms))
        await settle()

    async def _run(self, name: str, idle_ms: int) -> None:
        async with self.turns.turn(name, idle_ms=idle_ms, on_long=lambda: self.long.append(name)):
            self.begun.append(name)
            await self.ends[name].wait()

    async def end(self, name: str) -> None:
        self.ends[name].set()
        await settle()


async def test_callers_come_first_and_then_what_was_used_lately():
    """Loads with callers get their turn first, then recently used models. A queued load moves ahead when a caller joins
    it."""
    loads = Loads(1)
    await loads.begin("now")
    for name, idle in (("old", 5000), ("recent", 10), ("older", 9000), ("called", 0)):
        await loads.begin(name, idle)
    assert loads.begun == ["now"]
    assert loads.turns.statistics().queued == 4
    loads.turns.lift("older")
    loads.turns.lift("nobody")
    for name in ("now", "called", "older", "recent"):
        await loads.end(name)
    assert loads.begun == ["now", "called", "older", "recent", "old"]


async def test_who_is_cancelled_leaves_no_gap():
    """A load that is cancelled while it waits, or just as it gets its turn, does not occupy a turn."""
    loads = Loads(2)
    for name in ("a", "b", "c", "d", "e"):
        await loads.begin(name)
    loads.tasks["c"].cancel()
    await settle()
    await loads.end("a")
    assert loads.begun == ["a", "b", "d"]
    loads.ends["b"].set()
    await asyncio.sleep(0)
    loads.tasks["e"].cancel()
    await settle()
    await loads.end("d")
    await loads.begin("f")
    await loads.begin("g")
    assert loads.begun[-2:] == ["f", "g"]
    assert loads.turns.statistics().queued == 0


async def test_a_turn_that_lasts_gives_its_place_away_and_goes_on(monkeypatch: pytest.MonkeyPatch):
    """A long turn gives its place to the next load, up to a bound. Beyond it, the next load begins when one of the long
    turns ends."""
    monkeypatch.setattr(turns, "LENT", 2)
    loads = Loads(1, long=0.0)
    endless = [f"endless {number}" for number in range(3)]
    for name in endless:
        await loads.begin(name)
    assert loads.begun == loads.long == endless
    await loads.begin("good")
    assert "good" not in loads.begun  # of three long turns two have given their place away
    assert loads.turns.taken == 3
    await loads.end("endless 0")
    assert loads.begun[-1] == "good"
    for name in ("good", "endless 1", "endless 2"):
        await loads.end(name)
    assert loads.turns.taken == 0


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)])
async def test_places_that_were_given_away_come_back(monkeypatch: pytest.MonkeyPatch, order: tuple[int, ...]):
    """When turns that gave their places away end, in any order, the number of places is the same as before."""
    monkeypatch.setattr(turns, "LENT", 2)
    loads = Loads(2, long=0.0)
    for name in "abcd":
        await loads.begin(name)
    assert loads.begun == ["a", "b", "c", "d"]
    for index in order:
        await loads.end("abcd"[index])
    assert (loads.turns.taken, loads.turns._lent, loads.turns._overdue, loads.turns._free) == (0, 0, [], 2)


async def test_a_turn_that_ends_soon_is_not_long():
    loads = Loads(1, long=30.0)
    await loads.begin("a")
    await loads.begin("b")
    assert loads.begun == ["a"]
    await loads.end("a")
    await loads.end("b")
    assert loads.begun == ["a", "b"]
    assert not loads.long


async def test_a_load_apart_has_its_turn_alone() -> None:
    """A load that must run alone waits for the present turns to end, other loads wait for it, and all get their turn in
    the end."""
    loads = Loads(2)
    await loads.begin("first")
    alone = asyncio.Event()
    began: list[str] = []

    async def apart(name: str) -> None:
        async with loads.turns.apart(name):
            began.append(name)
            await alone.wait()

    tasks = [asyncio.ensure_future(apart(name)) for name in ("one", "two")]
    await settle()
    await loads.begin("later")
    assert (began, loads.begun) == ([], ["first"])
    await loads.end("first")
    assert (began, loads.begun) == (["one"], ["first"])
    assert loads.turns.taken == 1
    alone.set()
    await settle()
    await loads.end("later")
    await asyncio.gather(*tasks)
    assert began == ["one", "two"]
    assert loads.begun == ["first", "later"]
    for name in ("a", "b"):
        await loads.begin(name)
    assert loads.begun[-2:] == ["a", "b"], "both places are free again"
    for name in ("a", "b"):
        await loads.end(name)
    assert loads.turns.taken == 0


async def test_a_load_apart_that_is_given_up_holds_up_nobody() -> None:
    loads = Loads(2)
    await loads.begin("first")

    async def apart() -> None:
        async with loads.turns.apart("one"):
            raise AssertionError("not alone")

    task = asyncio.ensure_future(apart())
    await settle()
    await loads.begin("later")
    assert loads.begun == ["first"]
    task.cancel()
    await settle()
    assert loads.begun == ["first", "later"]
    for name in ("first", "later"):
        await loads.end(name)
    assert loads.turns.taken == 0


class Apart:
    """A load that must run alone."""

    def __init__(self, loads: Loads) -> None:
        self._turns = loads.turns
        self.begun = False
        self.end = asyncio.Event()
        self.task = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        async with self._turns.apart("apart"):
            self.begun = True
            await self.end.wait()


async def test_a_load_apart_holds_up_nobody_while_another_one_lasts() -> None:
    """While a long load runs, one that must run alone does not block others, or good loads would wait for both."""
    loads = Loads(1, long=0.0)
    await loads.begin("endless")
    apart = Apart(loads)
    await settle()
    for name in ("good", "better"):
        await loads.begin(name)
        await loads.end(name)
    assert (loads.begun, apart.begun) == (["endless", "good", "better"], False)
    await loads.end("endless")
    assert apart.begun
    apart.end.set()
    await apart.task
    assert loads.turns.taken == 0


async def test_a_load_apart_has_its_turn_though_there_is_always_one_that_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "APART", 0.0)
    loads = Loads(1, long=0.0)
    await loads.begin("endless")
    apart = Apart(loads)
    await settle()
    await loads.begin("another")
    assert loads.begun == ["endless"]
    await loads.end("endless")
    assert apart.begun
    apart.end.set()
    await apart.task
    await loads.end("another")
    assert loads.turns.taken == 0


async def test_a_load_apart_that_lasts_lets_others_go() -> None:
    """When a load that runs alone takes long, others continue, because its fault shows soon or not at all."""
    loads = Loads(1, long=0.0)
    apart = Apart(loads)
    await settle()
    assert apart.begun
    await loads.begin("good")
    assert loads.begun == ["good"]
    await loads.end("good")
    apart.end.set()
    await apart.task
    assert (loads.turns.taken, loads.turns._free) == (0, 1)


async def test_the_number_of_turns_changes_while_loads_run():
    """A lower number of turns takes effect as loads end, without a gap or an extra turn. A higher one begins waiting
    loads at once."""
    loads = Loads(3)
    for name in "abcde":
        await loads.begin(name)
    assert loads.begun == ["a", "b", "c"]
    loads.turns.resize(1)
    assert loads.turns.taken == 3
    await loads.end("a")
    await loads.end("b")
    assert loads.begun == ["a", "b", "c"]
    await loads.end("c")
    assert loads.begun == ["a", "b", "c", "d"]
    await loads.begin("f")
    loads.turns.resize(3)
    await settle()
    assert loads.begun == ["a", "b", "c", "d", "e", "f"]
    for name in "def":
        await loads.end(name)
    assert loads.turns.taken == 0
    for name in "ghij":
        await loads.begin(name)
    assert loads.begun[6:] == ["g", "h", "i"]
