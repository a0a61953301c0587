"""The history of all copies in etcd, which shows which pods could have answered a failed call."""

import asyncio
import time
from collections import defaultdict
from dataclasses import dataclass, field

from mesh.etcd import ChangeKind
from mesh.etcd.ranges import after_prefix
from mesh.etcd.watch import Watch
from mesh.schema.keys import TOMBSTONE
from mesh.schema.records import LOADED, CopyRecord
from tests.support.arena import Arena


@dataclass(slots=True)
class Span:
    """The time during which a pod had a copy. `ended` is infinite while the pod still has it."""

    pod: str
    began: float
    ended: float = float("inf")


@dataclass
class Copies:
    """The record of all copies. `follow` must run as a task from before the first load."""

    arena: Arena
    spans: dict[str, list[Span]] = field(default_factory=lambda: defaultdict(list))
    _open: dict[bytes, Span] = field(default_factory=dict)

    async def follow(self) -> None:
        """Follows the copies in etcd until the task is cancelled."""
        start = self.arena.keys.all_copies
        watch = await Watch.open(self.arena.truth.connection, start, after_prefix(start), 0)
        try:
            while True:
                for delta in await watch.read():
                    for event in delta.events:
                        self._note(event.kv.key, event.kv.value if event.kind is not ChangeKind.DELETE else None)
        finally:
            watch.cancel()

    def _note(self, key: bytes, value: bytes | None) -> None:
        now = time.monotonic()
        if self.arena.keys.copy_of(key)[1] == TOMBSTONE:
            return
        loaded = value is not None and CopyRecord.decode(value).state == LOADED
        span = self._open.get(key)
        if loaded and span is None:
            model, pod = self.arena.keys.copy_of(key)
            self._open[key] = Span(pod, now)
            self.spans[model].append(self._open[key])
        elif not loaded and span is not None:
            span.ended = now
            del self._open[key]

    def holders(self, model: str, began: float, ended: float) -> list[str]:
        """Returns the pods that had a copy during the complete period between the two moments."""
        return [span.pod for span in self.spans.get(model, ()) if span.began <= began and span.ended >= ended]

    def all_of(self, pod: str) -> list[str]:
        """Returns the models of which a pod has a copy at present."""
        return sorted({self.arena.keys.copy_of(key)[0] for key, span in self._open.items() if span.pod == pod})

    def held_by(self, pod: str) -> list[str]:
        """Returns the models of which only this pod has a copy at present."""
        found = []
        for model, spans in self.spans.items():
            here = {span.pod for span in spans if span.ended == float("inf")}
            if here == {pod}:
                found.append(model)
        return sorted(found)


async def cancelled(task: "asyncio.Task[None]") -> None:
    """Cancels a task. If the task had already failed, raises its error."""
    if not task.done():
        task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        pass
