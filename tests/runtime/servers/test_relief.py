"""The replacement of a model server that has lost too many threads, and the refusal of loads meanwhile."""

import asyncio

from mesh.runtime.servers.relief import MOST, Relief
from tests.support.waiting import until


class Server:
    """A server that is replaced on request, as soon as the test permits it."""

    def __init__(self) -> None:
        self.stuck = 0
        self.replaced: list[str] = []
        self.end = asyncio.Event()

    async def replace(self, why: str, grace: float) -> None:
        self.replaced.append(why)
        await self.end.wait()


async def test_a_few_lost_threads_are_borne_and_more_are_not() -> None:
    """With more than `MOST` lost threads, the server is replaced. The pod refuses loads until the next server has lost
    none."""
    server = Server()
    relief = Relief(lambda: server.stuck, server, look=0.001)
    task = asyncio.create_task(relief.run())
    looked = 0

    def look() -> bool:
        nonlocal looked
        looked += 1
        return looked > 5

    for stuck in range(MOST + 1):
        server.stuck, looked = stuck, 0
        await until(look, why="the relief has looked")
        assert not server.replaced
        assert not relief.refusal
    server.stuck = MOST + 1
    await until(lambda: server.replaced, why="the server is replaced")
    assert f"{MOST + 1} loads and calls that cannot be ended" in relief.refusal
    server.end.set()
    await asyncio.sleep(0)
    assert relief.refusal
    server.stuck = 0
    await until(lambda: not relief.refusal, why="the next server has no lost threads")
    assert server.replaced == [f"had {MOST + 1} loads and calls that cannot be ended, and was replaced"]
    assert relief.count == 1
    task.cancel()
