"""The loads of a pod: how they begin, are joined, and end early. `loading` carries out each load.

A caller that asks for a model being loaded joins that load. The load is a separate task: it continues if a caller gives
up, but a withdrawal ends it. A model has one load at most. A copy or load of an older registration of the id is
withdrawn first. A request for a registration that is older than the one in this pod is refused as stale. A copy of an
older generation of the same registration stays, until the newer generation is loaded beside it and takes its place.
"""

import asyncio
from dataclasses import dataclass, replace

from mesh.process.tasks import Tasks
from mesh.runtime.cache.books.decisions import Decisions
from mesh.runtime.cache.books.entries import CacheEntry, EntryState
from mesh.runtime.cache.books.ledger import Ledger
from mesh.runtime.cache.books.meters import Meters
from mesh.runtime.cache.evictions.unloads import Unloads
from mesh.runtime.cache.evictions.victims import Victims
from mesh.runtime.cache.loads.admission import Admission
from mesh.runtime.cache.loads.gate import Gate
from mesh.runtime.cache.loads.loading import Loading
from mesh.runtime.cache.loads.outcomes import Failed, Loaded, Outcome, Refused, Want
from mesh.runtime.cache.loads.rooms import no_room
from mesh.runtime.presence.fence import Fence
from mesh.runtime.presence.verdicts import Stale
from mesh.runtime.servers.serverprocess import ServerProcess
from mesh.statuses import Reason
from mesh.telemetry import logs
from placement.modeltypes import ANY, takes

log = logs.get(__name__)

MAX_LOADS = 1024
"""Maximum number of loads in this pod, including waiting ones. When the maximum is reached, another pod is the better
choice."""

_ASK = 2.0  # seconds for the model server to say whether it has a model


class _LoadFlight:
    """A load in progress."""

    __slots__ = ("entry", "future", "stale", "task", "want", "withdrawn")

    def __init__(self, want: Want, entry: CacheEntry, future: "asyncio.Future[Outcome]") -> None:
        self.want = want
        self.entry = entry
        self.future = future
        self.task: asyncio.Task[None] | None = None
        self.withdrawn = ""  # why it must end
        self.stale = False  # withdrawn because its registration is not the current one

    def withdraw(self, why: str, *, stale: bool = False) -> None:
        """Ends the load. Its outcome is then Stale if `stale` is True, or else a refusal with the reason `why`."""
        if not self.withdrawn and self.task is not None:
            self.withdrawn = why
            self.stale = stale
            # Cancelled later, because a task that is cancelled before its first step does not even clean up.
            asyncio.get_running_loop().call_soon(self.task.cancel)


@dataclass(frozen=True, slots=True)
class LoadsStatistics:
    """The loads in numbers."""

    in_progress: int
    loads: int
    failures: int
    refusals: int


