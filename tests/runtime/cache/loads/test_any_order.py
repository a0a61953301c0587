"""Loads, unloads, calls and withdrawals that end in any order. Hypothesis searches for an order that leaves a load
waiting forever.

The agent's parts are real, from `loads` down to the ledger. The model server answers when the test says so. After each
event the loop runs until nothing more happens. A load that still waits must be blocked by something that will end: a
load or an unload in the server, or a call.
"""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mesh.runtime.cache.books.entries import EntryState
from mesh.runtime.cache.loads import rooms
from mesh.runtime.cache.loads.outcomes import Loaded, Outcome, Refused
from mesh.runtime.servers.endings import Death
from mesh.runtime.servers.spi import Size, Spi, SpiError
from mesh.runtime.sharedmemory.board import Board
from mesh.schema.records import ModelRecord
from mesh.statuses import Code, Reason
from placement.blame import Blame
from placement.footprint import Footprint, total
from placement.suspects import EndCause
from tests.runtime.pod_of_fakes import FakePod
from tests.support.modelserver import FakeModelServer

CAPACITY = 10_000_000
SLOTS = 20
_AT_WORK = Board.private(64).at_work  # without any thread at work
_TURNS_OF_THE_LOOP = 15  # turns of the event loop within which nearly everything that can happen has happened
_AGAIN = 20  # times as many turns before a load counts as waiting


class SpiByHand:
    """The SPI of a model server that answers when the test says so."""

    def __init__(self, server: "ServerByHand") -> None:
        self._server = server

    async def load(self, model_id: str, model_type: str, path: str, key: str, **_: object) -> Size:
        answer: asyncio.Future[Size] = asyncio.get_running_loop().create_future()
        self._server.loads[model_id] = answer
        try:
            return await answer
        finally:
            self._server.loads.pop(model_id, None)

    async def unload(self, model_id: str, **_: object) -> None:
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._server.unloads[model_id] = answer
        try:
            await answer
        finally:
            self._server.unloads.pop(model_id, None)

    async def holds(self, model_id: str, *, timeout: float) -> bool:
        return True


