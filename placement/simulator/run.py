"""Simulation runs: a trace goes through a cluster, and its hit rates are measured."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from placement.simulator.cluster import Cluster, Counts
from placement.simulator.fleet import SimulatedModel

WINDOWS = 60
"""Number of points at which the course of the hit rate is recorded."""


@dataclass(frozen=True, slots=True)
class Setup:
    """The parameters of a simulation."""

    pods: int
    capacity_bytes: int  # of each pod
    policy: str = "lru"
    threads: int = 2
    zones: int = 1
    more_copies: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a simulation."""

    counts: Counts
    warm: Counts  # of the second half of the requests, after the empty mesh has filled
    resident: int  # copies at the end
    used_share: float  # of the capacity, at the end
    course: tuple[tuple[int, float], ...]  # (ms, hit rate of the requests since the previous point)


def hit_rate(counts: Counts) -> float:
    """Returns the share of requests that found their model loaded, from 0 to 1."""
    return counts.hits / counts.requests if counts.requests else 0.0


def load_seconds(counts: Counts) -> float:
    """Returns the seconds of loading for each 1,000 requests."""
    return counts.load_ms / counts.requests if counts.requests else 0.0


def run(
    requests: Iterable[tuple[int, str]],
    total: int,
    setup: Setup,
    model: Callable[[str], SimulatedModel],
    *,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Result:
    """Runs requests through a cluster. `total` is their number, and `on_progress` is called with the number handled so
    far. Raises ValueError if a request is earlier than the one before it."""
    cluster = Cluster(
        pods=setup.pods,
        capacity_bytes=setup.capacity_bytes,
        policy=setup.policy,
        threads=setup.threads,
        zones=setup.zones,
        more_copies=setup.more_copies,
        model=model,
    )
    counts = cluster.counts
    request = cluster.request
    step = max(1, total // WINDOWS)
    course: list[tuple[int, float]] = []
    hits = last = now = 0
    half = Counts()
    for number, (now, model_id) in enumerate(requests, 1):
        if now < last:
            raise ValueError(f"request {number}, at {now} ms, is earlier than the one before it, at {last} ms")
        last = now
        request(now, model_id)
        if number % step == 0:
            course.append((now, (counts.hits - hits) / step))
            hits = counts.hits
            on_progress(number)
        if number == total // 2:
            half = Counts(*(getattr(counts, name) for name in Counts.__slots__))
    warm = Counts(*(getattr(counts, name) - getattr(half, name) for name in Counts.__slots__))
    return Result(counts, warm, cluster.resident(), cluster.used_share(), tuple(course))