class Loads:
    """All loads of one pod."""

    def __init__(
        self,
        ledger: Ledger,
        victims: Victims,
        loading: Loading,
        admission: Admission,
        unloads: Unloads,
        gate: Gate,
        *,
        server: ServerProcess,
        fence: Fence,
        meters: Meters,
        decisions: Decisions,
        types: frozenset[str] = ANY,
    ) -> None:
        """Makes a pod's loads, of which there are none yet. `types` are the model types that the model server
        accepts."""
        self._ledger = ledger
        self._victims = victims
        self._loading = loading
        self._admission = admission
        self._unloads = unloads
        self._gate = gate
        self._server = server
        self._fence = fence
        self._meters = meters
        self._decisions = decisions
        self._types = types
        self._flights: dict[str, _LoadFlight] = {}
        self._tasks = Tasks()
        self._closed = ""
        self._loads = self._failures = self._refusals = 0

    async def load(self, want: Want) -> Outcome:
        """Loads a model, or joins its load, and returns the outcome. If the pod already has the copy, the outcome is
        Loaded, without another load. Cancellation ends the wait, not the load."""
        model_id = want.model_id
        aside = False
        if not takes(self._types, want.type):
            return self._note(want, _untaken(want, self._types))
        while True:
            flight, entry = self._flights.get(model_id), self._ledger.entries.get(model_id)
            if flight is not None and flight.entry.aside and entry is not None and _will_do(entry, want):
                flight = None  # its content is being reloaded, and the caller need not wait for that
            if flight is not None:
                if flight.want.revision == want.revision and not flight.withdrawn:
                    if not want.idle_ms:
                        self._admission.lift(flight.entry)
                    outcome = await asyncio.shield(flight.future)
                    return replace(outcome, load_ms=0) if isinstance(outcome, Loaded) else outcome
                if flight.want.revision > want.revision:
                    return Stale()
                flight.withdraw("it has been registered again", stale=True)
                await asyncio.wait({flight.future})
            elif entry is None:
                break
            elif entry.state is EntryState.LOADED and entry.revision == want.revision:
                held = await self._held(model_id)
                if entry not in self._ledger or entry.state is not EntryState.LOADED or entry.aside:
                    continue
                if held and _will_do(entry, want):
                    # If the answer were that the copy is here, routers would send calls, get *not here*, and ask again.
                    if (silent := self._silent()) is not None:
                        return self._note(want, silent)
                    entry.pinned = want.pinned
                    return Loaded(entry.measured, 0, entry.generation, entry.digest, entry.blamed)
                if held:
                    aside = True
                    break
                self._unloads.start(entry, "the model server no longer has it")
            elif entry.revision > want.revision:
                return Stale()
            else:
                if entry.state is EntryState.LOADED:
                    self._unloads.start(entry, "it has been registered again")
                await self._unloads.gone(model_id)
                await asyncio.sleep(0)
        refused = self._quick(want)
        if refused is None and aside and self._ledger.aside_of(model_id) is not None:
            text = "the old copy is still being unloaded, and a pod has at most two copies of a model: try again"
            refused = Refused(Reason.UNAVAILABLE, text)
        if refused is not None:
            return self._note(want, refused)
        entry = self._ledger.add(model_id, want.revision, idle_ms=want.idle_ms, aside=aside)
        entry.model_type, entry.pinned, entry.reason = want.type, want.pinned, want.reason
        flight = _LoadFlight(want, entry, asyncio.get_running_loop().create_future())
        self._flights[model_id] = flight
        flight.task = self._tasks.start(self._fly(flight), f"load {model_id}")
        return await asyncio.shield(flight.future)

    async def _held(self, model_id: str) -> bool:
        """Returns whether the model server still has the copy that the ledger lists. A server may lose a copy without
        dying, or unload it at another program's request, and the router that asks may have got *not here*."""
        spi = await self._server.ready(0.0)
        return spi is None or await spi.holds(model_id, timeout=_ASK)

    async def outdated(self, model_id: str, revision: int) -> bool:
        """Withdraws the copy or the load of a registration that is no longer current, as `withdraw` does. Requests that
        wait for the load get the outcome Stale."""
        return await self.withdraw(model_id, revision, "it is no longer registered, or registered again", stale=True)

    async def withdraw(self, model_id: str, revision: int, why: str, *, stale: bool = False) -> bool:
        """Withdraws a copy or a load of the registration `revision` (0 for any), and waits until the copy no longer
        answers calls.

        Returns True if such a copy or load was found. A copy being unloaded does not count.
        """
        had = False
        flight = self._flights.get(model_id)
        if flight is not None and revision in (0, flight.want.revision):
            had = True
            flight.withdraw(why, stale=stale)
            await asyncio.wait({flight.future})
        entry = self._ledger.entries.get(model_id)
        if entry is not None and revision in (0, entry.revision):
            if entry.state is EntryState.LOADED:
                had = True
                self._unloads.start(entry, why)
            await self._unloads.silent(model_id)
        return had

    def close(self, why: str) -> None:
        """Refuses loads from now on, and ends the loads that have not reached the model server."""
        self._closed = self._closed or why
        for flight in list(self._flights.values()):
            if flight.entry.state is not EntryState.LOADING:
                flight.withdraw(why)

    async def settle(self, timeout: float) -> None:
        """Waits at most `timeout` seconds for the loads under way, then ends them."""
        if self._flights:
            await asyncio.wait({flight.future for flight in self._flights.values()}, timeout=timeout)
        for flight in list(self._flights.values()):
            flight.withdraw(self._closed or "this pod is stopping")
        await self._tasks.settle(timeout=5.0)
        await self._tasks.close()

    def statistics(self) -> LoadsStatistics:
        """Returns the loads in numbers."""
        return LoadsStatistics(len(self._flights), self._loads, self._failures, self._refusals)

    def _quick(self, want: Want) -> Refused | None:
        """Returns a refusal if the load cannot begin, or None if it can."""
        if self._closed:
            return Refused(Reason.UNAVAILABLE, self._closed)
        if (why := self._gate.why_refused()) is not None:
            return why
        if len(self._flights) >= MAX_LOADS:
            return Refused(
                Reason.OVERLOADED,
                (
                    f"{len(self._flights)} loads are in progress in this pod, which accepts no more at the same "
                    "time: try again later"
                ),
            )
        if not want.footprint.total_bytes:
            return None
        keep = (want.model_id,)
        room = self._victims.room_for(want.footprint, idle_ms=want.idle_ms, keep=keep, for_whom=want.model_id)
        # A caller's load waits for conditions that will pass, once its files are here.
        return None if room.passes and not want.idle_ms else no_room(room)

    def _silent(self) -> Refused | None:
        """Returns a refusal if no copy may be reported as loaded now, because the fence forbids the model server to
        answer for any copy. Returns None if copies may be reported."""
        if not (why := self._fence.why_silent()):
            return None
        return Refused(Reason.UNAVAILABLE if self._closed else Reason.REGISTRY_AWAY, why)

    async def _fly(self, flight: _LoadFlight) -> None:
        want = flight.want
        outcome: Outcome = Refused(Reason.INTERNAL, "the load was not finished")
        try:
            outcome = await self._loading.run(want, flight.entry)
        except asyncio.CancelledError:
            why = f"the load was withdrawn: {flight.withdrawn or 'this pod is stopping'}"
            outcome = Stale() if flight.stale else Refused(Reason.UNAVAILABLE, why)
        except Exception:
            log.exception("loading failed inside the agent", model=want.model_id)
            outcome = Refused(Reason.INTERNAL, "internal error in the agent; its log has the cause")
        finally:
            del self._flights[want.model_id]
            if not flight.future.done():
                flight.future.set_result(self._note(want, outcome))

    def _note(self, want: Want, outcome: Outcome) -> Outcome:
        if isinstance(outcome, Loaded):
            self._loads += 1
        elif isinstance(outcome, Refused):
            self._refusals += 1
            self._meters.refused(outcome.reason.name)
            self._decisions.note("refuse", want.model_id, why=f"{outcome.reason.name}: {outcome.text}")
            log.info("load refused", model=want.model_id, reason=outcome.reason.name, why=outcome.text)
        elif isinstance(outcome, Failed) and not outcome.again:
            self._failures += 1
            self._meters.load_failures.inc()
            self._decisions.note("fail", want.model_id, why=outcome.text)
            log.warning("load failed", model=want.model_id, why=outcome.text)
        return outcome


def _untaken(want: Want, types: frozenset[str]) -> Refused:
    """Returns the refusal of a model type that the server does not accept. Routers choose pods by type, but a router's
    view may be older than this pod's present options."""
    taken = ", ".join(sorted(types))
    text = f"{want.model_id} is of type {want.type}, and this pod accepts only the types {taken} (--types)"
    return Refused(Reason.NOWHERE, text)


def _will_do(entry: CacheEntry, want: Want) -> bool:
    """Returns whether the copy satisfies the request."""
    return entry.state is EntryState.LOADED and entry.revision == want.revision and entry.generation >= want.generation
