"""Troubles of pods and their model servers. A trouble harms one pod, or no pod if calls need not fail because of it. No
two pods of a kind are harmed at the same time."""

import contextlib
import os
import random
import signal
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass

from tests.foreign.copies import Copies
from tests.foreign.fleet import Fleet


@dataclass(frozen=True, slots=True)
class Harm:
    text: str
    pod: str  # "" if calls need not fail because of it
    seconds: float
    done: Callable[[], contextlib.AbstractAsyncContextManager[None]]
    renews: bool = False  # afterwards the pod has another incarnation


def draw(draw: random.Random, fleet: Fleet, copies: Copies, harmed: Collection[str]) -> Harm | None:
    """Draws the next trouble. Returns None if a pod of the same kind is already harmed."""
    kinds = [(make, weight) for make, weight in _KINDS if make is not _lies or fleet.lies]
    make = draw.choices([make for make, _ in kinds], [weight for _, weight in kinds])[0]
    harm = make(draw, fleet, copies)
    kind = next((pods for pods in fleet.kinds if harm.pod in pods), ())
    return None if set(kind) & set(harmed) else harm


def _server_killed(draw: random.Random, fleet: Fleet, copies: Copies) -> Harm:
    pod = draw.choice(fleet.foreign)
    pause = draw.choice((0.0, 2.0))
    neighbour = fleet.neighbours.get(pod)

    @contextlib.asynccontextmanager
    async def done() -> AsyncIterator[None]:
        fleet.kill(fleet.server(pod))
        if neighbour and not pause:
            neighbour.start()
        yield
        if neighbour and pause:
            neighbour.start()

    return Harm(f"{pod}: server {'restarted empty' if neighbour and not pause else 'killed'}", pod, pause, done)


def _server_frozen(draw: random.Random, fleet: Fleet, copies: Copies) -> Harm:
    pod = draw.choice(fleet.foreign)
    return _frozen(f"{pod}: server frozen", pod, draw.choice((1.0, 5.0, 12.0)), lambda: fleet.server(pod))


def _forgets(draw: random.Random, fleet: Fleet, copies: Copies) -> Harm:
    pod = draw.choice(fleet.foreign)

    @contextlib.asynccontextmanager
    async def done() -> AsyncIterator[None]:
        there = copies.all_of(pod)
        await fleet.drop(pod, draw.sample(there, min(5, len(there))))
        yield

    # A lost model is loaded again for the call that finds it lost, so nothing needs to fail.
    return Harm(f"{pod}: server forgets models", "", 0.0, done)


def _lies(draw: random.Random, fleet: Fleet, copies: Copies) -> Harm:
    lie = draw.choice(tuple(fleet.lies))

    @contextlib.asynccontextmanager
    async def done() -> AsyncIterator[None]:
        fleet.tell(lie)
        yield
        fleet.tell("")

    return Harm(f"servers lie: {lie}", "", draw.choice((2.0, 6.0)), done)


def _relay_killed(draw: random.Random, fleet: Fleet, copies: Copies) -> Harm:
    pod = draw.choice(fleet.foreign)
    return _killed(f"{pod}: relay killed", pod, lambda: fleet.relay(pod), fleet)


def _relay_frozen(draw: random.Random, fleet: Fleet, copies: Copies) -> Harm:
    pod = draw.choice(fleet.foreign)
    return _frozen(f"{pod}: relay frozen", pod, draw.choice((1.0, 8.0)), lambda: fleet.relay(pod))


def _onnx_killed(draw: random.Random, fleet: Fleet, copies: Copies) -> Harm:
    pod = draw.choice(fleet.onnx)
    return _killed(f"{pod}: ONNX server killed", pod, lambda: fleet.server(pod), fleet)


def _agent_killed(draw: random.Random, fleet: Fleet, copies: Copies) -> Harm:
    pod = draw.choice((*fleet.foreign, draw.choice(fleet.onnx)))
    pause = draw.choice((0.0, 1.0, 5.0))

    @contextlib.asynccontextmanager
    async def done() -> AsyncIterator[None]:
        fleet.arena.program(pod).kill9()
        try:
            yield
        finally:
            fleet.arena.program(pod).start()

    return Harm(f"{pod}: agent killed", pod, pause, done, renews=True)


_KINDS = (
    (_server_killed, 3),
    (_server_frozen, 3),
    (_forgets, 2),
    (_lies, 3),
    (_relay_killed, 2),
    (_relay_frozen, 1),
    (_onnx_killed, 1),
    (_agent_killed, 3),
)
"""The kinds of trouble, with the relative frequency of each."""


def _killed(text: str, pod: str, pid: Callable[[], int], fleet: Fleet) -> Harm:
    @contextlib.asynccontextmanager
    async def done() -> AsyncIterator[None]:
        fleet.kill(pid())
        yield

    return Harm(text, pod, 0.0, done)


def _frozen(text: str, pod: str, seconds: float, pid: Callable[[], int]) -> Harm:
    @contextlib.asynccontextmanager
    async def done() -> AsyncIterator[None]:
        stopped = pid()
        _signal(stopped, signal.SIGSTOP)
        try:
            yield
        finally:
            _signal(stopped, signal.SIGCONT)

    return Harm(text, pod, seconds, done)


def _signal(pid: int, number: int) -> None:
    if pid:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
