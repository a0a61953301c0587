"""Pods as candidates for a load, in the form that `placement` needs."""

import functools
from collections.abc import Container, Iterable

import placement.pod
from mesh.schema import records
from mesh.telemetry import logs
from placement import rollout
from router.state.pods import Pod

log = logs.get(__name__)

AVOID = 1.0
"""Seconds for which a pod gets no calls after its data port could not be reached, and no loads after its agent did not
answer."""

LATELY = 300.0
"""Seconds for which a pod that has gone is expected to return, under the same name or another: after the restart of a
node, or in a rollout that stops a pod before it starts the next."""

_MAX_GONE = 1000  # pods


class Rollouts:
    """The pods that a rollout is about to replace."""

    def __init__(self) -> None:
        self.outgoing: dict[str, str] = {}  # the pods, and their replacements

    def look(self, pods: Iterable[Pod], now: float) -> None:
        """Updates `outgoing` from the pods' records. `now` is in seconds, on any clock that does not go back."""
        members = []
        for pod in pods:
            if pod.record is not None:
                pod.born = min(pod.born, now - pod.record.age_ms / 1000)  # the last report may be old
                members.append(rollout.Member(pod.name, int((now - pod.born) * 1000), frozenset(pod.record.labels)))
        before, self.outgoing = self.outgoing, rollout.outgoing(members)
        for name in self.outgoing.keys() - before.keys():
            log.info("a pod is being replaced: it gets loads only if no other pod can accept them", pod=name)


class Gone:
    """The pods that have gone recently.

    They distinguish a model that no pod accepts at the moment from one that no pod will ever accept. For example, the
    only pod for the model's type may be restarting."""

    def __init__(self) -> None:
        self._pods: dict[str, tuple[placement.pod.Candidate, float | None]] = {}  # and when a look first saw it gone

    def went(self, pod: Pod) -> None:
        """Notes that a pod has gone."""
        record = pod.record
        if record is None:
            return
        self._pods.pop(pod.name, None)
        while len(self._pods) >= _MAX_GONE:
            del self._pods[next(iter(self._pods))]
        gone = placement.pod.Candidate(
            name=pod.name,
            capacity_bytes=record.capacity_bytes,
            labels=frozenset(record.labels),
            zone=record.zone,
            accepts=False,
            why_not="has just gone, and may return",
            device_capacity_bytes=record.device_capacity_bytes,
            types=_types(record.types),
        )
        self._pods[pod.name] = gone, None

    def returned(self, name: str) -> None:
        """Notes that a pod has published itself."""
        self._pods.pop(name, None)

    def look(self, now: float) -> None:
        """Forgets pods that have been gone for more than LATELY. `now` is in seconds, on any clock that does not go
        back. Call this about once a second."""
        for name, (gone, since) in list(self._pods.items()):
            if since is None:
                self._pods[name] = gone, now
            elif now - since > LATELY:
                del self._pods[name]

    def candidates(self) -> list[placement.pod.Candidate]:
        """Returns the pods as candidates that accept no loads."""
        return [gone for gone, _ in self._pods.values()]


@functools.lru_cache(maxsize=256)
def _types(listed: tuple[str, ...]) -> frozenset[str]:
    """Returns the types of a pod. Equal sets are the same object, because a choice compares them by identity."""
    return frozenset(listed)


def of(pods: Iterable[Pod], *, now: float, model: str, outgoing: Container[str]) -> list[placement.pod.Candidate]:
    """Returns the candidates for a load of the model: the pods whose records are known. `now` is in seconds on the
    clock of `Pod.agent_failed_at`. `outgoing` contains the pods that a rollout is about to replace."""
    found = []
    for pod in pods:
        record = pod.record
        if record is None:
            continue
        why_not = ""
        if pod.suspect:
            why_not = "has lost its lease and may be gone"
        elif record.state != records.READY:
            why_not = "is leaving" if pod.leaving else f"is {record.state}"
        elif record.protocol[0] > records.PROTOCOL or record.protocol[1] < records.PROTOCOL - 1:
            low, high = record.protocol
            why_not = f"speaks versions {low} to {high} of the agents' protocol, this router version {records.PROTOCOL}"
        elif pod.agent_failed_at and now - pod.agent_failed_at < AVOID:
            why_not = "did not answer a moment ago"
        found.append(
            placement.pod.Candidate(
                name=pod.name,
                capacity_bytes=record.capacity_bytes,
                used_bytes=record.used_bytes,
                copies=record.copies,
                oldest_idle_ms=record.oldest_idle_ms,
                loads_in_progress=record.loads_in_progress,
                loading_threads=record.loading_threads,
                rate=record.rate,
                labels=frozenset(record.labels),
                zone=record.zone,
                accepts=not why_not,
                why_not=why_not,
                device_capacity_bytes=record.device_capacity_bytes,
                device_used_bytes=record.device_used_bytes,
                outgoing=pod.name in outgoing,
                on_disk=model in pod.disk,
                types=_types(record.types),
            )
        )
    return found
