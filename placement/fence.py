"""Decides until when, and for which calls, a pod may answer: a lease alone is no fence.

A pod that is cut off from etcd keeps its models in memory, a router that is cut off keeps its view, and together they
would go on answering for a registration that is gone. So the agent grants its model server permission to answer, a
short time at a time, and the model server obeys by itself: when the agent stops, the permission runs out before etcd
lets go of the pod's keys.

What is permitted depends on what the agent can prove:

- *proven*: the lease was renewed a moment ago, and a key of this pod stands in etcd for every copy it holds. While
  those keys stand, nobody can have registered the ids anew, so every call may be answered.
- *verified*: the agent cannot prove it, and does not know etcd to be away: only calls whose router has just read the
  model's record are answered. Registering an id anew waits for the pods that may still hold its former life, so a
  record that stands unchanged proves the copy.
- *grace*: the agent knows that etcd is away. Calls whose router could not reach etcd either are answered too, for as
  long as the operator allows.
- *closed*: no call is answered.

Times are nanoseconds of one clock that goes on while the machine sleeps. The agent writes the permission into the use
board (`mesh.runtime.presence.fence`), the data port obeys it.
"""

import enum
from dataclasses import dataclass

SECOND = 1_000_000_000


class Mode(enum.IntEnum):
    """Which calls may be answered. The numbers stand in the use board."""

    CLOSED = 0
    PROVEN = 1
    GRACE = 2
    VERIFIED = 3


class Said(enum.Enum):
    """What a call says of its model's record."""

    NOTHING = "nothing"
    VERIFIED = "verified"  # its router has read the record within the last second: it stands unchanged
    AWAY = "etcd away"  # its router could not


class Verdict(enum.Enum):
    """What becomes of a call."""

    ANSWER = "answer"
    VERIFY_FIRST = "verify first"  # not run; the router reads the record and sends the call again
    NOT_HERE = "not here"  # not run; the router goes elsewhere


@dataclass(frozen=True, slots=True)
class Standing:
    """What an agent knows of its pod's standing at one moment. Times in nanoseconds, on one clock."""

    now: int
    ttl: int  # of the lease
    proof: int | None  # when the keep-alive was sent that etcd has answered last; None: there is no lease
    keyed: bool  # the pod's presence, and a key for every copy that may answer, stand under that lease
    away: bool  # an attempt to reach etcd has failed since the agent could last be sure
    last_proof: int  # the latest proof of this life, whichever lease it was for
    serve_without_etcd: int | None  # how long after `last_proof` calls may be answered; None: without end


@dataclass(frozen=True, slots=True)
class Permission:
    """Until when a pod may answer, and which calls. `why` is for people."""

    until: int
    mode: Mode
    why: str


def margin(ttl: int) -> int:
    """Returns by how much a proof ends before its lease: 2 s of 10, a fifth of a shorter one. Covers clocks that run at
    different speeds, and the moment between looking at the clock and answering."""
    return min(2 * SECOND, ttl // 5)


def pause(ttl: int) -> int:
    """Returns the time between two decisions: a second, or a tenth of a shorter lease, whose proof would end first."""
    return min(SECOND, ttl // 10)


def permit(standing: Standing) -> Permission:
    """Decides what the pod may answer until the agent decides again, about a second later."""
    now, ttl = standing.now, standing.ttl
    if standing.proof is not None and standing.keyed:
        proven = standing.proof + ttl - margin(ttl)
        # A proof that is about to end without a renewal is given up early, or calls would find the fence shut until
        # the agent's next look.
        if proven - now > margin(ttl):
            return Permission(proven, Mode.PROVEN, "the lease is held")
    until = now + ttl
    if standing.serve_without_etcd is not None:
        until = min(until, standing.last_proof + standing.serve_without_etcd)
        if until <= now:
            return Permission(0, Mode.CLOSED, "etcd has been away for longer than this pod may serve without it")
    if standing.away:
        return Permission(until, Mode.GRACE, "etcd is away")
    return Permission(until, Mode.VERIFIED, "not every copy has its key in etcd")


def judge(mode: Mode, until: int, now: int, said: Said) -> Verdict:
    """Decides what becomes of a call that arrives at `now` under a permission."""
    if mode is Mode.CLOSED or now >= until:
        return Verdict.NOT_HERE
    if mode is Mode.PROVEN or said is Said.VERIFIED:
        return Verdict.ANSWER
    if mode is Mode.GRACE and said is Said.AWAY:
        return Verdict.ANSWER
    return Verdict.VERIFY_FIRST
