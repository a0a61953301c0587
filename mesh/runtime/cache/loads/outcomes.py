"""Requests for loads and their outcomes, as data that does not depend on any transport."""

from dataclasses import dataclass, replace

from mesh.runtime.presence.verdicts import Elsewhere, Stale
from mesh.statuses import Reason
from placement.failures import FailureKind
from placement.footprint import NOTHING, Footprint


@dataclass(frozen=True, slots=True)
class Want:
    """A request for a load."""

    model_id: str
    revision: int  # create revision of the registration
    type: str
    path: str
    key: str = ""
    sha256: str = ""  # hex, of its file, if the registration names it
    footprint: Footprint = NOTHING  # measured by an earlier load; none: unknown
    idle_ms: int = 0  # since the model's last use; 0: a caller waits
    expected_copies: int = 0
    reason: str = ""  # why it is loaded, and why in this pod, for operators
    pinned: bool = False  # no copy of it is evicted
    generation: int = 0  # a copy of an older one is replaced, once the new one can answer; 0: any generation

    def of_size(self, footprint: Footprint) -> "Want":
        """Returns the request with a size that is now known."""
        return replace(self, footprint=footprint)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that can serve."""

    footprint: Footprint
    load_ms: int  # 0: it was loaded already, or another caller's load was joined
    generation: int = 0  # of the registration's content
    digest: str = ""  # hex, of the content that it was loaded from
    blamed: bool = False  # servers have died in calls of it: its record says which requests it refuses


@dataclass(frozen=True, slots=True)
class Refused:
    """A refusal of a load by this pod. It does not count as a failure of the model."""

    reason: Reason
    text: str
    needs: Footprint | None = None  # its measured need, if that is news and larger than this pod


@dataclass(frozen=True, slots=True)
class Failed:
    """A load that failed, now or earlier (`again`)."""

    reason: Reason
    text: str
    kind: FailureKind = FailureKind.LASTING
    asked_ms: int = 0  # how long the store asks for a pause
    digest: str = ""  # of the files that cannot be loaded; "": the files are not the cause, or unknown
    again: bool = False  # nothing was tried, because the record says that the same files have failed here before


Outcome = Loaded | Elsewhere | Refused | Failed | Stale
