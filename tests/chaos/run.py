"""One run: rounds of troubles under traffic, each followed by a calm in which everything must work again, and a verdict
at the end.

In a calm all troubles are healed. Changes under way must then be acknowledged, each registered model must answer
through each router, and after that no call may fail with UNAVAILABLE for a while. At the end the `checker` judges all
answers, from troubles and calms alike.
"""

import asyncio
import contextlib
import json
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from tests.chaos import troubles
from tests.chaos.checker import Fault, Summary, judge
from tests.chaos.history import Call, History, number_of
from tests.chaos.traffic import Caller, Numbers, Writer, call
from tests.chaos.ways import Grpc, Rest, Way
from tests.support.arena import Arena
from tests.support.waiting import until

AT_ONCE = 3
"""The most troubles that overlap: with more, hardly any call is answered, and nothing is learned."""

ROUND = 30.0  # seconds of troubles between two calms
HEALING = 60.0
"""Seconds after the end of all troubles within which everything must work again: leases, presence and loads, on a busy
machine."""

LEGITIMATE = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"})
"""Statuses that a caller may see while processes die; clients may retry after each."""

LEGITIMATE_IN_QUIET = LEGITIMATE - {"UNAVAILABLE"}
"""Statuses that a caller may see without a trouble: memory is short, and the machine may be busy."""

QUIET = 100  # calls that are made when all is well, before the next troubles

NUMBER = re.compile(r"-\d+")
"""The number in the names of pods and routers."""

STORIES = 3  # faults whose stories are printed
LINES = 80  # lines of one story


