"""Routers and pods that are cut off from etcd: once an id is registered again with another file, none of them answers
from the former one.

In each test a pod misses the removal of its model, and in most tests a router misses that the pod is gone. As long as
the pod may answer, registering the id again may be refused for that reason. Once the new registration is acknowledged,
every answer is judged.
"""

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.chaos.checker import judge
from tests.chaos.history import Call, Change, History, Outcome, file_name, number_of
from tests.chaos.traffic import Numbers, call, change
from tests.chaos.ways import Grpc
from tests.support import models
from tests.support.arena import Arena
from tests.support.waiting import until

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]

NUMBERS = Numbers()
ENOUGH = 20
"""Calls through one router. Before the fence existed, at least every second one was answered from the former file."""

CALLERS = 6  # of each router: a call through a router that cannot ask etcd takes as long as its deadline
TIMEOUT = 1.0  # seconds


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def arena(tmp_path_factory) -> AsyncIterator[Arena]:
    """A mesh of three routers and two pods, in which a model has at most one copy. Router-1 always reaches etcd. The
    tests cut off router-3, and cut off or stop a pod."""
    folder = tmp_path_factory.mktemp("fence")
    async with Arena(folder, pods=2, routers=3, router_options=["--unload-wait", "2"]) as arena:
        reply = await arena.mesh.rest("PUT", "/mesh/v1/settings/type_limits", {"_default": {"max": 1}})
        assert reply.status == 200
        yield arena


@pytest_asyncio.fixture(loop_scope="module")
async def scene(arena: Arena) -> AsyncIterator["Scene"]:
    """One model in one pod, called through all routers. After each test all answers are judged."""
    await arena.mesh.ready()
    scene = Scene(arena)
    await scene.begin()
    yield scene
    await arena.heal()
    for name in (*arena.pods, *arena.routers):
        if not arena.alive(name):
            arena.program(name).start()
    await scene.end()


