"""One run: rounds of troubles under traffic, each followed by a calm in which all pods must be ready and a sample of
the models must answer.

Clients call models of both kinds through the mesh, and a writer registers some models again with other content. Every
answer is recorded with its number, and `tests.chaos.checker` judges all answers at the end. A call may fail only while
a pod of its model's kind is harmed, and only if no unharmed pod had a copy during the complete call. RESOURCE_EXHAUSTED
is permitted whenever no pod had a copy during the complete call.
"""

import asyncio
import contextlib
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import grpc

from mesh.pb import modelmesh_pb2, modelmesh_pb2_grpc
from tests.chaos.checker import Fault, Summary, judge
from tests.chaos.history import Call, Change, History, Outcome
from tests.foreign import troubles
from tests.foreign.copies import Copies, cancelled
from tests.foreign.fleet import MOST_OVER, Fleet
from tests.support.waiting import until

CHANGE_TIMEOUT = 25.0
PAUSE = 0.01  # seconds between two calls of a caller
AT_ONCE = 2  # the most troubles that overlap
ROUND = 20.0  # seconds of troubles between two calms
SETTLES = 15.0
"""Seconds after a trouble for which its pod counts as harmed: leases and a restart, on a busy machine."""

HEALING = 90.0  # seconds within which everything must work again
SEVERAL_DEATHS = "servers were lost in calls of this model"
"""Part of the error of a call that is not sent to another server, because it might be what kills them."""

LEGITIMATE = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"})


