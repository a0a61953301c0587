"""Troubles of a mesh: processes that stop, die or leave, broken connections to etcd, and etcd itself.

Each trouble is a context manager: it harms on entering and heals on leaving. It claims its target, so no two troubles
share one; all others may overlap. A seeded generator draws the kind, target and length of each trouble. A seed
therefore gives the same sequence of draws, but not the same interleaving, which depends on the mesh's timing.
"""

import contextlib
import os
import random
import signal
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass

from tests.support.arena import Arena
from tests.support.waiting import until

LEAVING = 60.0
"""Seconds within which a draining pod must have ended, even if it has to wait for its calls, its server and etcd."""


@dataclass(frozen=True, slots=True)
class Trouble:
    text: str
    claims: frozenset[str]  # the targets: pods, routers, `etcd`, and `NAME/road`
    seconds: float  # the length of the trouble
    harm: Callable[[], contextlib.AbstractAsyncContextManager[None]]


def draw(random: random.Random, arena: Arena, taken: Iterable[str] = ()) -> Trouble | None:
    """Draws the next trouble. Returns None if its target is taken, or if no pod or no router would be left unharmed to
    answer calls."""
    make = random.choices([make for make, _ in _KINDS], [weight for _, weight in _KINDS])[0]
    # From instants up to five lease times: shorter than a lease, and longer than anything that waits for one.
    trouble = make(random, arena, random.choice((0.3, 1.0, 5.0)) * arena.ttl * random.uniform(0.4, 1.0))
    after = frozenset(taken) | trouble.claims
    if trouble.claims & frozenset(taken) or after.issuperset(arena.pods) or after.issuperset(arena.routers):
        return None
    return trouble


# --- pods ---


def _agent_stopped(random: random.Random, arena: Arena, seconds: float) -> Trouble:
    pod = random.choice(arena.pods)
    return _stop(arena, f"{pod}: agent stopped", pod, seconds, lambda: arena.own(pod))


def _server_stopped(random: random.Random, arena: Arena, seconds: float) -> Trouble:
    pod = random.choice(arena.pods)
    return _stop(arena, f"{pod}: server stopped", pod, seconds, lambda: arena.servers(pod))


def _pod_stopped(random: random.Random, arena: Arena, seconds: float) -> Trouble:
    pod = random.choice(arena.pods)
    pids = lambda: [*arena.own(pod), *arena.servers(pod)]  # noqa: E731
    return _stop(arena, f"{pod}: agent and server stopped", pod, seconds, pids)


def _server_killed(random: random.Random, arena: Arena, seconds: float) -> Trouble:
    pod = random.choice(arena.pods)
    return _kill(f"{pod}: server killed", pod, lambda: arena.servers(pod))


def _agent_killed(random: random.Random, arena: Arena, seconds: float) -> Trouble:
    return _restart(arena, "agent killed", random.choice(arena.pods), seconds)


def _pod_drained(random: random.Random, arena: Arena, seconds: float) -> Trouble:
    pod = random.choice(arena.pods)

    @contextlib.asynccontextmanager
    async def harm() -> AsyncIterator[None]:
        arena.program(pod).signal(signal.SIGTERM)
        try:
            yield
        finally:
            await until(lambda: not arena.alive(pod), timeout=LEAVING, why=f"{pod} leaves")
            arena.program(pod).start()

    return Trouble(f"{pod}: told to leave", frozenset({pod}), seconds, harm)


# --- routers ---


def _worker_stopped(random: random.Random, arena: Arena, seconds: float) -> Trouble:
    router = random.choice(arena.routers)
    return _stop(arena, f"{router}: worker stopped", router, seconds, lambda: arena.workers(router))


def _parent_stopped(random: random.Random, arena: Arena, seconds: float) -> Trouble:
    router = random.choice(arena.routers)
    return _stop(arena, f"{router}: parent stopped", router, seconds, lambda: arena.own(router))


def _router_stopped(random: random.Random, arena: Arena, seconds: float) -> Trouble:
    router = random.choice(arena.routers)
    pids = lambda: [*arena.own(router), *arena.workers(router)]  # noqa: E731
    return _stop(arena, f"{router}: parent and worker stopped", router, seconds, pids)


def _worker_killed(random: random.Random, arena: Arena, seconds: float) -> Trouble:
    router = random.choice(arena.routers)
    return _kill(f"{router}: worker killed", router, lambda: arena.workers(router))


def _router_killed(random: random.Random, arena: Arena, seconds: float) -> Trouble:
    # Not for long: refused connections teach little.
    return _restart(arena, "killed", random.choice(arena.routers), min(seconds, 1.0))


def _envoy_stopped(random: random.Random, arena: Arena, seconds: float) -> Trouble:
    router = random.choice(arena.routers)
    return _stop(arena, f"{router}: Envoy stopped", router, seconds, lambda: arena.envoys(router))


# --- etcd and the roads to it ---


