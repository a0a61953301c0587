"""A router's view of pods and copies: a mirror of etcd's `pods/` and `copies/`, corrected by the outcomes of calls.

To choose a copy, a call only reads the view. The view does no I/O, never waits and reads no clock. Changes arrive as
etcd published them, with all events of one revision together. This distinguishes a pod that *disappeared* from a pod
that withdrew a copy:

- If a pod's lease has ended and the pod never announced a drain, it and its copies become **suspect**. They may be
  alive (if etcd stalled, all leases ended at once), so they are still called, but get no loads, and are removed by the
  first call or probe that fails. They are restored when the pod publishes them again; a new incarnation replaces them.
- If a copy is deleted and its pod is not, the copy was withdrawn, and is forgotten immediately.

The outcomes of calls are newer than the mirror: a pod does not have the copy (`drop`), a load has ended (`loaded`), a
pod cannot be reached (`failed`). Later events of the mirror correct mistakes.

A copy is callable when it is loaded and belongs to the incarnation that its pod has published. The view also has copies
that are being loaded, so that callers join that load instead of starting another.
"""

import math
from collections.abc import Callable, Container, Iterable

import placement.pod
from mesh.schema import idset, records
from mesh.schema.keys import Keys
from mesh.telemetry import logs
from mesh.wire.client import Pool
from router.state import candidates, published
from router.state.feed.ranges import Item
from router.state.lives import Lives
from router.state.pods import Copy, News, Pod
from router.state.published import CopySaid, LifeSaid, PodSaid, TombstoneSaid

log = logs.get(__name__)

SETTLE = 30.0
"""Seconds after a pod's return after which copies that it has not published are forgotten, because it has unloaded
them."""


