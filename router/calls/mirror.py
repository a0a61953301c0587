"""Shadow calls: a share of an alias's calls also goes to a second model, whose answers are compared and dropped.

Callers come first. A shadow call is sent a moment after its caller has been answered, to a loaded copy in a pod that is
not busy with callers' calls. It never waits, is never retried, and never causes more than one load at a time. Shadow
calls are dropped if too many are in flight, if they use too much memory, or if they would slow callers down
(`placement.shadowing`). Dropped calls are counted. A shadow that hangs or kills its server gets no calls for a while.

Answers are compared byte by byte, in all fields of a V2 reply except the model's name, its version and the `id`.
"""

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from mesh.telemetry import logs, metrics
from mesh.wire import encoding, framing, metadata
from mesh.wire import headers as names
from mesh.wire.budget import Budget
from mesh.wire.call import Header, Headers
from mesh.wire.client import Exchange, Lost, LostKind, Pool, Reply, ReplyStream
from placement.shadowing import Shadowing
from router.calls import replies
from router.calls.aliases import Alias
from router.calls.routes import Method
from router.state.pods import Copy, Pod
from router.state.view import View
from router.state.vmodels import Vmodels

log = logs.get(__name__)

MOST = 4
"""Maximum number of shadow calls in flight in one worker."""

EACH = 2
"""Maximum number of calls in flight to one alias's shadow in one worker."""

MAX_BYTES = 8 << 20
"""Maximum bytes of requests and answers that one worker keeps for shadows."""

BUSY = 4
"""Number of callers' calls in flight in a pod from which on the pod gets no shadow calls."""

TIMEOUT = 10.0
"""Seconds within which a shadow must answer."""

LOADS = 10.0
"""Seconds between two requests of one worker to load a shadow."""

LATER = 0.002
"""Seconds between a caller's answer and the shadow call, so that they do not compete for processors."""

PAUSE = 30.0
"""Seconds for which a shadow gets no calls after it has hung, or after its server was lost during a shadow call."""

_REMEMBERED = 32  # ended shadow calls that are kept, because callers' calls in flight may have run beside them
_NAMES = frozenset((0x0A, 0x12, 0x1A))  # tags of a ModelInferResponse's fields that are not compared


class Calls(Protocol):
    """The methods of a worker's forwarder (`router.calls.forwarder`) that shadows need."""

    view: View
    budget: Budget
    loop: asyncio.AbstractEventLoop

    def pick(self, copies: list[Copy]) -> Copy | None:
        """Returns the copy to call, or None if none may be called."""

    def must_verify(self, copy: Copy) -> bool:
        """Returns whether a record must be read before this copy may be called."""

    def has_room(self, copy: Copy) -> bool:
        """Returns whether the model may use one more connection to the pod."""

    def began(self, copy: Copy) -> None:
        """Counts a call that has been sent."""

    def ended(self, copy: Copy) -> None:
        """Counts a call that has ended."""

    def unsent(self, copy: Copy, pool: Pool | None, lost: Lost) -> bool:
        """Notes that a call could not be sent."""

    def lost(self, copy: Copy, lost: Lost) -> int:
        """Notes that a connection broke in the middle of a call."""


class Mirrored(NamedTuple):
    """An answered call, kept for its shadow."""

    method: Method
    headers: tuple[Header, ...]  # for the model server, including the names for the reply
    frame: bytes
    encoding: bytes
    code: int
    answer: bytes | None  # the frame of the reply
    began: float  # by `time.perf_counter`

    @property
    def size(self) -> int:
        """The size of the kept request and reply, in bytes."""
        return len(self.frame) + len(self.answer or b"")


class _ShadowSeries:
    __slots__ = ("different", "equal", "failed", "ms", "part", "shed")

    def __init__(self, ms: metrics.Distribution, part: metrics.Level, outcome: Callable[[str], metrics.Count]) -> None:
        self.ms = ms
        self.part = part
        self.equal, self.different = outcome("equal"), outcome("different")
        self.failed, self.shed = outcome("failed"), outcome("shed")


class _Shadow:
    """The state of one alias's shadow in this worker."""

    __slots__ = ("counts", "in_flight", "model", "paused_until", "shadowing")

    def __init__(self, model: str, counts: _ShadowSeries) -> None:
        self.model = model
        self.counts = counts
        self.shadowing = Shadowing()
        self.in_flight = 0
        self.paused_until = 0.0


