"""The choice of a pod for a load. `placement` decides, based on the view and this worker's latest loads.

Cold starts, status and `explain` use this module.
"""

from collections.abc import Callable, Mapping

from mesh.modelservers import kinds
from mesh.schema import records
from placement import choice, footprint, modeltypes
from placement.constraints import NONE
from placement.debits import Debits
from placement.footprint import Footprint
from placement.pod import Candidate
from router.loads import asking
from router.state.dynamic import Current
from router.state.view import View

_CODE = "models of this type run code when they are loaded, so only pods with --allow-code accept them"


class Choosing:
    """The choices of one worker. `now` returns the time in seconds on the view's clock, `current` returns the current
    settings."""

    def __init__(self, view: View, *, now: Callable[[], float], current: Callable[[], Current] = Current) -> None:
        self._view = view
        self.now = now
        self._current = current
        self.debits = Debits()  # of loads sent and not published yet
        asking.settle(view, self.debits, self.now_ms)

    def now_ms(self) -> int:
        """Returns the time in milliseconds on the view's clock."""
        return round(self.now() * 1000)

    def candidates(self, model_id: str) -> list[Candidate]:
        """Returns the candidates for a load. Memory for loads that were just sent to a pod counts as used."""
        return self.debits.apply(self._view.candidates(self.now(), model_id), self.now_ms())

    def choose(
        self, model_id: str, record: records.ModelRecord, *, excluded: Mapping[str, str], idle_ms: int = 0
    ) -> choice.Choice:
        """Chooses a pod for a load of the model. `excluded` maps pods that must not be used to the reason.

        A load that was just sent to a pod may count twice for a while, once as sent and once as published. This may
        make another pod preferable, but must not cause a refusal. If it would, the choice ignores loads just sent, and
        the agents, which know their memory, decide. Likewise, a model is refused permanently only if none of the pods
        that have just gone could load it."""
        published = self._view.candidates(self.now(), model_id)
        asked = self._current().constraints
        preferences = asked.preferences(record.type, {pod.labels for pod in published}) if asked is not NONE else None
        holders = {copy.pod.name for copy in self._view.known(model_id)}
        need = self.footprint_of(record)

        def choose(pods: list[Candidate]) -> choice.Choice:
            return choice.choose(
                model_id,
                need,
                pods,
                excluded=excluded,
                idle_ms=idle_ms,
                model_type=record.type,
                constraint=asked.of(record.type),
                preferences=preferences,
                zones=[pod.zone for pod in pods if pod.name in holders],
            )

        debited = self.debits.apply(published, self.now_ms())
        chosen = choose(debited)
        if chosen.verdict is choice.ChoiceVerdict.NO_ROOM and debited != published:
            return choose(published)
        if chosen.verdict is choice.ChoiceVerdict.NOWHERE and (gone := self._view.gone()):
            return choose([*debited, *gone])
        return chosen

    def open_to(self, model_type: str) -> tuple[str, ...]:
        """Returns the names of the pods that accept models of that type and have the labels that it requires, and of
        pods whose records are not known yet. Takes O(pods)."""
        constraint = self._current().constraints.of(model_type)

        def accepts(record: records.PodRecord) -> bool:
            taken = modeltypes.takes(frozenset(record.types), model_type)
            return taken and not constraint.lacking(frozenset(record.labels))

        return tuple(name for name, pod in self._view.pods.items() if pod.record is None or accepts(pod.record))

    def footprint_of(self, record: records.ModelRecord) -> Footprint:
        """Returns the estimate for a load: the measurement of an earlier load, or if there is none, a figure derived
        from what the pods have published."""
        if record.host_bytes:
            return Footprint(record.host_bytes, record.device_bytes)
        return footprint.guess([pod.record for pod in self._view.pods.values() if pod.record is not None])

    def nowhere(self, model_id: str, record: records.ModelRecord) -> str:
        """Returns the reason why no pod can ever load the model, given its measured footprint. Returns "" if a pod can,
        or if the model was never measured."""
        if not record.host_bytes and not record.device_bytes:
            return ""
        chosen = self.choose(model_id, record, excluded={})
        return chosen.why if chosen.verdict is choice.ChoiceVerdict.NOWHERE else ""

    def untaken(self, model_type: str) -> str:
        """Returns the reason why no pod accepts models of that type, or "" if a pod does, or if the mesh has no
        pods."""
        served = [frozenset(pod.record.types) for pod in self._view.pods.values() if pod.record is not None]
        why = modeltypes.untaken(model_type, served)
        return f"{why}; {_CODE}" if why and kinds.runs_code(modeltypes.name_of(model_type)) else why

    def pinned(self, record: records.ModelRecord) -> bool:
        """Returns whether copies of the model are protected from eviction."""
        return bool(self._current().limits.of(record.type, record.limits).pinned)