class ServerByHand(FakeModelServer):
    """The model server as the agent sees it. The test ends its loads and unloads."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.why_down = ""
        self.lives = 1
        self.loads: dict[str, asyncio.Future[Size]] = {}
        self.unloads: dict[str, asyncio.Future[None]] = {}
        self.spi = cast(Spi, SpiByHand(self))

    async def __aenter__(self) -> "ServerByHand":
        return self

    async def __aexit__(self, *_: object) -> None:
        for answer in (*self.loads.values(), *self.unloads.values()):
            answer.cancel()


@dataclass(frozen=True)
class Model:
    """A model that will be loaded."""

    size: int  # the size that will be measured
    file: int
    known: bool  # True if the size is known from an earlier load
    long: bool  # its call goes on until it is ended
    blamed: bool  # True if a server has died of the model, so that its load runs apart from others


SMALL = Model(size=50_000, file=500, known=False, long=False, blamed=False)

MODELS = st.builds(
    Model,
    size=st.sampled_from((50_000, 500_000, 2_000_000, 4_000_000, 6_000_000, 9_900_000)),
    file=st.sampled_from((500, 400_000, 2_000_000, 4_500_000)),
    known=st.booleans(),
    long=st.booleans(),
    blamed=st.sampled_from((False, False, False, True)),
)


class Story:
    """A pod and the events that happen to it."""

    def __init__(self, pod: FakePod, models: list[Model]) -> None:
        self.pod = pod
        self.server = cast(ServerByHand, pod.server)
        self.models = {f"m{number}": model for number, model in enumerate(models)}
        self.to_come = list(self.models)
        self.callers: dict[str, asyncio.Task[Outcome]] = {}
        self.outcomes: dict[str, Outcome] = {}
        self.calls: dict[str, int] = {}  # calls in flight, by model
        self.withdrawn: set[str] = set()
        self.died: set[str] = set()
        blames = (Blame("pod-2", time.time_ns() // 1_000_000, ""),)
        for name in [name for name, model in self.models.items() if model.blamed]:
            pod.claims.records[name] = ModelRecord(type="t", killed=("died",), blames=blames)

    async def call(self, model_id: str) -> Outcome:
        model = self.models[model_id]
        want = replace(self.pod.want(model_id, model.size, known=model.known), path=f"/{model_id}/{model.file}")
        outcome = await self.pod.loads.load(want)
        assert model_id not in self.outcomes, f"{model_id} got two outcomes"
        self.outcomes[model_id] = outcome
        if isinstance(outcome, Loaded) and model_id in self.pod.resident:
            (self.pod.busy if model.long else self.pod.called)(model_id)
            if model.long:
                self.calls[model_id] = 1
        return outcome

    def actions(self) -> list[tuple[str, str]]:
        """Lists the events that loads may be waiting for."""
        resting = [("load", name) for name in self.server.loads] + [("unload", name) for name in self.server.unloads]
        return resting + [("end", name) for name in self.calls if name in self.pod.resident]

    def do(self, what: str, name: str) -> None:
        match what:
            case "come":
                self.to_come.remove(name)
                self.callers[name] = asyncio.get_running_loop().create_task(self.call(name))
            case "load":
                entry = self.pod.entry(name)
                if entry.slot is not None:
                    self.pod.board.uses.pop(entry.slot, None)  # as a server does with the slot it is given
                self.server.loads[name].set_result(Size(Footprint(self.models[name].size)))
            case "unload":
                self.server.unloads[name].set_result(None)
            case "end":
                del self.calls[name]
                self.pod.called(name)
            case "withdraw":
                self.withdrawn.add(name)
                task = asyncio.get_running_loop().create_task(self.pod.loads.withdraw(name, 1, "unregistered"))
                self.callers[f"withdrawal of {name}"] = task  # type: ignore[assignment]
            case "die":
                self.die()

    def die(self) -> None:
        server = self.server
        server.lives += 1
        held = (EntryState.LOADING, EntryState.LOADED, EntryState.UNLOADING)
        gone = [entry.model_id for entry in self.pod.ledger.entries.values() if entry.state in held]
        self.died.update(gone)
        for model_id in gone:
            self.calls.pop(model_id, None)
        self.pod.cache.deaths.happened(Death("was killed", EndCause.KILLED), _AT_WORK)
        for answer in (*server.loads.values(), *server.unloads.values()):
            if not answer.done():
                answer.set_exception(SpiError(Code.UNAVAILABLE, "the connection was lost"))

    async def settles(self) -> None:
        """Runs the event loop until nothing more happens, and checks the ledger."""
        for _ in range(_AGAIN):
            for _ in range(_TURNS_OF_THE_LOOP):
                await asyncio.sleep(0)
            if self.actions() or not self.pod.loads.statistics().in_progress:
                break
        ledger = self.pod.ledger
        entries = ledger.entries.values()
        assert ledger.committed == total(one.footprint for one in entries if one.state is not EntryState.UNLOADING)
        assert ledger.physical == total(one.footprint for one in entries if one.physical)
        assert ledger.committed.host_bytes - ledger.promised().host_bytes <= CAPACITY, (
            "the same room was promised twice"
        )
        slots = [entry.slot for entry in entries if entry.slot is not None]
        assert sorted([*slots, *ledger._slots]) == list(range(SLOTS))
        if self.pod.loads.statistics().in_progress:
            assert self.actions(), f"loads wait though nothing is under way: {list(entries)}"

    async def end(self) -> None:
        """Ends everything under way, and checks that each waiter got a result."""
        for _ in range(1000):
            await self.settles()
            if not (actions := self.actions()):
                break
            self.do(*actions[0])
        for name, outcome in self.outcomes.items():
            if isinstance(outcome, Refused) and name not in self.withdrawn:
                assert name in self.died, outcome
                assert outcome.reason is Reason.UNAVAILABLE
        assert all(task.done() for task in self.callers.values())
        assert self.pod.ledger.committed.host_bytes <= CAPACITY


@contextmanager
def looking_all_the_time() -> Iterator[None]:
    """Makes loads that wait for room check for it again without a pause."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rooms, "LOOK", 0.0)
        patch.setattr(rooms, "_LOOK_SHARE", 1e9)
        yield


@given(
    models=st.lists(MODELS, min_size=2, max_size=12),
    choices=st.lists(st.integers(0, 1000), max_size=60),
    concurrency=st.sampled_from((1, 2, 4)),
    deaths=st.booleans(),
    disk=st.sampled_from((None, 5_000_000)),
)
@example(  # the files of a load that died with its server are still on the disk when the next one asks for room
    models=[replace(SMALL, file=2_000_000), replace(SMALL, file=4_500_000), *4 * [SMALL]],
    choices=[0, 0, 983],
    concurrency=1,
    deaths=True,
    disk=5_000_000,
)
def test_no_load_waits_for_room_that_is_never_given_back(
    models: list[Model], choices: list[int], concurrency: int, deaths: bool, disk: int | None
) -> None:
    async def run() -> None:
        async with FakePod(capacity=CAPACITY, concurrency=concurrency, slots=SLOTS, server=ServerByHand()) as pod:
            pod.files.budget = disk
            story = Story(pod, models)
            for choice in choices:
                actions = [("come", name) for name in story.to_come[:3]] + story.actions()
                if choice > 900:
                    actions = [("withdraw", name) for name in story.callers if name in pod.ledger.entries]
                    actions += [("die", "")] * deaths
                if actions:
                    story.do(*actions[choice % len(actions)])
                    await story.settles()
            for name in list(story.to_come):
                story.do("come", name)
            await story.end()
            assert len(story.outcomes) == len(models)

    with looking_all_the_time():
        asyncio.run(run())
