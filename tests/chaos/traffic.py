"""Clients of a mesh under trouble: callers, and writers that register, remove and register again.

Each writer owns some of the ids. It makes one change at a time, through any router, and retries until the change is
acknowledged. The models that must be callable at the end are therefore known. All requests and answers are recorded.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from tests.chaos.history import Call, Change, History, Outcome, file_name
from tests.chaos.ways import Failed, Way
from tests.support import models
from tests.support.arena import Arena

CALL_TIMEOUT = 3.0  # seconds
PAUSE, FAILED_PAUSE = 0.02, 0.1  # seconds between two calls of a caller, after an answer and after a failure
CHANGE_PAUSE = 0.3  # seconds between two changes of a writer, on average

_NOTHING_DONE = frozenset({"ALREADY_EXISTS", "FAILED_PRECONDITION", "INVALID_ARGUMENT"})


@dataclass(slots=True)
class Numbers:
    """The numbers of files. Each number is answered by one file of one registration only."""

    last: int = 0

    def next(self) -> int:
        """Returns a number that no file has yet."""
        self.last += 1
        return self.last


async def call(history: History, way: Way, model: str, timeout: float = CALL_TIMEOUT) -> Call:
    began = time.monotonic()
    value, code, text = None, "OK", ""
    try:
        value = await way.infer(model, timeout)
    except Failed as failed:
        code, text = failed.code, failed.text
    made = Call(model, way.router, began, time.monotonic(), value, code, text)
    history.calls.append(made)
    return made


async def change(history: History, router: str, model: str, value: int | None, sent: Awaitable[None]) -> Change:
    began = time.monotonic()
    outcome, text = Outcome.DONE, ""
    try:
        await sent
    except Failed as failed:
        outcome = Outcome.REFUSED if failed.code in _NOTHING_DONE else Outcome.UNKNOWN
        text = str(failed)
    made = Change(model, value, began, time.monotonic(), outcome, router, text)
    history.changes.append(made)
    return made


class Caller:
    """Calls of all models by one client, some models far more often than others."""

    def __init__(self, history: History, way: Way, models: Sequence[str], seed: int) -> None:
        self._history = history
        self._way = way
        self._models = models
        self._weights = [1 / (rank + 1) for rank in range(len(models))]
        self._draw = random.Random(seed)

    async def run(self) -> None:
        while True:
            (model,) = self._draw.choices(self._models, self._weights)
            made = await call(self._history, self._way, model)
            await asyncio.sleep(PAUSE if made.value is not None else FAILED_PAUSE)


class Writer:
    """Sequential changes of the registrations of some models, each through a random client."""

    def __init__(
        self,
        arena: Arena,
        history: History,
        ways: Sequence[Way],
        models: Sequence[str],
        numbers: Numbers,
        seed: int,
    ) -> None:
        self._arena = arena
        self._history = history
        self._ways = ways
        self._models = models
        self._numbers = numbers
        self._draw = random.Random(seed)
        self._former: dict[str, int] = {}  # by model: the file that it was registered with last
        self.standing: dict[str, int | None] = {}  # the last acknowledged value by model; None if unregistered
        self.doing = ""  # the change that was begun and is not acknowledged
        self._refused = False  # whether the last attempt was refused
        self._go_on = asyncio.Event()
        self._go_on.set()

    async def fill(self) -> None:
        for model in self._models:
            await self.register(model)

    async def run(self) -> None:
        while True:
            await self._go_on.wait()
            model = self._draw.choice(self._models)
            if self.standing[model] is not None:
                await self.unregister(model)
            # Most models are registered again at once, as by a user with a new version, and some with the same file.
            if self.standing[model] is None and self._draw.random() < 0.8:
                act = self._draw.random()
                if act < 0.1:
                    await self.race(model)
                else:
                    await self.register(model, again=act < 0.2)
            await asyncio.sleep(self._draw.uniform(0, 2 * CHANGE_PAUSE))

    def pause(self) -> None:
        """Lets the writer finish its current change, and start no other."""
        self._go_on.clear()

    def resume(self) -> None:
        self._go_on.set()

    async def register(self, model: str, *, again: bool = False) -> None:
        """Registers a model with a new file, or with its former one, and retries until that is acknowledged."""
        value = self._former[model] if again else self._numbers.next()
        path = self._arena.mesh.write(file_name(model, value), models.constant(float(value)))
        load = self._draw.random() < 0.5
        self.doing = f"register {model} as {value}"
        while not await self._try(model, value, lambda way: way.register(model, path, load=load)):
            if self._refused:  # an earlier attempt took effect late: its registration has to be removed first
                await self.unregister(model)
                self.doing = f"register {model} as {value}"
            await asyncio.sleep(self._draw.uniform(0.05, 0.5))
        self.standing[model] = self._former[model] = value
        self.doing = ""

    async def race(self, model: str) -> None:
        """Registers two files concurrently, each through a random client; at most one can win. Unless exactly one is
        acknowledged, the model is removed again."""
        values = [self._numbers.next() for _ in range(2)]
        self.doing = f"register {model} as {values[0]} or {values[1]}"

        async def one(value: int) -> Change:
            path = self._arena.mesh.write(file_name(model, value), models.constant(float(value)))
            way = self._draw.choice(self._ways)
            return await change(self._history, way.router, model, value, way.register(model, path, load=False))

        made = await asyncio.gather(*(one(value) for value in values))
        won = [attempt.value for attempt in made if attempt.outcome is Outcome.DONE]
        if len(won) == 1:
            (self._former[model],) = (self.standing[model],) = won
            self.doing = ""
        else:
            await self.unregister(model)

    async def unregister(self, model: str) -> None:
        """Removes a model, and retries until that is acknowledged."""
        self.doing = f"unregister {model}"
        while not await self._try(model, None, lambda way: way.unregister(model)):
            await asyncio.sleep(self._draw.uniform(0.05, 0.5))
        self.standing[model] = None
        self.doing = ""

    async def _try(self, model: str, value: int | None, send: Callable[[Way], Awaitable[None]]) -> bool:
        way = self._draw.choice(self._ways)
        made = await change(self._history, way.router, model, value, send(way))
        self._refused = made.outcome is Outcome.REFUSED
        return made.outcome is Outcome.DONE