def _etcd_frozen(random: random.Random, arena: Arena, seconds: float) -> Trouble:
    @contextlib.asynccontextmanager
    async def harm() -> AsyncIterator[None]:
        with arena.etcd_frozen():
            yield

    return Trouble("etcd: frozen", frozenset({"etcd"}), seconds, harm)


def _etcd_killed(random: random.Random, arena: Arena, seconds: float) -> Trouble:
    @contextlib.asynccontextmanager
    async def harm() -> AsyncIterator[None]:
        arena.etcd.kill9()
        try:
            yield
        finally:
            await arena.etcd.start()

    return Trouble("etcd: killed", frozenset({"etcd"}), seconds, harm)


def _cut_off(random: random.Random, arena: Arena, seconds: float) -> Trouble:
    """Cuts off one pod or one router from etcd, or one of each, which can still reach each other."""
    drop = random.random() < 0.5
    names = [random.choice([*arena.pods, *arena.routers])]
    if random.random() < 0.5:
        names = [random.choice(arena.pods), random.choice(arena.routers)]

    @contextlib.asynccontextmanager
    async def harm() -> AsyncIterator[None]:
        with arena.cut_off(*names, drop=drop):
            yield

    text = f"{', '.join(names)}: cut off from etcd" + (", what is held up is lost" if drop else "")
    return Trouble(text, _roads(*names), seconds, harm)


def _unheard(random: random.Random, arena: Arena, seconds: float) -> Trouble:
    name = random.choice([*arena.pods, *arena.routers])

    @contextlib.asynccontextmanager
    async def harm() -> AsyncIterator[None]:
        arena.roads[name].swallow_answers()
        try:
            yield
        finally:
            arena.roads[name].flow()

    return Trouble(f"{name}: etcd's answers do not arrive", _roads(name), seconds, harm)


def _slow_road(random: random.Random, arena: Arena, seconds: float) -> Trouble:
    name, delay = random.choice([*arena.pods, *arena.routers]), random.choice((0.05, 0.2, 0.6))

    @contextlib.asynccontextmanager
    async def harm() -> AsyncIterator[None]:
        arena.roads[name].delay = delay
        try:
            yield
        finally:
            arena.roads[name].delay = 0.0

    return Trouble(f"{name}: {delay:g} s to etcd, each way", _roads(name), seconds, harm)


def _broken_road(random: random.Random, arena: Arena, seconds: float) -> Trouble:
    name = random.choice([*arena.pods, *arena.routers])

    @contextlib.asynccontextmanager
    async def harm() -> AsyncIterator[None]:
        arena.roads[name].cut()
        yield

    return Trouble(f"{name}: connections to etcd broken", _roads(name), 0.1, harm)


def _partition(random: random.Random, arena: Arena, seconds: float) -> Trouble:
    """Combines a router that hears nothing from etcd with a pod whose server keeps running while its agent is
    stopped."""
    router, pod = random.choice(arena.routers), random.choice(arena.pods)

    @contextlib.asynccontextmanager
    async def harm() -> AsyncIterator[None]:
        with arena.cut_off(router), arena.stopped(*arena.own(pod)):
            yield

    claims = _roads(router) | {pod}
    return Trouble(f"{router}: cut off from etcd, and {pod}: agent stopped", claims, seconds, harm)


_KINDS = (
    (_agent_stopped, 3),
    (_server_stopped, 1),
    (_pod_stopped, 2),
    (_server_killed, 1),
    (_agent_killed, 2),
    (_pod_drained, 2),
    (_worker_stopped, 1),
    (_parent_stopped, 2),
    (_router_stopped, 1),
    (_worker_killed, 1),
    (_router_killed, 1),
    (_envoy_stopped, 1),
    (_etcd_frozen, 2),
    (_etcd_killed, 1),
    (_cut_off, 5),
    (_unheard, 1),
    (_slow_road, 2),
    (_broken_road, 1),
    (_partition, 5),
)
"""The kinds of trouble, with the relative frequency of each."""


# --- how ---


def _roads(*names: str) -> frozenset[str]:
    return frozenset(f"{name}/road" for name in names)


def _stop(arena: Arena, text: str, target: str, seconds: float, pids: Callable[[], list[int]]) -> Trouble:
    @contextlib.asynccontextmanager
    async def harm() -> AsyncIterator[None]:
        with arena.stopped(*pids()):
            yield

    return Trouble(text, frozenset({target}), seconds, harm)


def _kill(text: str, target: str, pids: Callable[[], list[int]]) -> Trouble:
    @contextlib.asynccontextmanager
    async def harm() -> AsyncIterator[None]:
        for pid in pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        yield

    return Trouble(text, frozenset({target}), 0.1, harm)


def _restart(arena: Arena, text: str, target: str, seconds: float) -> Trouble:
    @contextlib.asynccontextmanager
    async def harm() -> AsyncIterator[None]:
        arena.program(target).kill9()
        try:
            yield
        finally:
            arena.program(target).start()

    return Trouble(f"{target}: {text}", frozenset({target}), seconds, harm)
