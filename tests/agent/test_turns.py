"""Turns of the model server: callers first, whoever was used lately next, nobody lost."""

import asyncio

from mesh.runtime.turns import Turns


async def settle() -> None:
    """Lets everything happen that can."""
    for _ in range(10):
        await asyncio.sleep(0)


class Loads:
    """Loads that end when they are told to."""

    def __init__(self, count: int) -> None:
        self.turns = Turns(count)
        self.begun: list[str] = []
        self.ends: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def begin(self, name: str, idle_ms: int = 0) -> None:
        self.ends[name] = asyncio.Event()
        self.tasks[name] = asyncio.ensure_future(self._run(name, idle_ms))
        await settle()

    async def _run(self, name: str, idle_ms: int) -> None:
        async with self.turns.turn(name, idle_ms=idle_ms):
            self.begun.append(name)
            await self.ends[name].wait()

    async def end(self, name: str) -> None:
        self.ends[name].set()
        await settle()


async def test_callers_come_first_and_then_what_was_used_lately():
    """A load without a caller waits, until one comes for it."""
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
    """Neither while it waits nor at the moment in which its turn has come."""
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