class _ShadowCall:
    """One shadow call, which receives the events of its exchange."""

    __slots__ = ("_mirrors", "_timer", "began", "copy", "exchange", "mirrored", "pool", "shadow")

    takes_pieces = False

    def __init__(self, mirrors: "Mirrors", shadow: _Shadow, mirrored: Mirrored, copy: Copy, pool: Pool) -> None:
        self._mirrors = mirrors
        self.shadow = shadow
        self.mirrored = mirrored
        self.copy = copy
        self.pool = pool
        self.exchange: Exchange | None = None
        self.began = time.perf_counter()
        self._timer = mirrors.calls.loop.call_later(TIMEOUT, self._late)

    def on_beginning(self) -> None:
        """Does nothing: the bytes of the request stay counted until the shadow call ends."""

    def on_reply(self, reply: Reply) -> None:
        """Compares the answers, unless the pod refused the shadow call, which then counts as shed."""
        self._end()
        counts = self.shadow.counts
        _, refusal = replies.returned(reply.headers, self.copy.pod)
        if refusal is not None and reply.code:
            if refusal == names.NOT_HERE:
                self._mirrors.view.drop(self.copy)
            counts.shed.inc()
            return
        counts.ms.observe((time.perf_counter() - self.began) * 1000)
        if reply.code and not self.mirrored.code:
            counts.failed.inc()
        elif same(self.mirrored, reply):
            counts.equal.inc()
        else:
            counts.different.inc()

    def on_stream(self, stream: ReplyStream) -> None:
        """Drops a reply that arrives in parts, because only complete replies are compared, and counts the call as
        failed."""
        self._end()
        stream.cancel()
        self.shadow.counts.failed.inc()

    def on_lost(self, lost: Lost) -> None:
        """Counts a shadow call that was not answered as failed. Pauses the shadow if the call was sent."""
        self._end()
        self.shadow.counts.failed.inc()
        if lost.kind is LostKind.UNSENT:
            self._mirrors.calls.unsent(self.copy, self.pool, lost)
        else:
            self._mirrors.calls.lost(self.copy, lost)
            self._mirrors.pause(self.shadow, str(lost))

    def _late(self) -> None:
        assert self.exchange is not None
        self.exchange.cancel()
        self._end()
        self.shadow.counts.failed.inc()
        self._mirrors.pause(self.shadow, f"no answer within {TIMEOUT:g} s")

    def _end(self) -> None:
        self._timer.cancel()
        self.exchange = None
        self._mirrors.ended(self)

    def cancel(self) -> None:
        """Ends the call without counting it, because the worker is stopping."""
        if self.exchange is not None:
            self.exchange.cancel()
        self._end()


