"""Skewed traffic with known answers: a few models get most of the calls, and every answer is compared.

Models are ranked at random. A model is called with a probability proportional to 1 / rank ** skew (Zipf's law), which
is about how a fleet with a model for each customer is used. Each client sends one request after the other, and all
clients together cycle through the ways to call. After UNAVAILABLE and RESOURCE_EXHAUSTED it retries with a pause that
doubles, as a good client does. These retries are counted. Any other answer that is not right is a failure of the mesh.
"""

import asyncio
import itertools
import random
import time
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mesh.demo.calls import Caller, CallFailed, code_name
from mesh.demo.fleet.catalogue import Fleet, Sample
from mesh.demo.fleet.reference import Reference, difference
from mesh.demo.fleet.requests import sample_inputs
from mesh.statuses import Code

RETRIED = frozenset({Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED})
FIRST_PAUSE = 0.05
LONGEST_PAUSE = 2.0
KEPT = 20
"""Largest number of failures whose texts are kept. All failures are counted."""


@dataclass(slots=True)
class Tally:
    """Results of the traffic so far."""

    requests: int = 0  # ended, with any result
    right: int = 0
    wrong: int = 0
    errors: int = 0
    retries: Counter[str] = field(default_factory=Counter)  # by gRPC code
    models: set[str] = field(default_factory=set)  # ids of the models called
    milliseconds: "dict[str, array[float]]" = field(default_factory=dict)  # of right answers, by way of calling
    texts: list[str] = field(default_factory=list)  # the first failures

    def fail(self, text: str) -> None:
        """Keeps the text of a failure, unless enough texts are kept already."""
        if len(self.texts) < KEPT:
            self.texts.append(text)


class Traffic:
    """Clients of one mesh. `give_up` limits the retries of one request, in seconds."""

    def __init__(
        self,
        fleet: Fleet,
        callers: Sequence[Caller],
        *,
        clients: int = 8,
        skew: float = 1.0,
        seed: int = 0,
        give_up: float = 60.0,
    ) -> None:
        self._callers = itertools.cycle(callers)
        self._clients = clients
        self._give_up = give_up
        self._rng = np.random.default_rng(seed)
        self._pause = random.Random(seed)
        self._reference = Reference(sessions=len(fleet.models))
        self._ranked = [fleet.models[index] for index in self._rng.permutation(len(fleet.models))]
        weights = 1.0 / np.arange(1, len(self._ranked) + 1) ** skew
        self._cumulative = np.cumsum(weights) / weights.sum()
        self._stopping = False
        self._left = 0
        self.tally = Tally()

    def prepare(self) -> None:
        """Creates the reference sessions in advance, so that the seconds this takes do not count in the mesh's figures.
        Blocks."""
        self._reference.prepare(self._ranked)

    async def run(self, *, seconds: float = 0.0, requests: int = 0) -> Tally:
        """Sends requests until `seconds` have passed or `requests` have ended (0: no limit), or `stop()` is called."""
        self._stopping = False
        self._left = requests or 2**62
        end = time.monotonic() + seconds if seconds else float("inf")
        async with asyncio.TaskGroup() as group:
            for _ in range(self._clients):
                group.create_task(self._client(end))
        return self.tally

    def stop(self) -> None:
        """Stops sending further requests."""
        self._stopping = True

    async def _client(self, end: float) -> None:
        while not self._stopping and self._left > 0 and time.monotonic() < end:
            self._left -= 1
            rank = int(np.searchsorted(self._cumulative, self._rng.random()))
            await self._request(self._ranked[min(rank, len(self._ranked) - 1)], next(self._callers))

    async def _request(self, sample: Sample, caller: Caller) -> None:
        inputs = sample_inputs(sample, self._rng)
        tally = self.tally
        begun = time.monotonic()
        pause = FIRST_PAUSE
        try:
            while True:
                started = time.monotonic()
                try:
                    answer = await caller.infer(sample.id, inputs)
                    break
                except CallFailed as error:
                    if error.code not in RETRIED or started - begun > self._give_up:
                        tally.errors += 1
                        tally.fail(f"{sample.id} over {caller.name}: {error}")
                        return
                    tally.retries[code_name(error.code)] += 1
                    await asyncio.sleep(max(pause, error.retry_after or 0.0) * self._pause.uniform(0.8, 1.2))
                    pause = min(2 * pause, LONGEST_PAUSE)
            took = (time.monotonic() - started) * 1000
        except (ValueError, KeyError, TypeError) as error:  # an answer, but not V2
            tally.wrong += 1
            why = f"it lacks {error}" if isinstance(error, KeyError) else error
            tally.fail(f"{sample.id} over {caller.name}: the answer is not V2: {why}")
            return
        finally:
            tally.requests += 1
            tally.models.add(sample.id)
        wrong = difference(self._reference.answer(sample, inputs), answer)
        if wrong:
            tally.wrong += 1
            tally.fail(f"{sample.id} over {caller.name}: wrong answer: {wrong}")
        else:
            tally.right += 1
            tally.milliseconds.setdefault(caller.name, array("d")).append(took)
