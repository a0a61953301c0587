"""The watch over a server whose models run in its event loop, where a prediction that never ends blocks all others.

Such a server still accepts connections, because gRPC's own threads do that. So this module asks a question that only
the event loop can answer, one question at a time, and gives the server up if the answer takes too long. Silence is
allowed for as long as a load or a call that began before the question may legitimately take. Work that began later
cannot have blocked the question, so it is neither an excuse nor suspect.

The use board shows the agent which models were at work. At the end, this module marks there the models whose calls
began before the silence, also those whose callers have gone since, and no others.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager

import grpc

from mesh.process.tasks import turned
from mesh.runtime.relay.carried import Carried
from mesh.runtime.relay.link import LOOK, Link
from mesh.runtime.relay.table import RelayedCopy
from mesh.statuses import Code
from mesh.telemetry import logs

log = logs.get(__name__)

LONGEST = 180.0
"""Seconds for which one call may block the server, however late its deadline is. The chart's liveness probe ends a
silent MLServer after four minutes. The decision must come earlier, because afterwards nobody knows whom to blame."""

_OVERTAKING = 0.5  # seconds after a question within which a call on another connection may have come before it
_STEP = 0.5  # seconds between two looks while an answer is due

Question = Callable[[], Awaitable[object]]


class Silence:
    """The watch over one server. Times are in seconds of the monotonic clock."""

    def __init__(
        self, link: Link, ask: Question, *, hang_timeout: float, look: float = LOOK, step: float = _STEP
    ) -> None:
        """Makes a watch. `ask` asks the server's event loop a question and returns with the answer. A server that is
        silent for `hang_timeout` seconds without an excuse counts as hung. `look` is the pause before each question,
        `step` the time between two looks while an answer is due."""
        self.suspects: frozenset[RelayedCopy] | None = None  # once the server is given up
        self._link = link
        self._ask = ask
        self._hang_timeout = hang_timeout
        self._look = look
        self._step = step
        self._asked = math.inf  # when the question was asked that is not answered yet
        self._since = 0.0  # when the silence began, or its last excuse ended
        self._running: set[Carried] = set()
        self._left: dict[RelayedCopy, float] = {}  # the start of the first call that ended without an answer
        self._loads: dict[object, tuple[float, float]] = {}  # start and latest end of each load

    # --- the server's work

    def began(self, carried: Carried) -> None:
        """Notes that a call is sent to the server."""
        self._running.add(carried)

    def ended(self, carried: Carried, code: int) -> None:
        """Notes the end of a call. After a deadline or a cancellation, the server may still be running the model."""
        if carried not in self._running:
            return
        self._running.discard(carried)
        now, began = time.monotonic(), carried.began_ns / 1e9
        if code == Code.OK:
            self._since = now
        elif code in (Code.DEADLINE_EXCEEDED, Code.CANCELLED):
            self._left[carried.copy] = min(began, self._left.get(carried.copy, math.inf))
            if self._is_older(began) and now < began + LONGEST:
                self._since = now

    @contextmanager
    def loading(self, seconds: float, *, began: float | None = None) -> Iterator[None]:
        """Allows silence during a load that takes at most `seconds` from now. `began` is its start, by default now."""
        key = object()
        started = time.monotonic() if began is None else began
        self._loads[key] = (started, time.monotonic() + seconds)
        try:
            yield
        finally:
            del self._loads[key]
            if self._is_older(started):
                self._since = time.monotonic()

    # --- the watch

    async def run(self) -> None:
        """Asks one question after the other until the server is given up, and then waits until this task is
        cancelled."""
        while self.suspects is None:
            await asyncio.sleep(self._look)
            turned()
            if self._link.is_up:
                await self._question()
        await asyncio.Event().wait()  # this process ends

    def mark(self, copies: Iterable[RelayedCopy]) -> None:
        """Has the use board show which models may have blocked the server, if it was given up here. The process must
        end immediately afterwards."""
        if self.suspects is not None:
            for copy in copies:
                copy.row.accuse(copy in self.suspects)

    async def _question(self) -> None:
        self._asked = self._since = before = time.monotonic()
        answer = asyncio.ensure_future(self._ask())
        try:
            while self._link.is_up:
                await asyncio.wait({answer}, timeout=self._step)
                turned()
                if answer.done():
                    self._answered(answer)
                    return
                now = time.monotonic()
                if now - before > self._step + self._hang_timeout / 2:  # this process was stopped itself
                    self._since = now
                before = now
                if now > self._allowed():
                    self._give_up(now)
                    return
        finally:
            answer.cancel()
            self._asked = math.inf

    def _answered(self, answer: "asyncio.Future[object]") -> None:
        """Notes an answer. An error counts as an answer, unless the connection is lost, which the link notices."""
        error = answer.exception()
        if isinstance(error, grpc.aio.AioRpcError):
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                return
        elif error is not None:
            raise error
        self._left.clear()

    def _is_older(self, began: float) -> bool:
        """Returns whether work that began then may have come before the question."""
        return began <= self._asked + _OVERTAKING

    def _allowed(self) -> float:
        """Returns the time until which the silence is allowed."""
        ends = [until for began, until in self._loads.values() if self._is_older(began)]
        for carried in self._running:
            began, deadline = carried.began_ns / 1e9, carried.call.deadline
            if self._is_older(began):
                ends.append(min(began + LONGEST, math.inf if deadline is None else deadline))
        return max((self._since, *ends)) + self._hang_timeout

    def _give_up(self, now: float) -> None:
        running = {carried.copy for carried in self._running if self._is_older(carried.began_ns / 1e9)}
        left = {copy for copy, began in self._left.items() if self._is_older(began)}
        self.suspects = frozenset(running | left)
        names = ", ".join(sorted(copy.model_id for copy in self.suspects)[:10])
        log.error("model server blocked", seconds=round(now - self._asked, 1), running=names or "no model")
        self._link.give_up(
            f"has not answered for {now - self._asked:.0f} s, probably because a prediction does not end"
        )
