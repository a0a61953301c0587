"""Where a load of a model would go now: the view, corrected by what this worker has just sent, put before `placement`.

Cold starts go by it, and status and `explain` tell it.
"""

from collections.abc import Callable, Mapping

from mesh.schema import records
from placement import choice, footprint
from placement.constraints import NONE
from placement.debits import Debits
from placement.footprint import Footprint
from placement.pod import Pod
from router.loads import asking
from router.state.dynamic import Current
from router.state.view import View


class Choosing:
    """One worker's. `now` is the time in seconds on the clock that the view is told; `current` are the settings."""

    def __init__(self, view: View, *, now: Callable[[], float], current: Callable[[], Current] = Current) -> None:
        self._view = view
        self.now = now
        self._current = current
        self.debits = Debits()  # of what was sent and is not published yet
        asking.settle(view, self.debits, self.now_ms)

    def now_ms(self) -> int:
        """Returns the time in milliseconds, on the same clock."""
        return round(self.now() * 1000)

    def candidates(self, model_id: str) -> list[Pod]:
        """Returns the pods as a load would look at them now, what was just sent to them included."""
        return self.debits.apply(self._view.candidates(self.now(), model_id), self.now_ms())

    def choose(
        self, model_id: str, record: records.ModelRecord, *, excluded: Mapping[str, str], idle_ms: int = 0
    ) -> choice.Choice:
        """Chooses a pod for a load of the model. `excluded` are pods not to use, and why.

        What was just sent to a pod may be counted twice for a while, once as sent and once as published. That is good
        enough to prefer another one, but no reason to refuse: then the agents decide, who know."""
        published = self._view.candidates(self.now(), model_id)
        asked = self._current().constraints
        preferences = asked.preferences(record.type, {pod.labels for pod in published}) if asked is not NONE else None
        holders = {copy.pod.name for copy in self._view.known(model_id)}
        need = self.footprint_of(record)

        def choose(pods: list[Pod]) -> choice.Choice:
            return choice.choose(
                model_id,
                need,
                pods,
                excluded=excluded,
                idle_ms=idle_ms,
                constraint=asked.of(record.type),
                preferences=preferences,
                zones=[pod.zone for pod in pods if pod.name in holders],
            )

        debited = self.debits.apply(published, self.now_ms())
        chosen = choose(debited)
        return choose(published) if chosen.verdict is choice.Verdict.NO_ROOM and debited != published else chosen

    def footprint_of(self, record: records.ModelRecord) -> Footprint:
        """Returns what a load is taken to need: measured by an earlier one, else guessed by the copies there are."""
        if record.host_bytes:
            return Footprint(record.host_bytes, record.device_bytes)
        return footprint.guess([pod.record for pod in self._view.pods.values() if pod.record is not None])

    def nowhere(self, model_id: str, record: records.ModelRecord) -> str:
        """Returns why no pod can ever hold the model, by what it was measured to need; "" where one can, or where
        nobody knows."""
        if not record.host_bytes and not record.device_bytes:
            return ""
        chosen = self.choose(model_id, record, excluded={})
        return chosen.why if chosen.verdict is choice.Verdict.NOWHERE else ""

    def pinned(self, record: records.ModelRecord) -> bool:
        """Returns whether copies of the model are kept from eviction."""
        return bool(self._current().limits.of(record.type, record.limits).pinned)
