"""What may be asked of a pod's loads, and what may come of it, as data that no transport knows."""

from dataclasses import dataclass, replace

from mesh.runtime.presence.verdicts import Elsewhere, Stale
from mesh.statuses import Reason
from placement.failures import Kind
from placement.footprint import NOTHING, Footprint


@dataclass(frozen=True, slots=True)
class Want:
    """What is to be loaded."""

    model_id: str
    revision: int  # create revision of the registration that is meant
    type: str
    path: str
    key: str = ""
    sha256: str = ""  # hex, of its file, where the registration names it
    footprint: Footprint = NOTHING  # as measured by an earlier load; none: unknown
    idle_ms: int = 0  # since the model's last use; 0: a caller waits
    expected_copies: int = 0
    reason: str = ""  # why it is loaded, and why here, for people
    pinned: bool = False  # no copy of it is evicted
    generation: int = 0  # a copy of an older one is replaced, once the new one can answer; 0: any will do

    def of_size(self, footprint: Footprint) -> "Want":
        """Returns the same, its size being known."""
        return replace(self, footprint=footprint)


@dataclass(frozen=True, slots=True)
class Loaded:
    """It can serve."""

    footprint: Footprint
    load_ms: int  # 0: it was there already, or somebody else's load was joined
    generation: int = 0  # of the registration's content
    digest: str = ""  # hex, of what it was loaded from
    blamed: bool = False  # servers have died in calls of it: its record says which requests it refuses


@dataclass(frozen=True, slots=True)
class Refused:
    """This pod cannot take it; the model is not to blame."""

    reason: Reason
    text: str
    needs: Footprint | None = None  # what it was found to need, where that is news and larger than this pod


@dataclass(frozen=True, slots=True)
class Failed:
    """It was tried and failed."""

    reason: Reason
    text: str
    kind: Kind = Kind.LASTING
    asked_ms: int = 0  # how long the store asks to be left alone
    digest: str = ""  # of the files that cannot be loaded
    again: bool = False  # nothing was tried: these very files have failed here before, as the record says


Outcome = Loaded | Elsewhere | Refused | Failed | Stale
