"""Random troubles under traffic: no answer is wrong or stale, and everything works again when the troubles end."""

import asyncio
import contextlib
import re
import time

import pytest

from tests.chaos.history import History
from tests.chaos.run import Run
from tests.chaos.traffic import Caller, Numbers, Writer
from tests.chaos.ways import Grpc
from tests.support.arena import Arena
from tests.support.waiting import until


async def run(folder, say, *, seed: int, seconds: float, bounded: bool = False, **size: int) -> None:
    """Makes one run with a mesh, and fails on any fault. With `bounded`, pods serve without etcd only briefly, so ids
    can be registered again soon."""
    # About ten of the models fit into a pod: there are evictions, and loads all the time. Registrations are compared
    # often, so that a process that missed a removal finds out within a calm.
    serve, wait = ("4", "8") if bounded else ("forever", "600")
    options = {
        "capacity": "1MiB",
        "runtime_options": ["--check-interval", "2", "--hang-timeout", "5", "--serve-without-etcd", serve],
        # A long wait would hold up each change until a stopped agent goes on.
        "router_options": ["--unload-wait", "1", "--reregister-after", wait],
    }
    async with Arena(folder, ttl=3, **options, **size) as arena:
        run = Run(arena, seed, seconds)
        try:
            await run.run()
        finally:
            verdict = await run.verdict()
            verdict.write(folder / "history.jsonl")
            say(f"{verdict}\n  history: {folder / 'history.jsonl'}")
        assert not verdict.faults, verdict.story()


@pytest.mark.timeout(0)  # the run has time limits of its own
async def test_a_short_run(tmp_path, say):
    """Eight seconds of random troubles with a fixed seed, as in the long run, show no fault."""
    await run(tmp_path, say, seed=20, seconds=8, pods=2, routers=2)


@pytest.mark.chaos
@pytest.mark.timeout(0)  # the run has time limits of its own
async def test_chaos(tmp_path, say, seed, seconds):
    """Three routers and three pods survive random troubles without a fault, by default for ten minutes. With odd seeds,
    pods that are cut off serve only for seconds, so an id can soon be registered again."""
    await run(tmp_path, say, seed=seed, seconds=seconds, pods=3, routers=3, bounded=seed % 2 == 1)


LEASES = 10  # lease times for which etcd is away
MODELS = [f"m{number}" for number in range(8)]


@pytest.mark.chaos
@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", ["frozen", "killed", "all cut off"])
async def test_etcd_away_for_ten_lease_times(tmp_path, say, how):
    """Under traffic, etcd is unavailable to all for ten lease times. No call of a resident model fails, nothing is
    loaded again, and everything works afterwards."""
    async with Arena(tmp_path, pods=3, routers=2, ttl=3) as arena:
        reply = await arena.mesh.rest("PUT", "/mesh/v1/settings/type_limits", {"_default": {"max": 1}})
        assert reply.status == 200
        history = History()
        ways = [Grpc(arena, router) for router in arena.routers]
        writer = Writer(arena, history, ways, MODELS, Numbers(), 0)
        await writer.fill()
        async with contextlib.AsyncExitStack() as stack:
            for number, way in enumerate(ways * 2):
                caller = asyncio.create_task(Caller(history, way, MODELS, number).run())
                stack.callback(caller.cancel)

            async def settled() -> bool:
                held = [await arena.holders(model) for model in MODELS]
                return all(len(pods) == 1 for pods in held)

            async def called(count: int, why: str) -> None:
                goal = len(history.calls) + count
                await until(lambda: len(history.calls) >= goal, timeout=60, why=why)

            await until(settled, timeout=60, interval=0.2, why="one copy each")
            await called(200, "calls before")
            before, since = await loads(arena), len(history.calls)
            async with away(arena, how):
                end = time.monotonic() + LEASES * arena.ttl
                await until(lambda: time.monotonic() > end, timeout=LEASES * arena.ttl + 10)
                assert len(history.calls) > since
            await called(200, "calls as etcd is back")
            await arena.mesh.ready()
            await until(settled, timeout=60, interval=0.2, why="the copies are published again")
            await called(200, "calls after")
        say(f"etcd {how} for {LEASES} lease times: {len(history.calls) - since} calls")
        right = {model: float(value) for model, value in writer.standing.items()}
        assert [str(made) for made in history.calls[since:] if made.value != right[made.model]] == []
        assert await loads(arena) == before


@contextlib.asynccontextmanager
async def away(arena: Arena, how: str):
    """Makes etcd unavailable to all routers and pods."""
    match how:
        case "frozen":
            with arena.etcd_frozen():
                yield
        case "killed":
            arena.etcd.kill9()
            yield
            await arena.etcd.start()
        case "all cut off":
            with arena.cut_off(*arena.pods, *arena.routers):
                yield


async def loads(arena: Arena) -> dict[str, int]:
    """Returns the number of loads of each incarnation of a pod, as the pods count them."""
    found = {}
    for pod in (await arena.mesh.rest("GET", "/mesh/v1/pods")).json["pods"]:
        text = (await arena.mesh.get(f"http://{pod['probe']}/metrics")).body.decode()
        done = re.search(r"^modelmesh_loadmodel_milliseconds_count.* (\S+)$", text, re.MULTILINE)
        found[pod["incarnation"]] = int(float(done[1])) if done else 0
    return found