class Scene:
    """One model, its registrations, and its calls through all routers, all of them recorded."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.history = History()
        self.model = ""
        self.pod = self.other = ""  # the pod with the copy, and the one without
        self.value = 0  # the registered value; 0 if there is none
        self._ways = {router: Grpc(arena, router) for router in arena.routers}
        self._callers: list[asyncio.Task[None]] = []

    async def begin(self) -> None:
        """Loads a model into one pod, and waits until all routers have called that copy."""
        self.model = f"m{NUMBERS.next()}"
        assert (await self.register("router-1")).outcome is Outcome.DONE
        for router in self.arena.routers:
            await self.answered(router)
            self._callers += [asyncio.create_task(self._call(router)) for _ in range(CALLERS)]
        (self.pod,) = await until(lambda: self.arena.holders(self.model), why="a copy is in etcd")
        (self.other,) = (pod for pod in self.arena.pods if pod != self.pod)

    async def end(self) -> None:
        """Checks that all routers call the model's last acknowledged registration, and that no earlier answer was
        wrong, stale or lost."""
        for task in self._callers:
            task.cancel()
        await asyncio.gather(*self._callers, return_exceptions=True)
        await self.arena.mesh.ready()
        for router in self.arena.routers:
            await self.answered(router)
        registry = await self.arena.registrations(number_of)
        own = {self.model: registry[self.model]}
        history = History(
            changes=[made for made in self.history.changes if made.model == self.model],
            calls=[made for made in self.history.calls if made.model == self.model],
            events=self.history.events,
        )
        faults = judge(history, own)
        if faults:
            story = "\n".join([*history.story(self.model, faults[0].at)])
            raise AssertionError(f"{len(faults)} of {len(history.calls)} answers, first: {faults[0]}\n{story}")

    async def call(self, router: str, *, timeout: float = TIMEOUT) -> Call:
        return await call(self.history, self._ways[router], self.model, timeout)

    async def _call(self, router: str) -> None:
        while True:
            await self.call(router)
            await asyncio.sleep(0.05)

    async def register(self, router: str) -> Change:
        """Makes one attempt to register the model with a new file."""
        value = NUMBERS.next()
        path = self.arena.mesh.write(file_name(self.model, value), models.constant(float(value)))
        sent = self._ways[router].register(self.model, path, load=False)
        made = await change(self.history, router, self.model, value, sent)
        if made.outcome is Outcome.DONE:
            self.value = value
        return made

    async def registered(self, router: str) -> None:
        """Registers the model unless it is registered, and retries until an attempt is acknowledged."""
        if self.value:
            return

        async def done() -> bool:
            return (await self.register(router)).outcome is Outcome.DONE

        await until(done, timeout=60, interval=0.2, why=lambda: f"acknowledged: {self.history.changes[-1]}")

    async def unregister(self, router: str) -> None:
        """Unregisters the model, which must be acknowledged."""
        made = await change(self.history, router, self.model, None, self._ways[router].unregister(self.model))
        assert made.outcome is Outcome.DONE, made
        self.value = 0

    async def some(self, router: str, count: int = ENOUGH) -> None:
        """Waits until that many more calls through a router have ended, whatever their outcome."""
        goal = self._made(router) + count
        await until(lambda: self._made(router) >= goal, timeout=90, why=f"calls through {router} end")

    def _made(self, router: str) -> int:
        return sum(made.router == router for made in self.history.calls)

    async def answered(self, router: str) -> None:
        """Waits until a router returns the answer of the last acknowledged registration."""

        async def right() -> bool:
            return (await self.call(router, timeout=3.0)).value == self.value

        await until(right, timeout=60, interval=0.1, why=lambda: f"{self.value}: {self.history.calls[-1]}")

    def note(self, text: str) -> None:
        self.history.note(time.monotonic(), text)


def refused_with_a_way_out(made: Change, pod: str) -> None:
    """Checks that an attempt to register was acknowledged, or refused with an error that names the pod that the id
    waits for, and a way out."""
    if made.outcome is not Outcome.DONE:
        assert "UNAVAILABLE" in made.text
        assert pod in made.text
        assert "forget" in made.text


@pytest.mark.long
async def test_a_pod_without_its_agent_and_a_router_without_etcd(arena, scene):
    """Router-3 is cut off from etcd. The agent of the pod with the copy is stopped while the pod's model server keeps
    running. Router-3 gives no stale answer."""
    agent = arena.program(scene.pod).pid
    with arena.cut_off("router-3"):
        with arena.stopped(agent):
            scene.note(f"router-3 is cut off, {scene.pod}'s agent stopped")
            await arena.gone(scene.pod)
            scene.note(f"{scene.pod}'s lease has ended")
            await scene.unregister("router-1")
            refused_with_a_way_out(await scene.register("router-1"), scene.pod)
            await scene.some("router-3")
        scene.note(f"{scene.pod}'s agent goes on")
        await scene.registered("router-1")
        await scene.some("router-3")


@pytest.mark.chaos
async def test_a_worker_that_resumes_when_etcd_is_silent(arena, scene):
    """The worker of router-3 is stopped, misses all changes, and finds etcd silent when it resumes. It gives no stale
    answer."""
    with arena.stopped(arena.program(scene.pod).pid), contextlib.ExitStack() as stack:
        # The parent process is stopped too, because it would replace a worker that is stopped.
        with arena.stopped(arena.program("router-3").pid, *arena.workers("router-3")):
            await arena.gone(scene.pod)
            await scene.unregister("router-1")
            refused_with_a_way_out(await scene.register("router-1"), scene.pod)
            stack.enter_context(arena.etcd_frozen())
            scene.note("etcd is frozen, router-3's worker goes on")
        await scene.some("router-3")
    scene.note(f"etcd and {scene.pod}'s agent go on")
    await scene.registered("router-1")
    await scene.some("router-3")


@pytest.mark.chaos
async def test_an_agent_that_goes_on_after_a_long_stop(arena, scene):
    """An agent that continues after a long stop, with a copy of a removed registration, gives no stale answer to
    routers that see all changes."""
    with arena.stopped(arena.program(scene.pod).pid):
        await arena.gone(scene.pod)
        await scene.unregister("router-1")
        refused_with_a_way_out(await scene.register("router-1"), scene.pod)
    scene.note(f"{scene.pod}'s agent goes on")
    await scene.registered("router-1")
    for router in arena.routers:
        await scene.some(router)


@pytest.mark.chaos
async def test_a_pod_that_goes_on_after_a_long_stop(arena, scene):
    """Calls that a stopped pod received get no stale answer when its model server continues before its agent does."""
    agent, servers = arena.program(scene.pod).pid, arena.servers(scene.pod)
    with arena.cut_off("router-3"):
        with arena.stopped(agent):
            with arena.stopped(*servers):
                await arena.gone(scene.pod)
                await scene.unregister("router-1")
                refused_with_a_way_out(await scene.register("router-1"), scene.pod)
                waiting = [asyncio.create_task(scene.call("router-3", timeout=20)) for _ in range(5)]
                await scene.some("router-3", 2 * CALLERS)  # these were sent after the first ones
            scene.note(f"{scene.pod}: the server goes on, the agent does not")
            await scene.some("router-3")
        await asyncio.gather(*waiting)
    await scene.registered("router-1")


@pytest.mark.chaos
async def test_a_pod_that_was_forgotten_comes_back(arena, scene):
    """An operator takes a stopped pod for lost and deletes its lives, so the new registration does not wait for the
    pod. When the pod continues, it gives no stale answer."""
    with arena.cut_off("router-3"), arena.stopped(arena.program(scene.pod).pid, *arena.servers(scene.pod)):
        await arena.gone(scene.pod)
        await scene.unregister("router-1")
        refused_with_a_way_out(await scene.register("router-1"), scene.pod)
        forgotten = await arena.mesh.rest("DELETE", f"/mesh/v1/pods/{scene.pod}/lives")
        assert forgotten.status == 200, forgotten.body
        await scene.registered("router-1")
        scene.note(f"{scene.pod} is forgotten, {scene.model} registered")
    scene.note(f"{scene.pod} goes on")
    for router in arena.routers:
        await scene.some(router)


@pytest.mark.chaos
async def test_a_pod_and_a_router_that_are_alive_and_cut_off(arena, scene):
    """A pod and a router that are both cut off keep serving without etcd, and no call fails. They give no stale answer
    once the id is registered again elsewhere."""
    with arena.cut_off("router-3", scene.pod):
        await arena.gone(scene.pod)
        await scene.some("router-3", 100)
        failed = [str(made) for made in scene.history.calls if made.value is None]
        assert failed == []
        await scene.unregister("router-1")
        refused_with_a_way_out(await scene.register("router-1"), scene.pod)
        await scene.some("router-3")
    await scene.registered("router-1")
    await scene.some("router-3")


@pytest.mark.chaos
async def test_a_pod_that_drains_for_a_router_that_does_not_know(arena, scene):
    """A draining pod cannot end because of a call in flight. It gives no stale answer to router-3, which does not hear
    that the pod's copies are withdrawn."""
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(arena.stopped(arena.program(scene.other).pid))  # otherwise this pod would get the copies
        await arena.gone(scene.other)
        client = arena.client("router-1")
        await arena.mesh.register(f"{scene.model}-slow", models.slow(), load=True)
        slow = asyncio.create_task(client.infer(f"{scene.model}-slow", timeout=60, **models.slow_inputs(8.0)))
        stack.callback(slow.cancel)

        async def running() -> bool:
            pod = (await arena.mesh.rest("GET", f"/mesh/v1/pods/{scene.pod}")).json
            return any(copy["in_flight"] for copy in pod["copies"] if copy["model_id"].endswith("-slow"))

        await until(running, timeout=20, interval=0.05, why="the long call runs")
        stack.enter_context(arena.cut_off("router-3"))
        arena.program(scene.pod).signal(signal.SIGTERM)
        scene.note(f"{scene.pod} is told to leave")

        async def withdrawn() -> bool:
            return not await arena.holders(scene.model)

        await until(withdrawn, timeout=20, why="the keys of the copies are deleted")
        await scene.unregister("router-1")
        refused_with_a_way_out(await scene.register("router-1"), scene.pod)
        await scene.some("router-3")
        await until(lambda: not arena.alive(scene.pod), timeout=40, why=f"{scene.pod} ends")
        with contextlib.suppress(Exception):
            await slow
    arena.program(scene.pod).start()
    await scene.registered("router-1")
