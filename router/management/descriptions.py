"""Pods in the form for people: the data that they have published, and the reports of their agents."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from mesh.pb import agent_pb2
from router.state.view import View


@dataclass(frozen=True, slots=True)
class PodInfo:
    """A published pod in this router's view. Sizes are in bytes."""

    pod: str
    state: str
    suspect: bool
    incarnation: str
    data: str  # its addresses
    control: str
    probe: str
    labels: tuple[str, ...]
    types: tuple[str, ...]  # of models that its server takes; none: any
    zone: str
    capacity: int
    used: int
    device_capacity: int
    device_used: int
    oldest_idle_ms: int
    oldest_unused: bool
    copies: int
    loading: int
    threads: int
    rate: int  # calls a minute
    in_flight: int  # calls of this worker
    load: int  # calls in flight, by its last report
    observed: int  # host memory that a foreign server's models take, as seen from outside
    factor: float  # by which its books count sizes; 0: the server is ours
    unobserved: str  # why that memory is not observed


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """Progress of a load: its state, the number of loads before it, and the ms until it should be done, or 0 if
    unknown."""

    state: str
    ahead: int
    expected_ms: int


@dataclass(frozen=True, slots=True)
class PullProgress:
    """Progress of the pull of a model's files: bytes done, bytes in total (0 if unknown), bytes per second."""

    bytes: int
    of: int
    rate: int


@dataclass(frozen=True, slots=True)
class CopyDescription:
    """An agent's description of a copy."""

    model_id: str
    create_revision: int
    state: str
    host_bytes: int
    device_bytes: int
    idle_ms: int
    calls: int
    in_flight: int
    busy_us: int
    load_ms: int
    age_ms: int
    generation: int
    digest: str
    pull: PullProgress | None
    load: LoadProgress | None


@dataclass(frozen=True, slots=True)
class PodDescription:
    """An agent's description of itself."""

    pod: str
    incarnation: str
    state: str
    capacity_bytes: int
    used_bytes: int
    device_capacity_bytes: int
    device_used_bytes: int
    resident_bytes: int
    observed_bytes: int  # of a foreign server's models, as seen from outside
    accounted_bytes: int  # what the books say of them
    factor: float  # by which the books count them; 0: the server is ours
    observed: str  # observed processes
    unobserved: str  # why nothing is observed
    copies: tuple[CopyDescription, ...]
    decisions: tuple[Any, ...]
    counters: dict[str, int]


def published(view: View) -> Iterable[PodInfo]:
    """Yields every pod whose record this router knows, suspect ones too, ordered by name."""
    for pod in sorted(view.pods.values(), key=lambda pod: pod.name):
        record = pod.record
        if record is None:
            continue
        yield PodInfo(
            pod=pod.name,
            state=record.state,
            suspect=pod.suspect,
            incarnation=record.incarnation,
            data=record.data_address,
            control=record.control_address,
            probe=record.probe_address,
            labels=tuple(record.labels),
            types=record.types,
            zone=record.zone,
            capacity=record.capacity_bytes,
            used=record.used_bytes,
            device_capacity=record.device_capacity_bytes,
            device_used=record.device_used_bytes,
            oldest_idle_ms=record.oldest_idle_ms,
            oldest_unused=record.oldest_unused,
            copies=record.copies,
            loading=record.loads_in_progress,
            threads=record.loading_threads,
            rate=record.rate,
            in_flight=pod.in_flight,
            load=pod.load,
            observed=record.observed_bytes,
            factor=record.factor,
            unobserved=record.unobserved,
        )


def described(reply: agent_pb2.DescribeReply) -> PodDescription:
    """Returns the description in an agent's reply."""
    return PodDescription(
        pod=reply.pod,
        incarnation=reply.incarnation,
        state=reply.state,
        capacity_bytes=reply.capacity_bytes,
        used_bytes=reply.used_bytes,
        device_capacity_bytes=reply.device_capacity_bytes,
        device_used_bytes=reply.device_used_bytes,
        resident_bytes=reply.resident_bytes,
        observed_bytes=reply.observed_bytes,
        accounted_bytes=reply.accounted_bytes,
        factor=reply.factor,
        observed=reply.observed,
        unobserved=reply.unobserved,
        copies=tuple(_copy(copy) for copy in reply.copies),
        decisions=tuple(decision(text) for text in reply.decisions),
        counters=dict(reply.counters),
    )


def _copy(copy: agent_pb2.CopyState) -> CopyDescription:
    return CopyDescription(
        model_id=copy.model_id,
        create_revision=copy.create_revision,
        state=copy.state,
        host_bytes=copy.host_bytes,
        device_bytes=copy.device_bytes,
        idle_ms=copy.idle_ms,
        calls=copy.calls,
        in_flight=copy.in_flight,
        busy_us=copy.busy_us,
        load_ms=copy.load_ms,
        age_ms=copy.age_ms,
        generation=copy.generation,
        digest=copy.digest,
        pull=pull(copy),
        load=load(copy),
    )


def load(copy: agent_pb2.CopyState) -> LoadProgress | None:
    """Returns the progress of a load, or None if the copy is not being loaded."""
    if copy.state in ("loaded", "unloading"):
        return None
    return LoadProgress(copy.state, copy.ahead, copy.expected_ms)


def pull(copy: agent_pb2.CopyState) -> PullProgress | None:
    """Returns the progress of a pull, or None if none is under way."""
    if copy.state != "pulling":
        return None
    return PullProgress(copy.pulled_bytes, copy.pull_bytes, copy.pull_rate)


def decision(text: str) -> Any:
    """Returns an agent's decision: the parsed JSON, or the text itself if it is not JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return text


ANOTHER = "another model"
"""The text in place of the id of a model that the caller may not read."""


def without(text: str, readable: Callable[[str], bool]) -> str:
    """Returns the text of an agent's decision, with ANOTHER in place of the ids of models that are not readable. (The
    decision's reason names no other models.)"""
    found = decision(text)
    if not isinstance(found, dict) or not isinstance(models := found.get("models"), list):
        return text
    shown = [one if readable(str(one)) else ANOTHER for one in models]
    return text if shown == models else json.dumps({**found, "models": shown})