@dataclass
class Run:
    """One run: `await Run(fleet, seed, seconds).run()`, then `verdict()`."""

    fleet: Fleet
    seed: int
    seconds: float
    callers: int = 16
    history: History = field(default_factory=History)
    done: Counter[str] = field(default_factory=Counter)
    rounds: int = 0
    back: list[float] = field(default_factory=list)  # seconds until a model answered again after a calm began
    harmed: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # by pod
    factors: dict[str, list[float]] = field(default_factory=dict)  # of each pod's books, in calms

    def __post_init__(self) -> None:
        self._draw = random.Random(self.seed)
        self._ids = itertools.count(1)
        self.copies = Copies(self.fleet.arena)
        self.standing: dict[str, int] = {}
        self._now_harmed: set[str] = set()
        self._pausing = asyncio.Event()
        self._writing = ""

    async def run(self) -> None:
        """Runs all rounds. Raises AssertionError if the mesh does not recover from a trouble."""
        self._stub = modelmesh_pb2_grpc.ModelMeshStub(self.fleet.channel)
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(cancelled, asyncio.create_task(self.copies.follow()))
            await self._fill()
            for number in range(self.callers):
                caller = asyncio.create_task(self._caller(random.Random(self.seed + number)))
                stack.push_async_callback(cancelled, caller)
            stack.push_async_callback(cancelled, asyncio.create_task(self._writer()))
            stack.push_async_callback(cancelled, asyncio.create_task(self._watch()))
            end = time.monotonic() + self.seconds
            while (left := end - time.monotonic()) > 0:
                await self._round(min(left, ROUND))
                await self._calm()
                self.rounds += 1

    # --- clients

    async def _fill(self) -> None:
        fleet = self.fleet
        lines, began = [], time.monotonic()
        for model in fleet.models:
            written = fleet.write(model, self._draw)
            assert written is not None, f"there is no content for {model}"
            number, path = written
            limits = {"min_copies": 2} if model in fleet.doubled else {}
            lines.append(json.dumps({"id": model, "type": fleet.type(model), "path": path.as_uri(), **limits}))
            self.standing[model] = number
        reply = await fleet.arena.mesh.rest("POST", "/mesh/v1/models:import", "\n".join(lines).encode())
        assert reply.status == 200, reply.body
        assert not [line for line in reply.body.splitlines() if b'"error"' in line], reply.body
        for model, number in self.standing.items():
            self.history.changes.append(Change(model, number, began, time.monotonic(), Outcome.DONE))

    async def call(self, model: str, draw: random.Random) -> Call:
        began = time.monotonic()
        answer = await self.fleet.ask(model, f"call-{next(self._ids)}", draw)
        made = Call(model, "router-1", began, time.monotonic(), answer.value, answer.code, answer.text)
        self.history.calls.append(made)
        return made

    async def _caller(self, draw: random.Random) -> None:
        """Calls all models, some far more often than others."""
        head = self.fleet.doubled
        rest = [model for model in self.fleet.models if model not in head]
        random.Random(self.seed).shuffle(rest)
        ranked = [*head, *rest]
        weights = [1 / (10 + rank) for rank in range(len(ranked))]
        while True:
            made = await self.call(draw.choices(ranked, weights)[0], draw)
            await asyncio.sleep(PAUSE if made.value is not None else 10 * PAUSE)

    async def _writer(self) -> None:
        """Registers models again with other content, one after the other."""
        draw = random.Random(self.seed + 1000)
        ids = [model for model in self.fleet.models if model not in self.fleet.doubled]
        while True:
            await asyncio.sleep(draw.uniform(0.2, 1.5))
            if self._pausing.is_set():
                continue
            model = draw.choice(ids)
            written = self.fleet.write(model, draw)
            if written is None:
                continue
            number, path = written
            self._writing = model
            while not await self._change(model, None):
                await asyncio.sleep(0.3)
            while not await self._change(model, number, path):
                await asyncio.sleep(0.3)
            self.standing[model] = number
            self._writing = ""

    async def _change(self, model: str, number: int | None, path: Path | None = None) -> bool:
        began, outcome, text = time.monotonic(), Outcome.DONE, ""
        try:
            if path is None:
                await self._stub.unregisterModel(
                    modelmesh_pb2.UnregisterModelRequest(modelId=model), timeout=CHANGE_TIMEOUT
                )
            else:
                info = modelmesh_pb2.ModelInfo(type=self.fleet.type(model), path=path.as_uri())
                request = modelmesh_pb2.RegisterModelRequest(modelId=model, modelInfo=info)
                await self._stub.registerModel(request, timeout=CHANGE_TIMEOUT)
        except grpc.aio.AioRpcError as error:
            outcome, text = Outcome.UNKNOWN, f"{error.code().name} {error.details()}"
        self.history.changes.append(Change(model, number, began, time.monotonic(), outcome, "router-1", text))
        return outcome is Outcome.DONE

    async def _watch(self) -> None:
        while True:
            self.fleet.look()
            await asyncio.sleep(0.5)

    # --- troubles

    async def _round(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        running: set[asyncio.Task[None]] = set()

        async def one(harm: troubles.Harm) -> None:
            self._note(harm.text)
            self.done[harm.text.partition(": ")[2] if harm.pod or "forgets" in harm.text else harm.text] += 1
            began = time.monotonic()
            former = await self._incarnation(harm.pod) if harm.renews else ""
            if harm.pod:
                self._now_harmed.add(harm.pod)
                self.harmed.setdefault(harm.pod, []).append((began, float("inf")))
                place = len(self.harmed[harm.pod]) - 1
            try:
                async with harm.done():
                    await asyncio.sleep(harm.seconds)
                self._note(f"{harm.text}: over")
                if harm.pod:
                    await self._serves(harm.pod, former=former)
            finally:
                if harm.pod:
                    self.harmed[harm.pod][place] = (began, time.monotonic() + SETTLES)
                    self._now_harmed.discard(harm.pod)

        try:
            while time.monotonic() < end:
                for ended in [task for task in running if task.done()]:
                    running.discard(ended)
                    ended.result()
                harm = None
                if len(running) < AT_ONCE:
                    harm = troubles.draw(self._draw, self.fleet, self.copies, self._now_harmed)
                if harm is not None:
                    running.add(asyncio.create_task(one(harm)))
                    await asyncio.sleep(0)
                await asyncio.sleep(self._draw.uniform(0.3, 2.0))
        finally:
            await asyncio.gather(*running)

    async def _incarnation(self, pod: str) -> str:
        """Returns the incarnation of a pod's agent according to the mesh, or "" if the mesh sees none."""
        return next((one["incarnation"] for one in await self.fleet.figures() if one["pod"] == pod), "")

    async def _serves(self, pod: str, *, former: str = "") -> None:
        """Waits until a pod is ready according to the mesh. Its agent must not be the `former` incarnation, which the
        mesh sees as ready until its lease ends."""

        async def ready() -> bool:
            try:
                found = await self.fleet.figures()
            except (OSError, KeyError, ValueError):
                return False
            seen = [one for one in found if one["pod"] == pod and one["incarnation"] != former]
            return any(one["state"] == "ready" and not one["suspect"] for one in seen)

        await asyncio.sleep(1.0)  # a fault that was just injected has not been noticed yet
        await until(ready, timeout=HEALING, interval=0.2, why=lambda: self._tell(f"{pod} is ready again"))

    # --- calm

    async def _calm(self) -> None:
        self._note("calm")
        self._pausing.set()
        await until(lambda: not self._writing, timeout=HEALING, why=lambda: self._tell(f"{self._writing} is written"))
        for pod in self.fleet.arena.pods:
            await self._serves(pod)
        began = time.monotonic()
        models = self._draw.sample(sorted(self.standing), min(40, len(self.standing)))
        await asyncio.gather(*(self._answers(model, began) for model in models))
        for one in await self.fleet.figures():
            if one["factor"]:
                self.factors.setdefault(one["pod"], []).append(one["factor"])
                text = f"{one['used'] >> 20} MiB used, {one['observed'] >> 20} MiB observed, factor {one['factor']}"
                self._note(f"{one['pod']}: {text}")
        self._note("calm: all is well")
        goal = len(self.history.calls) + 100
        await until(lambda: len(self.history.calls) >= goal, timeout=HEALING, why="callers go on")
        self._pausing.clear()

    async def _answers(self, model: str, began: float) -> None:
        last: list[Call] = []

        async def right() -> bool:
            last[:] = [await self.call(model, self._draw)]
            return last[0].value == self.standing[model]

        def why() -> str:
            story = "\n".join([*self.history.story(model, time.monotonic(), before=HEALING)][-60:])
            return self._tell(f"{model} answers {self.standing[model]}, and the last answer is {last}\n{story}")

        await until(right, timeout=HEALING, interval=0.2, why=why)
        self.back.append(time.monotonic() - began)

    def _note(self, text: str) -> None:
        self.history.note(time.monotonic(), text)

    def _tell(self, text: str) -> str:
        return f"seed {self.seed}, round {self.rounds + 1}: not so: {text}"

    # --- the end

    async def verdict(self) -> "Verdict":
        registry = await self.fleet.arena.registrations(self.fleet.number_of)
        faults = judge(self.history, registry, legitimate=lambda call: not self.why_faulty(call))
        faults = [Fault(fault.kind, fault.model, fault.at, f"{fault.text}; {self._why_of(fault)}") for fault in faults]
        for pod, most in self.fleet.most.items():
            capacity = self.fleet.capacities[pod]
            if most > capacity + MOST_OVER:
                text = f"its server has taken {most >> 20} MiB, the capacity is {capacity >> 20} MiB"
                faults.append(Fault("memory", pod, time.monotonic(), text))
        return Verdict(self, Summary.of(self.history, faults), faults)

    def _why_of(self, fault: Fault) -> str:
        calls = (call for call in self.history.calls if call.model == fault.model and call.ended == fault.at)
        return next((why for call in calls if (why := self.why_faulty(call))), "")

    def why_faulty(self, failed: Call) -> str:
        """Returns the reason why a call should not have failed, or "" if its failure is permitted."""
        if failed.code not in LEGITIMATE:
            return f"no trouble explains {failed.code}"
        if failed.code == "RESOURCE_EXHAUSTED" and not self.copies.holders(failed.model, failed.began, failed.ended):
            return ""  # a server that states wrong sizes may be full for a moment
        takers = self.fleet.takers(failed.model)
        harmed = {pod for pod in takers if self._was_harmed(pod, failed.began, failed.ended)}
        if not harmed:
            return "no pod that takes it was harmed"
        if SEVERAL_DEATHS in failed.text:
            return ""
        others = set(self.copies.holders(failed.model, failed.began, failed.ended)) - harmed
        return f"{', '.join(others)} had a copy all the time" if others else ""

    def _was_harmed(self, pod: str, began: float, ended: float) -> bool:
        return any(first <= ended and began <= last for first, last in self.harmed.get(pod, ()))


@dataclass(frozen=True)
class Verdict:
    run: Run
    summary: Summary
    faults: list[Fault]

    def __str__(self) -> str:
        run = self.run
        done = ", ".join(f"{text} {count}" for text, count in run.done.most_common())
        memory = ", ".join(
            f"{pod} {most >> 20} of {run.fleet.capacities[pod] >> 20} MiB" for pod, most in run.fleet.most.items()
        )
        factors = ", ".join(f"{pod} {min(seen)} to {max(seen)}" for pod, seen in sorted(run.factors.items()))
        back = sorted(run.back)
        slow = f"{back[len(back) // 2]:.1f} s median, {back[-1]:.1f} s at most" if back else "never"
        return (
            f"seed {run.seed}, {run.rounds} rounds: {self.summary}\n  troubles: {done}\n  models back after: {slow}; "
            f"memory at most: {memory}; "
            f"factors of the books: {factors}"
        )

    def story(self) -> str:
        lines = [str(self)]
        for fault in self.faults[:3]:
            lines += ["", str(fault), *[*self.run.history.story(fault.model, fault.at)][-60:]]
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        """Writes the history in chronological order, one line of JSON per entry."""
        history = self.run.history
        seen = [(event.at, {"event": event.text}) for event in history.events]
        seen += [(change.ended, asdict(change) | {"outcome": change.outcome.value}) for change in history.changes]
        seen += [(made.ended, asdict(made)) for made in history.calls]
        seen += [(fault.at, {"fault": str(fault)}) for fault in self.faults]
        for model, spans in self.run.copies.spans.items():
            seen += [(span.began, {"copy": model, "pod": span.pod, "until": str(span.ended)}) for span in spans]
        seen.sort(key=lambda line: line[0])
        path.write_text("".join(json.dumps({"at": round(at, 4), **line}) + "\n" for at, line in seen))


async def faultless(
    fleet: Fleet, folder: Path, say: Callable[[str], None], *, seed: int, seconds: float, callers: int = 16
) -> None:
    """Makes one run, reports the run with `say`, and fails on any fault. The history is written to the folder."""
    async with fleet:
        run = Run(fleet, seed, seconds, callers=callers)
        try:
            await run.run()
        finally:
            verdict = await run.verdict()
            verdict.write(folder / "history.jsonl")
            say(f"{verdict}\n  history: {folder / 'history.jsonl'}")
        assert not verdict.faults, verdict.story()