class Mirrors:
    """The shadows of one worker. `warm` starts to load a model, at most once within the given seconds. `uniform`
    returns random numbers."""

    def __init__(
        self,
        calls: Calls,
        vmodels: Vmodels,
        registry: metrics.Registry,
        *,
        warm: Callable[[str, float], None],
        uniform: Callable[[], float] = random.random,
    ) -> None:
        self.calls = calls
        self.view = calls.view
        self._warm = warm
        self._uniform = uniform
        self._vmodels = vmodels
        self._shadows: dict[str, _Shadow] = {}  # by alias
        self._in_flight: dict[Pod, int] = {}  # shadows' calls, by pod
        self._running: set[_ShadowCall] = set()
        self._held = 0  # bytes kept
        self._ran: deque[tuple[float, float]] = deque(maxlen=_REMEMBERED)  # begin and end of shadows' calls
        self._closed = False
        labels = ("alias", "model")
        self._ms = registry.histogram(
            "mesh_mirror_milliseconds", "Answered calls of shadows, by alias and shadow.", metrics.BUCKETS_MS, labels
        )
        self._part = registry.gauge(
            "mesh_mirror_part",
            "Part of its calls that a shadow gets without slowing callers down.",
            labels,
            merge="min",
        )
        self._outcomes = registry.counter(
            "mesh_mirror_calls",
            "Calls for shadows: answered with equal or different outputs, failed, or shed.",
            (*labels, "outcome"),
        )
        vmodels.listen(self._changed)

    def offer(self, alias: Alias, mirrored: Mirrored) -> None:
        """Accepts a call that has just been answered. If the call belongs to the shadow's share, it is soon sent to the
        shadow, or dropped and counted."""
        mirror = alias.mirror
        if mirror is None or not mirrored.method.infers:
            return
        shadow = self._shadow(alias.name, mirror.target)
        shadowing = shadow.shadowing
        shadowing.noted(time.perf_counter() - mirrored.began, beside=self._ran_at(mirrored.began))
        shadow.counts.part.set(shadowing.part)
        if self._uniform() * 100 >= mirror.percent:
            return
        size = mirrored.size
        if (
            shadowing.pauses
            or (shadowing.part < 1 and self._uniform() >= shadowing.part)
            or shadow.in_flight >= EACH
            or len(self._running) >= MOST
            or self._held + size > MAX_BYTES
            or self.calls.budget.held + size > self.calls.budget.large
            or self.calls.loop.time() < shadow.paused_until
        ):
            shadow.counts.shed.inc()
            return
        shadow.in_flight += 1
        self._held += size
        self.calls.budget.add(size)
        self.calls.loop.call_later(LATER, self._send, shadow, mirrored)

    def ended(self, call: _ShadowCall) -> None:
        """Frees the resources of a shadow call. The call itself calls this when it ends."""
        self._running.discard(call)
        self._ran.append((call.began, time.perf_counter()))
        pod = call.copy.pod
        left = self._in_flight.pop(pod) - 1
        if left:
            self._in_flight[pod] = left
        self.calls.ended(call.copy)
        self._release(call.shadow, call.mirrored)

    def pause(self, shadow: _Shadow, why: str) -> None:
        """Sends a shadow no calls for PAUSE seconds, and logs `why`."""
        shadow.paused_until = self.calls.loop.time() + PAUSE
        log.warning("a shadow gets no calls for a while", model=shadow.model, seconds=PAUSE, why=why)

    def close(self) -> None:
        """Ends all shadow calls and sends no more."""
        self._closed = True
        for call in tuple(self._running):
            call.cancel()

    def _ran_at(self, moment: float) -> bool:
        """Returns whether a shadow call was in flight at a moment of `time.perf_counter`."""
        if any(call.began <= moment for call in self._running):
            return True
        return any(began <= moment < ended for began, ended in self._ran)

    def _send(self, shadow: _Shadow, mirrored: Mirrored) -> None:
        copy = None if self._closed else self._copy(shadow.model)
        pool = None if copy is None else copy.pod.pool
        if copy is None or pool is None or len(self._running) >= MOST:
            self._shed(shadow, mirrored)
            return
        call = _ShadowCall(self, shadow, mirrored, copy, pool)
        self._running.add(call)
        self._in_flight[copy.pod] = self._in_flight.get(copy.pod, 0) + 1
        self.calls.began(copy)
        headers: Headers = mirrored.headers + copy.headers
        timeout = metadata.format_timeout(TIMEOUT)
        try:
            call.exchange = pool.send(
                mirrored.method.name, headers, mirrored.frame, call, timeout=timeout, encoding=mirrored.encoding
            )
        except ValueError as error:  # the caller's own call was sent with the same headers
            log.error("a call cannot be sent to its shadow", model=shadow.model, error=str(error))
            call.on_lost(Lost(LostKind.UNSENT, str(error)))

    def _copy(self, model: str) -> Copy | None:
        """Returns a copy of the shadow that may be called now. Returns None if callers need the pod or no copy is
        loaded."""
        calls = self.calls
        copies = self.view.copies.get(model)
        if copies is None:
            self._warm(model, LOADS)
            return None
        copy = calls.pick(copies)
        if copy is None or calls.must_verify(copy) or not calls.has_room(copy):
            return None
        pod = copy.pod
        return None if pod.in_flight + pod.load - self._in_flight.get(pod, 0) >= BUSY else copy

    def _shed(self, shadow: _Shadow, mirrored: Mirrored) -> None:
        shadow.counts.shed.inc()
        self._release(shadow, mirrored)

    def _release(self, shadow: _Shadow, mirrored: Mirrored) -> None:
        shadow.in_flight -= 1
        self._held -= mirrored.size
        self.calls.budget.give(mirrored.size)

    def _shadow(self, alias: str, model: str) -> _Shadow:
        found = self._shadows.get(alias)
        if found is None:
            counts = _ShadowSeries(
                self._ms.labels(alias, model),
                self._part.labels(alias, model),
                lambda outcome: self._outcomes.labels(alias, model, outcome),
            )
            found = self._shadows[alias] = _Shadow(model, counts)
        return found

    def _changed(self, alias: str) -> None:
        """Drops a shadow and its series if its alias no longer names the shadow."""
        shadow, record = self._shadows.get(alias), self._vmodels.get(alias)
        mirror = None if record is None else record.more.mirror
        if shadow is not None and (mirror is None or mirror.target != shadow.model):
            del self._shadows[alias]
            self._ms.forget(alias, shadow.model)
            self._part.forget(alias, shadow.model)
            for outcome in ("equal", "different", "failed", "shed"):
                self._outcomes.forget(alias, shadow.model, outcome)


def same(mirrored: Mirrored, reply: Reply) -> bool:
    """Returns whether a shadow's reply has the same outputs as the caller's, or the same error code."""
    if mirrored.code or reply.code:
        return mirrored.code == reply.code
    ours, theirs = mirrored.answer, reply.frame
    if ours is None or theirs is None:
        return ours is theirs
    if ours == theirs:
        return True
    if not mirrored.method.versioned or framing.is_compressed(ours) or framing.is_compressed(theirs):
        return False
    try:
        return list(_outputs(ours)) == list(_outputs(theirs))
    except ValueError:
        return False


def _outputs(frame: bytes) -> Iterator[memoryview]:
    """Yields the fields of a V2 reply, except the model's name and version and the `id`."""
    message = memoryview(frame)[framing.PREFIX :]
    before = 0
    for tag, _, end in encoding.fields(message):
        if tag not in _NAMES:
            yield message[before:end]
        before = end