@dataclass
class Run:
    """One run: `await Run(arena, seed, seconds).run()`, then `verdict()`."""

    arena: Arena
    seed: int
    seconds: float
    models: int = 12
    writers: int = 3
    history: History = field(default_factory=History)
    done: Counter[str] = field(default_factory=Counter)  # number of troubles by kind
    callable: int = 0  # number of models that were callable through all routers, over all calms
    rounds: int = 0
    quiet: list[tuple[float, float]] = field(default_factory=list)  # calms, each from its start to its end

    async def run(self) -> None:
        """Runs all rounds. Raises AssertionError if something does not heal."""
        draw = random.Random(self.seed)
        names = [f"m{number}" for number in range(self.models)]
        numbers = Numbers()
        async with contextlib.AsyncExitStack() as stack:
            session = await stack.enter_async_context(aiohttp.ClientSession())
            routers = self.arena.routers
            self._ways: list[Way] = [Grpc(self.arena, router) for router in routers]
            rest = [Rest(self.arena, router, session) for router in routers]
            bulk = [Rest(self.arena, router, session, bulk=True) for router in routers]
            ways = [*self._ways, *self._ways, *rest, *bulk]
            self._writers = [
                Writer(self.arena, self.history, ways, names[number :: self.writers], numbers, draw.randrange(1 << 30))
                for number in range(self.writers)
            ]
            await asyncio.gather(*(writer.fill() for writer in self._writers))
            callers = [Caller(self.history, way, names, draw.randrange(1 << 30)) for way in (*self._ways, *rest)]
            end = time.monotonic() + self.seconds
            for worker in (*callers, *self._writers):
                stack.push_async_callback(_cancel, asyncio.create_task(worker.run()))
            while (left := end - time.monotonic()) > 0:
                await self._round(draw, min(left, ROUND))
                await self._calm()
                self.rounds += 1

    # --- troubles ---

    async def _round(self, draw: random.Random, seconds: float) -> None:
        over = asyncio.Event()
        taken: set[str] = set()
        running: set[asyncio.Task[None]] = set()

        async def one(trouble: troubles.Trouble) -> None:
            taken.update(trouble.claims)
            self._note(trouble.text)
            self.done[NUMBER.sub("", trouble.text)] += 1
            try:
                async with trouble.harm():
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(over.wait(), trouble.seconds)
                self._note(f"{trouble.text}: over")
            finally:
                taken.difference_update(trouble.claims)

        end = time.monotonic() + seconds
        try:
            while time.monotonic() < end:
                for ended in [task for task in running if task.done()]:
                    running.discard(ended)
                    ended.result()
                trouble = troubles.draw(draw, self.arena, taken) if len(running) < AT_ONCE else None
                if trouble is not None:
                    running.add(asyncio.create_task(one(trouble)))
                await asyncio.sleep(draw.uniform(0.2, 1.5))
        finally:
            over.set()
            await asyncio.gather(*running)

    # --- calm ---

    async def _calm(self) -> None:
        self._note("calm")
        await self.arena.heal()
        for name in (*self.arena.pods, *self.arena.routers):
            self._restart(name)
        await self.arena.mesh.ready()
        for writer in self._writers:
            writer.pause()
        await until(
            lambda: not any(writer.doing for writer in self._writers),
            timeout=HEALING,
            interval=0.1,
            why=lambda: self._tell("not acknowledged: " + ", ".join(filter(None, (w.doing for w in self._writers)))),
        )
        standing = {model: value for writer in self._writers for model, value in writer.standing.items()}
        await asyncio.gather(
            *(self._called(way, model, value) for way in self._ways for model, value in standing.items())
        )
        self.callable += sum(value is not None for value in standing.values())
        self._note("calm: all is well")
        began, goal = time.monotonic(), len(self.history.calls) + QUIET
        await until(lambda: len(self.history.calls) >= goal, timeout=HEALING, why="callers go on")
        self.quiet.append((began, time.monotonic()))
        for writer in self._writers:
            writer.resume()

    def _restart(self, name: str) -> None:
        """Restarts a process that could not start during a trouble, as Kubernetes does. Fails if the process ended in
        another way."""
        if self.arena.alive(name):
            return
        program = self.arena.program(name)
        assert program.process is not None
        started = program.process.returncode < 0 or "cannot start" not in program.tail(5)
        assert not started, f"{name} has ended by itself:\n{program.tail()}"
        self._note(f"{name}: could not start, is started again")
        program.start()

    async def _called(self, way: Way, model: str, value: int | None) -> None:
        """Waits until a router returns the answer of a model's last acknowledged registration, or NOT_FOUND if `value`
        is None."""
        last: list[Call] = []

        async def right() -> bool:
            last[:] = [await call(self.history, way, model)]
            return last[0].value == value if value is not None else last[0].code == "NOT_FOUND"

        def why() -> str:
            wanted = "not registered" if value is None else f"registered with the answer {value}"
            story = "\n".join([*self.history.story(model, time.monotonic(), before=HEALING + ROUND)][-LINES:])
            return self._tell(f"{model} is {wanted}, and the last answer is: {last[0]}\n{story}")

        await until(right, timeout=HEALING, interval=0.3, why=why)

    def _note(self, text: str) -> None:
        self.history.note(time.monotonic(), text)

    def _tell(self, text: str) -> str:
        return f"seed {self.seed}, round {self.rounds + 1}: {text}"

    # --- the end ---

    async def verdict(self) -> "Verdict":
        registry = await self.arena.registrations(number_of)
        faults = judge(self.history, registry, legitimate=self._legitimate)
        return Verdict(self, Summary.of(self.history, faults), faults)

    def _legitimate(self, failed: Call) -> bool:
        """Returns whether a call may have failed with its status, given the faults injected at that time."""
        quiet = any(began <= failed.began and failed.ended <= ended for began, ended in self.quiet)
        return failed.code in (LEGITIMATE_IN_QUIET if quiet else LEGITIMATE)


@dataclass(frozen=True)
class Verdict:
    run: Run
    summary: Summary
    faults: list[Fault]

    def __str__(self) -> str:
        run = self.run
        troubles = ", ".join(f"{text} {count}" for text, count in run.done.most_common())
        return (
            f"seed {run.seed}, {run.rounds} rounds: {self.summary}, {run.callable} found callable in calms\n"
            f"  troubles: {troubles}"
        )

    def story(self) -> str:
        return "\n".join(self._stories())

    def _stories(self) -> Iterator[str]:
        yield str(self)
        for fault in self.faults[:STORIES]:
            yield f"\n{fault}"
            yield from [*self.run.history.story(fault.model, fault.at)][-LINES:]
        if len(self.faults) > STORIES:
            yield f"\n... and {len(self.faults) - STORIES} more"

    def write(self, path: Path) -> None:
        """Writes the history, sorted by time, one line of JSON per entry."""
        history = self.run.history
        seen: list[tuple[float, dict[str, Any]]] = [(event.at, {"event": event.text}) for event in history.events]
        seen += [(change.ended, asdict(change) | {"outcome": change.outcome.value}) for change in history.changes]
        seen += [(made.ended, asdict(made)) for made in history.calls]
        seen += [(fault.at, {"fault": str(fault)}) for fault in self.faults]
        seen.sort(key=lambda line: line[0])
        path.write_text("".join(json.dumps({"at": round(at, 4), **line}) + "\n" for at, line in seen))


async def _cancel(task: "asyncio.Task[None]") -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