class View:
    """The pods and copies that a router knows. `connect` makes the pool of connections to a data address."""

    def __init__(self, keys: Keys, connect: Callable[[str], Pool]) -> None:
        self._keys = keys
        self._connect = connect
        self._known: dict[str, dict[str, Copy]] = {}  # every copy, by model and pod; no empty ones
        self._listeners: list[Callable[[str, News], None]] = []
        self._watchers: dict[str, list[Callable[[], None]]] = {}
        self._retired: list[Pool] = []
        self._rollouts = candidates.Rollouts()
        self._gone = candidates.Gone()
        self.revision = 0
        self.pods: dict[str, Pod] = {}
        self.copies: dict[str, list[Copy]] = {}
        """The copies that may be called, by model. A list is replaced, never changed, and never empty."""
        self.lives = Lives()

    # --- the mirror ---

    def snapshot(self, revision: int, items: Iterable[Item]) -> None:
        """Receives the complete state at one revision. Pods that are missing have disappeared, and copies that are
        missing were withdrawn."""
        pods: dict[str, records.PodRecord] = {}
        copies: dict[tuple[str, str], records.CopyRecord] = {}
        self.lives.clear()
        for said in published.read(self._keys, items):
            match said:
                case CopySaid(model, name, records.CopyRecord() as copy_record):
                    copies[model, name] = copy_record
                case PodSaid(name, records.PodRecord() as pod_record):
                    pods[name] = pod_record
                case LifeSaid() | TombstoneSaid():
                    self.lives.take(said)
        for pod in list(self.pods.values()):
            if pod.name not in pods:
                self._vanished(pod, still_there={model for model, name in copies if name == pod.name})
                continue
            for copy in list(pod.copies.values()):
                if (copy.model, pod.name) not in copies:
                    self._remove(copy)
        for name, pod_record in pods.items():
            self._publish_pod(name, pod_record)
        for (model, name), copy_record in copies.items():
            self._publish_copy(model, name, copy_record)
        self.revision = revision

    def delta(self, revision: int, items: Iterable[Item]) -> None:
        """Receives all events of one revision."""
        events = list(published.read(self._keys, items))
        gone = {said.name for said in events if isinstance(said, PodSaid) and said.record is None}
        for name in gone:
            if (pod := self.pods.get(name)) is not None and pod.record is not None and not pod.suspect:
                self.lives.gone(name, pod.record.incarnation, revision)
        for said in events:
            match said:
                case CopySaid(model, name, None):
                    if name not in gone and (copy := self._known.get(model, {}).get(name)) is not None:
                        self._withdraw(copy)
                case CopySaid(model, name, records.CopyRecord() as copy_record):
                    self._publish_copy(model, name, copy_record)
                case PodSaid(name, records.PodRecord() as pod_record):
                    self._publish_pod(name, pod_record)
                case LifeSaid() | TombstoneSaid():
                    self.lives.take(said)
        for name in gone:
            if (pod := self.pods.get(name)) is not None:
                self._vanished(pod)
        self.revision = revision

    def _publish_pod(self, name: str, record: records.PodRecord) -> None:
        pod = self._pod(name)
        self._gone.returned(name)
        old = pod.record
        if old is None or (old.incarnation, old.data_address) != (record.incarnation, record.data_address):
            self._retire(pod)
            pod.pool = self._connect(record.data_address)
            pod.load = 0
        pod.record = record
        if old is None or old.disk != record.disk:
            pod.disk = _disk(name, record.disk)
        pod.suspect = pod.wary = False
        pod.failed_at = pod.agent_failed_at = 0.0
        self.lives.present(name, record.incarnation)
        if old is None or old.incarnation != record.incarnation:
            pod.born = math.inf
            for copy in list(pod.copies.values()):
                if copy.record.incarnation == record.incarnation:
                    self._index(copy.model)
                else:
                    self._remove(copy)
        self._tell(name, News.PUBLISHED)

    def _publish_copy(self, model: str, name: str, record: records.CopyRecord) -> None:
        pod = self._pod(name)
        known = pod.copies.get(model)
        if known is not None and known.answered and _behind(record, known.record):
            return
        if known is not None and known.token == record.token:
            known.record = record
            known.suspect = known.answered = False
        else:
            pod.copies[model] = self._known.setdefault(model, {})[name] = Copy(model, pod, record)
        self._index(model)

    def _vanished(self, pod: Pod, still_there: Container[str] = ()) -> None:
        """Handles the end of a pod's presence. The pod becomes suspect, or is removed if it had announced a drain, had
        failed, or has no copies."""
        if not pod.leaving and not pod.failed_at:
            pod.suspect = pod.unsettled = True
            pod.unsettled_since = 0.0
            for copy in list(pod.copies.values()):
                if copy.callable:
                    copy.suspect = copy.model not in still_there
                elif copy.model not in still_there:
                    self._remove(copy)
            if pod.copies:
                log.warning("a pod disappeared without notice", pod=pod.name, copies=len(pod.copies))
                self._tell(pod.name, News.SUSPECT)
                return
        self._forget(pod)

    # --- news from calls and loads ---

    def loaded(self, model: str, pod: Pod, record: records.CopyRecord) -> Copy | None:
        """Notes an agent's answer that its pod has loaded the copy. Returns the copy, or None if the pod has gone or
        the answer is from another incarnation."""
        if pod.record is None or pod.record.incarnation != record.incarnation or self.pods.get(pod.name) is not pod:
            return None
        known = pod.copies.get(model)
        if known is not None and known.token == record.token and known.loaded and not (known.answered or known.suspect):
            return known  # the mirror learned of it first
        self._publish_copy(model, pod.name, record)
        copy = pod.copies[model]
        copy.answered = True
        return copy

    def drop(self, copy: Copy) -> None:
        """Removes a copy because a call has shown that the pod does not have it."""
        if copy.pod.copies.get(copy.model) is copy:
            self._withdraw(copy)

    def failed(self, pod: Pod, now: float) -> None:
        """Notes that the pod's data port, or a suspect's agent, was unreachable at `now` (seconds, any clock). Removes
        a suspect pod."""
        pod.failed_at = now or 1e-9
        # The failure may be reported long after the pod was forgotten, when another incarnation has its name.
        if pod.suspect and self.pods.get(pod.name) is pod:
            log.warning("a suspect pod does not answer and is removed", pod=pod.name, copies=len(pod.copies))
            self._forget(pod)

    def settle(self, now: float, *, away: bool = False) -> None:
        """Forgets copies that did not come back with their pod, and updates which pods are being replaced. Call this
        about once a second. `away` is True while etcd does not answer this router."""
        self._rollouts.look(self.pods.values(), now)
        self._gone.look(now)
        for pod in list(self.pods.values()):
            # A pod that is still wary says so again. But if it stays cut off while etcd is unavailable, each time costs
            # a call a second try, and ends a stream that is too long to be sent twice.
            pod.wary = pod.wary and away
            if not pod.unsettled or pod.suspect:
                continue
            left = [copy for copy in pod.copies.values() if copy.suspect]
            if not left:
                pod.unsettled = False
            elif not pod.unsettled_since:
                pod.unsettled_since = now
            elif now - pod.unsettled_since > SETTLE:
                for copy in left:
                    self._remove(copy)

    # --- questions ---

    def published(self, pod: str) -> records.PodRecord | None:
        """Returns the record of a pod, or None if the pod is suspect or not published."""
        found = self.pods.get(pod)
        return None if found is None or found.suspect else found.record

    def open_lives(self) -> list[tuple[str, str]]:
        """Returns the pod and incarnation of each life that is open: its pod is not published with that incarnation."""
        return [
            (pod, incarnation)
            for pod, incarnation in self.lives.standing
            if (record := self.published(pod)) is None or record.incarnation != incarnation
        ]

    def known(self, model: str) -> Iterable[Copy]:
        """Returns every known copy of the model, including those being loaded."""
        return tuple(self._known.get(model, {}).values())

    def models(self) -> Iterable[str]:
        """Returns the models with a copy anywhere, including those being loaded."""
        return self._known.keys()

    def several(self) -> list[str]:
        """Returns the models with more than one copy, including those being loaded. Takes 30 ns per model."""
        return [model for model, pods in self._known.items() if len(pods) > 1]

    def candidates(self, now: float, model: str) -> list[placement.pod.Candidate]:
        """Returns the candidates for a load of the model."""
        return candidates.of(self.pods.values(), now=now, model=model, outgoing=self._rollouts.outgoing)

    def gone(self) -> list[placement.pod.Candidate]:
        """Returns the pods that have gone recently, as candidates that accept no loads."""
        return self._gone.candidates()

    # --- listeners ---

    def listen(self, listener: Callable[[str, News], None]) -> None:
        """Registers a listener, which is called with a pod's name when the pod publishes itself, becomes suspect, or
        is removed from the view."""
        self._listeners.append(listener)

    def watch(self, model: str, callback: Callable[[], None]) -> Callable[[], None]:
        """Calls back whenever the copies of a model change. Returns a function that ends the watch."""
        self._watchers.setdefault(model, []).append(callback)

        def unwatch() -> None:
            callbacks = self._watchers.get(model, [])
            if callback in callbacks:
                callbacks.remove(callback)
            if not callbacks:
                self._watchers.pop(model, None)

        return unwatch

    def close(self) -> None:
        """Closes the pools of connections to all pods. Calls in flight continue."""
        for pod in self.pods.values():
            self._retire(pod)

    # --- inside ---

    def _pod(self, name: str) -> Pod:
        pod = self.pods.get(name)
        if pod is None:
            pod = self.pods[name] = Pod(name)
        return pod

    def _index(self, model: str) -> None:
        callable_ = [copy for copy in self._known.get(model, {}).values() if copy.callable]
        if callable_:
            self.copies[model] = callable_
        else:
            self.copies.pop(model, None)
        for callback in tuple(self._watchers.get(model, ())):
            callback()

    def _withdraw(self, copy: Copy) -> None:
        """Removes a copy. If this was the last copy of a suspect pod, removes the pod too."""
        self._remove(copy)
        if copy.pod.suspect and not copy.pod.copies:
            self._forget(copy.pod)

    def _remove(self, copy: Copy) -> None:
        del copy.pod.copies[copy.model]
        pods = self._known[copy.model]
        del pods[copy.pod.name]
        if not pods:
            del self._known[copy.model]
        self._index(copy.model)

    def _forget(self, pod: Pod) -> None:
        for copy in list(pod.copies.values()):
            self._remove(copy)
        self._retire(pod)
        del self.pods[pod.name]
        self._gone.went(pod)
        self._tell(pod.name, News.GONE)

    @staticmethod
    def _retire(pod: Pod) -> None:
        if pod.pool is not None:
            pod.pool.close()  # calls in flight continue
            pod.pool = None

    def _tell(self, name: str, news: News) -> None:
        for listener in self._listeners:
            listener(name, news)


def _behind(news: records.CopyRecord, answered: records.CopyRecord) -> bool:
    """Returns whether the mirror's news about a copy is older than the agent's answer, because it shows the claim or
    the old content."""
    if (news.incarnation, news.create_revision) != (answered.incarnation, answered.create_revision):
        return False
    return news.state != records.LOADED or news.generation < answered.generation


def _disk(pod: str, text: str) -> idset.IdSet:
    try:
        return idset.IdSet.decode(text)
    except ValueError as error:
        log.warning("the list of models on a pod's disk cannot be read", pod=pod, error=str(error))
        return idset.EMPTY
