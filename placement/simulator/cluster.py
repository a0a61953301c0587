"""A simulated router and its pods, which make all decisions by `placement`.

As in a real mesh, the router chooses a pod (`choice`), and after a refusal asks another. The pod chooses victims by its
policy (`room.search`) and runs a few loads at a time; callers of a loading model wait for that load. Pods publish their
figures every two seconds; in between, the router debits the loads that it has sent (`debits`). Optionally the leader
plans copies every ten seconds.

Unlike in a real mesh, calls take no time, pods do not die, and a load takes exactly as long as its model says.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, replace

from placement import choice, copies, room
from placement.actions import ActionKind
from placement.debits import Debits
from placement.footprint import Footprint
from placement.pod import Candidate
from placement.policies import named
from placement.simulator.fleet import SimulatedModel

PUBLISH_MS = 2_000
PLAN_MS = 10_000
TRIES = 5
"""Number of pods that are asked for one load."""

_RATE_MS = 60_000


@dataclass(slots=True)
class Counts:
    """Counts of events. Each request is a hit, a wait for a load under way, a miss, or a refusal."""

    requests: int = 0
    hits: int = 0
    joined: int = 0
    misses: int = 0
    refused: int = 0
    loads: int = 0
    load_ms: int = 0  # sum over all loads
    loaded_bytes: int = 0
    evictions: int = 0


class _SimulatedPod:
    __slots__ = (
        "busy_until",
        "calls",
        "capacity",
        "changed",
        "copies",
        "loading",
        "name",
        "policy",
        "published",
        "used",
        "uses",
        "zone",
    )

    def __init__(self, name: str, capacity: int, policy: str, threads: int, zone: str) -> None:
        self.name = name
        self.capacity = capacity
        self.zone = zone
        self.used = 0
        self.uses: dict[str, tuple[int, int]] = {}
        self.copies: dict[str, int] = {}  # loaded ones: bytes
        self.loading: dict[str, int] = {}  # bytes
        self.policy = named(policy, self.uses.__getitem__)
        self.busy_until = [0] * threads  # of each loading thread
        self.calls = 0  # since the last publication
        self.changed = True
        self.published = Candidate(name, capacity, loading_threads=threads, zone=zone)


class Cluster:
    """A router and its pods. Times are in milliseconds and must not decrease."""

    def __init__(
        self,
        *,
        pods: int,
        capacity_bytes: int,
        policy: str = "lru",
        threads: int = 2,
        zones: int = 1,
        more_copies: bool = False,
        model: Callable[[str], SimulatedModel],
    ) -> None:
        """Sets up pods of `capacity_bytes` each. With `more_copies`, hot models get further copies. Raises ValueError
        for an unknown policy."""
        self.counts = Counts()
        self._pods = {
            name: _SimulatedPod(name, capacity_bytes, policy, threads, f"zone-{number % zones}" if zones > 1 else "")
            for number, name in enumerate(f"pod-{n}" for n in range(1, pods + 1))
        }
        self._view: list[Candidate] = [pod.published for pod in self._pods.values()]
        self._debits = Debits()
        self._model = model
        self._models: dict[str, SimulatedModel] = {}
        self._where: dict[str, list[_SimulatedPod]] = {}  # model -> pods that have it loaded
        self._under_way: dict[str, int] = {}  # model -> its loads under way
        self._events: list[tuple[int, int, str, str]] = []  # loads: (done at, tie, pod, model)
        self._ties = 0
        self._publish_at = PUBLISH_MS
        self._more_copies = more_copies
        self._plan_at = PLAN_MS
        self._calls: dict[str, int] = {}  # of each model, since the last plan
        self._peaks: dict[str, int] = {}
        self._loaded_at: dict[tuple[str, str], int] = {}

    def request(self, now: int, model_id: str) -> None:
        """Handles one call of a model at the time `now`, after everything that is due by then."""
        if now >= self._publish_at or (self._events and self._events[0][0] <= now):
            self._advance(now)
        counts = self.counts
        counts.requests += 1
        holders = self._where.get(model_id)
        if holders:
            pod = holders[0] if len(holders) == 1 else holders[counts.requests % len(holders)]
            pod.uses[model_id] = (now, pod.uses[model_id][1] + 1)
            pod.calls += 1
            counts.hits += 1
        elif model_id in self._under_way:
            self._joined(now, model_id)
            counts.joined += 1
        elif self._load(now, model_id, idle_ms=0):
            counts.misses += 1
        else:
            counts.refused += 1
        if self._more_copies:
            self._calls[model_id] = self._calls.get(model_id, 0) + 1

    def resident(self) -> int:
        """Counts the loaded copies."""
        return sum(len(pod.copies) for pod in self._pods.values())

    def used_share(self) -> float:
        """Returns the used share of the whole capacity, from 0 to 1."""
        return sum(pod.used for pod in self._pods.values()) / max(1, sum(pod.capacity for pod in self._pods.values()))

    # --- time ---

    def _advance(self, now: int) -> None:
        """Handles all events until now, in their order."""
        while True:
            done = self._events[0][0] if self._events else now + 1
            if done > now and self._publish_at > now:
                return
            if done <= self._publish_at:
                at, _, pod, model_id = heapq.heappop(self._events)
                self._finish(at, self._pods[pod], model_id)
            else:
                self._publish(self._publish_at)
                self._publish_at += PUBLISH_MS
                if self._more_copies and self._publish_at > self._plan_at:
                    self._plan(self._plan_at)
                    self._plan_at += PLAN_MS

    def _publish(self, now: int) -> None:
        for index, pod in enumerate(self._pods.values()):
            if pod.changed or pod.calls:
                first = pod.policy.walk(lambda key: True)
                pod.published = replace(
                    pod.published,
                    used_bytes=pod.used,
                    copies=len(pod.copies),
                    oldest_idle_ms=max(0, now - pod.uses[first[0]][0]) if first else 0,
                    loads_in_progress=len(pod.loading),
                    rate=pod.calls * 60_000 // PUBLISH_MS,
                )
                pod.changed = False
                pod.calls = 0
                self._view[index] = pod.published
                self._debits.published(pod.name, now)

    # --- loads ---

    def _load(self, now: int, model_id: str, *, idle_ms: int, pods: list[str] | None = None) -> bool:
        model = self._of(model_id)
        excluded: dict[str, str] = {pod.name: "holds a copy already" for pod in self._where.get(model_id, ())}
        for _ in range(TRIES):
            if pods is not None:
                name = pods.pop() if pods else None
            else:
                view = self._debits.apply(self._view, now)
                name = choice.choose(model_id, model.bytes, view, excluded=excluded, idle_ms=idle_ms).pod
            if name is None:
                return False
            if self._begin(now, self._pods[name], model_id, model, idle_ms):
                return True
            excluded[name] = "has no room"
        return False

    def _begin(self, now: int, pod: _SimulatedPod, model_id: str, model: SimulatedModel, idle_ms: int) -> bool:
        """Acts as the agent: finds room or refuses, then queues the load."""
        if model_id in pod.copies or model_id in pod.loading:
            return False

        def look(key: str) -> room.ResidentCopy:
            last, calls = pod.uses[key]
            spare = len(self._where.get(key, ())) - 1
            return room.ResidentCopy(
                key,
                pod.copies[key],
                now - last,
                other_copies=max(0, spare),
                standing=pod.policy.standing(key, now=now, spare=spare > 0),
                fresh=not calls and now - last < room.FRESH_MS,
            )

        found = room.search(
            room.Need.of_host(model.bytes, pod.capacity - pod.used, pod.capacity),
            pod.policy,
            look,
            idle_ms=idle_ms,
            spares={"": 1} if self._more_copies else None,
        )
        if found.verdict in (room.RoomVerdict.NO_ROOM, room.RoomVerdict.TOO_LARGE):
            return False
        for victim in found.victims:
            self._evict(now, pod, victim)
        pod.used += model.bytes
        pod.loading[model_id] = model.bytes
        pod.changed = True
        turn = heapq.heappop(pod.busy_until)
        done = max(turn, now) + model.load_ms
        heapq.heappush(pod.busy_until, done)
        self._ties += 1
        heapq.heappush(self._events, (done, self._ties, pod.name, model_id))
        self._debits.sent(pod.name, model.bytes, now, (pod.name, model_id))
        pod.uses[model_id] = (now - idle_ms, 0 if idle_ms else 1)
        self._under_way[model_id] = self._under_way.get(model_id, 0) + 1
        counts = self.counts
        counts.loads += 1
        counts.load_ms += model.load_ms
        counts.loaded_bytes += model.bytes
        return True

    def _joined(self, now: int, model_id: str) -> None:
        for pod in self._pods.values():
            if model_id in pod.loading:
                pod.uses[model_id] = (now, pod.uses[model_id][1] + 1)
                return

    def _finish(self, now: int, pod: _SimulatedPod, model_id: str) -> None:
        size = pod.loading.pop(model_id)
        pod.copies[model_id] = size
        pod.changed = True
        pod.policy.add(model_id, size=size, cost=self._models[model_id].load_ms)
        self._where.setdefault(model_id, []).append(pod)
        left = self._under_way[model_id] - 1
        if left:
            self._under_way[model_id] = left
        else:
            del self._under_way[model_id]
        self._debits.done((pod.name, model_id))
        self._loaded_at[pod.name, model_id] = now

    def _evict(self, now: int, pod: _SimulatedPod, model_id: str) -> None:
        self._drop(pod, model_id, evicted_at=now)
        self.counts.evictions += 1

    def _drop(self, pod: _SimulatedPod, model_id: str, *, evicted_at: int | None) -> None:
        pod.policy.remove(model_id, evicted_at=evicted_at)
        pod.used -= pod.copies.pop(model_id)
        del pod.uses[model_id]
        del self._loaded_at[pod.name, model_id]
        pod.changed = True
        holders = self._where[model_id]
        holders.remove(pod)
        if not holders:
            del self._where[model_id]

    def _of(self, model_id: str) -> SimulatedModel:
        model = self._models.get(model_id)
        if model is None:
            model = self._models[model_id] = self._model(model_id)
        return model

    # --- the leader ---

    def _plan(self, now: int) -> None:
        rates = {model_id: calls * 60_000 // PLAN_MS for model_id, calls in self._calls.items()}
        self._calls = {}
        self._peaks = {m: max(rates.get(m, 0), round(peak * 0.75)) for m, peak in {**self._peaks, **rates}.items()}
        self._peaks = {m: peak for m, peak in self._peaks.items() if peak}
        models = []
        for model_id, holders in self._where.items():
            if len(holders) == 1 and not rates.get(model_id):
                continue
            share = rates.get(model_id, 0) // len(holders)
            peak = self._peaks.get(model_id, 0) // len(holders)
            standing = tuple(
                copies.ReportedCopy(
                    pod.name, rate=share, peak_rate=peak, age_ms=now - self._loaded_at[pod.name, model_id]
                )
                for pod in holders
            )
            loading = tuple(
                copies.ReportedCopy(p.name, loaded=False) for p in self._pods.values() if model_id in p.loading
            )
            idle = now - max(pod.uses[model_id][0] for pod in holders)
            models.append(
                copies.ScaledModel(
                    model_id, Footprint(self._of(model_id).bytes), standing + loading, idle_ms=max(0, idle)
                )
            )
        plan = copies.plan(models, self._debits.apply(self._view, now))
        for action in plan.actions:
            pod = self._pods[action.pod]
            if action.kind is ActionKind.LOAD:
                self._load(now, action.model_id, idle_ms=action.idle_ms, pods=[action.pod])
            elif action.model_id in pod.copies and len(self._where[action.model_id]) > 1:
                self._drop(pod, action.model_id, evicted_at=None)
