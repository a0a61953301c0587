"""Troubles of pods and their model servers. Each harms one pod, and never both pods of a kind are harmed at once."""

import contextlib
import os
import random
import signal
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass

from tests.foreign.copies import Copies
from tests.foreign.mixed import CHILD, FOREIGN, NEIGHBOUR, ONNX, Mixed
from tests.support import exampleruntime


@dataclass(frozen=True, slots=True)
class Harm:
    """One trouble."""

    text: str
    pod: str  # "": no pod answers worse for it
    seconds: float
    done: Callable[[], contextlib.AbstractAsyncContextManager[None]]
    renews: bool = False  # afterwards the pod has another incarnation


def draw(draw: random.Random, mixed: Mixed, copies: Copies, harmed: Collection[str]) -> Harm | None:
    """Draws the next trouble. Returns None if that would harm both pods of a kind."""
    make = draw.choices([make for make, _ in _KINDS], [weight for _, weight in _KINDS])[0]
    harm = make(draw, mixed, copies)
    kind = FOREIGN if harm.pod in FOREIGN else ONNX
    return None if harm.pod and set(kind) & set(harmed) else harm


def _server_killed(draw: random.Random, mixed: Mixed, copies: Copies) -> Harm:
    pod = draw.choice(FOREIGN)
    pause = draw.choice((0.0, 2.0))

    @contextlib.asynccontextmanager
    async def done() -> AsyncIterator[None]:
        mixed.kill(mixed.server(pod))
        if pod == NEIGHBOUR and not pause:
            mixed.neighbour.start()
        yield
        if pod == NEIGHBOUR and pause:
            mixed.neighbour.start()

    what = "restarted empty" if pod == NEIGHBOUR and not pause else "killed"
    return Harm(f"{pod}: server {what}", pod, pause, done)


def _server_frozen(draw: random.Random, mixed: Mixed, copies: Copies) -> Harm:
    pod = draw.choice(FOREIGN)
    return _frozen(f"{pod}: server frozen", pod, draw.choice((1.0, 5.0, 12.0)), lambda: mixed.server(pod))


def _forgets(draw: random.Random, mixed: Mixed, copies: Copies) -> Harm:
    pod = draw.choice(FOREIGN)

    @contextlib.asynccontextmanager
    async def done() -> AsyncIterator[None]:
        there = copies.all_of(pod)
        await mixed.forget(pod, draw.sample(there, min(5, len(there))))
        yield

    # A lost model is loaded again for the call that finds it lost, so nothing needs to fail.
    return Harm(f"{pod}: server forgets models", "", 0.0, done)


def _lies(draw: random.Random, mixed: Mixed, copies: Copies) -> Harm:
    lie = draw.choice(tuple(exampleruntime.LIES))

    @contextlib.asynccontextmanager
    async def done() -> AsyncIterator[None]:
        mixed.tell(lie)
        yield
        mixed.tell("")

    return Harm(f"servers lie: {lie}", "", draw.choice((2.0, 6.0)), done)


def _relay_killed(draw: random.Random, mixed: Mixed, copies: Copies) -> Harm:
    pod = draw.choice(FOREIGN)
    return _killed(f"{pod}: relay killed", pod, lambda: mixed.relay(pod), mixed)


def _relay_frozen(draw: random.Random, mixed: Mixed, copies: Copies) -> Harm:
    pod = draw.choice(FOREIGN)
    return _frozen(f"{pod}: relay frozen", pod, draw.choice((1.0, 8.0)), lambda: mixed.relay(pod))


def _onnx_killed(draw: random.Random, mixed: Mixed, copies: Copies) -> Harm:
    pod = draw.choice(ONNX)
    return _killed(f"{pod}: ONNX server killed", pod, lambda: mixed.server(pod), mixed)


def _agent_killed(draw: random.Random, mixed: Mixed, copies: Copies) -> Harm:
    pod = draw.choice((CHILD, NEIGHBOUR, draw.choice(ONNX)))
    pause = draw.choice((0.0, 1.0, 5.0))

    @contextlib.asynccontextmanager
    async def done() -> AsyncIterator[None]:
        mixed.arena.program(pod).kill9()
        try:
            yield
        finally:
            mixed.arena.program(pod).start()

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


def _killed(text: str, pod: str, pid: Callable[[], int], mixed: Mixed) -> Harm:
    @contextlib.asynccontextmanager
    async def done() -> AsyncIterator[None]:
        mixed.kill(pid())
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
