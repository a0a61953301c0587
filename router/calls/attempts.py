"""The attempts of one call that got no answer: the outcome of each, and the next step by `placement.retry`.

`unary` and `streams` carry out the step: they call again, immediately or after a pause, verify the copy, or give up
with the error that was raised here. This module also notes what an attempt reveals about pods and copies. `unary` makes
an `Attempts` only once an attempt has got no answer.
"""

from mesh.statuses import MeshError, Reason
from mesh.wire import headers as names
from mesh.wire.client import Lost, LostKind, Pool
from placement import fence, retry
from placement.retry import Decision, End, Trouble
from router.calls import replies
from router.calls.forwarder import Forwarder
from router.fencing.verify import AWAY, NOTHING, VERIFIED, Said
from router.state.pods import Copy

_SAID = {NOTHING: fence.Said.NOTHING, VERIFIED: fence.Said.VERIFIED, AWAY: fence.Said.AWAY}


class Attempts:
    """The attempts of one call."""

    __slots__ = ("_deadline", "_forwarder", "_model_id", "_repeated", "_safe", "_tries", "tried")

    def __init__(self, forwarder: Forwarder, model_id: str, *, safe: bool, deadline: float | None) -> None:
        self._forwarder = forwarder
        self._model_id = model_id
        self._safe = safe
        self._deadline = deadline
        self._tries = 0
        self._repeated = False
        self.tried: list[Copy] = []
        """Copies that are not called again while another copy exists. A load empties the list."""

    def refused(self, copy: Copy, refusal: bytes, said: Said, *, kept: bool = True) -> Decision:
        """Decides what follows after a pod has refused the call without running anything. `refusal` is the name of the
        header that says why, and `said` is what the call stated about the record. `kept` is True if the complete
        request can be sent again. Like the methods below, raises MeshError if the call is given up."""
        verify = refusal == names.VERIFY_FIRST
        if verify and said is not VERIFIED:
            self._forwarder.not_verified(copy)
        trouble = Trouble.VERIFY_FIRST if verify else Trouble.NOT_HERE
        why = (
            f"{copy.pod.name} answers only once the record of the model is verified"
            if verify
            else f"{copy.pod.name} does not hold the model"
        )
        return self._after(copy, trouble, why, said=said, kept=kept)

    def lost(self, copy: Copy, pool: Pool | None, lost: Lost, *, kept: bool = True) -> Decision:
        """Decides what follows after the connection broke, or there was none to send the call on."""
        forwarder = self._forwarder
        if lost.kind is LostKind.UNSENT:
            trouble = Trouble.UNREACHED if forwarder.unsent(copy, pool, lost) else Trouble.BUSY
            return self._after(copy, trouble, lost.why, kept=kept)
        deaths = forwarder.lost(copy, lost)
        trouble = Trouble.BROKEN if lost.kind is LostKind.STARTED else Trouble.LOST
        return self._after(copy, trouble, lost.why, kept=kept, deaths=deaths)

    def missed(self, copy: Copy, *, kept: bool = True) -> Decision:
        """Decides what follows if the pod disappeared before anything could be sent to it."""
        return self._after(copy, Trouble.UNREACHED, f"{copy.pod.name} has gone", kept=kept)

    def _after(
        self, copy: Copy, trouble: Trouble, why: str, *, said: Said = NOTHING, kept: bool, deaths: int = 0
    ) -> Decision:
        forwarder = self._forwarder
        self._tries += 1
        # Only in these cases does the decision depend on other copies.
        alone = trouble is Trouble.BUSY or (trouble is Trouble.VERIFY_FIRST and said is AWAY)
        decision = retry.decide(
            retry.Try(
                trouble=trouble,
                tries=self._tries,
                safe=self._safe,
                repeated=self._repeated,
                kept=kept,
                said=_SAID[said],
                others=alone and forwarder.other(copy, self.tried),
                deaths=deaths,
                remaining=None if self._deadline is None else self._deadline - forwarder.loop.time(),
            )
        )
        if decision.forget:
            forwarder.meter.not_here.inc()
            forwarder.view.drop(copy)
        if decision.avoid:
            self.tried.append(copy)
        if decision.end is not None:
            raise self._error(decision, trouble, copy, why)
        if trouble is Trouble.LOST:
            self._repeated = True
            forwarder.meter.retried.inc()
        return decision

    def _error(self, decision: Decision, trouble: Trouble, copy: Copy, why: str) -> MeshError:
        end = decision.end
        if end is End.EXHAUSTED:
            text = (
                f"{self._tries} attempts to call {self._model_id} have reached no copy of it: try again; the last one "
                f"failed: {why}"
            )
            return MeshError(Reason.UNAVAILABLE, text, retry_after=1.0)
        if end is End.UNKEPT:
            text = (
                f"{self._model_id}: {why}, and too much of the request was sent for this router to repeat it: send it "
                "again"
            )
            return MeshError(Reason.UNAVAILABLE, text, retry_after=0)
        if end is End.BUSY:
            return MeshError(
                Reason.OVERLOADED, f"{self._model_id} cannot be called now: {why}: try again", retry_after=0.1
            )
        if trouble is Trouble.BROKEN:
            return replies.broken(why)
        text = (
            f"the connection to {copy.pod.name} was lost in the middle of the call: {why}. The router gave the call "
            f"up, because {decision.why}. The model may have run: send the call again only if it may run twice"
        )
        return MeshError(Reason.LOST, text)
