"""The fence: which calls a pod may answer, and until when. A lease alone does not fence a pod off.

A pod that is cut off from etcd keeps its models in memory, a router that is cut off keeps its view, and together they
would continue to answer for a deleted registration. The agent therefore grants its model server permission to answer,
for a short time only, and the model server enforces this by itself: if the agent stops, the permission expires before
etcd deletes the pod's keys.

What is permitted depends on what the agent can prove:

- *proven*: the lease was renewed a moment ago, and etcd holds a key of this pod for each of its copies. While those
  keys exist, no id can have been registered again, so every call may be answered.
- *verified*: the agent can prove neither this, nor that etcd is unavailable: only calls whose router has just read the
  model's record are answered. Registering an id again waits for the pods that may still hold a copy of its former
  registration, so an unchanged record proves that the copy is valid.
- *grace*: the agent knows that etcd is unavailable. Calls whose router could not reach etcd either are answered too,
  for as long as the operator allows.
- *closed*: no call is answered.

Times are nanoseconds of one clock that also runs while the machine sleeps. The agent writes the permission to the use
board (`mesh.runtime.presence.fence`), and the data port obeys it.
"""

import enum
from dataclasses import dataclass

SECOND = 1_000_000_000


class Mode(enum.IntEnum):
    """The calls that may be answered. The numbers are the ones written to the use board."""

    CLOSED = 0
    PROVEN = 1
    GRACE = 2
    VERIFIED = 3


class Said(enum.Enum):
    """A call's statement about its model's record."""

    NOTHING = "nothing"
    VERIFIED = "verified"  # its router has read the record within the last second: it is unchanged
    AWAY = "etcd away"  # its router could not read it


class CallVerdict(enum.Enum):
    """The decision on a call."""

    ANSWER = "answer"
    VERIFY_FIRST = "verify first"  # not run; the router reads the record and sends the call again
    NOT_HERE = "not here"  # not run; the router goes elsewhere


@dataclass(frozen=True, slots=True)
class PodStanding:
    """An agent's knowledge of its pod's standing at one moment. Times in nanoseconds, on one clock."""

    now: int
    ttl: int  # of the lease
    proof: int | None  # when the last answered keep-alive was sent; None: there is no lease
    keyed: bool  # the pod's presence, and a key for every copy that may answer, are under that lease
    away: bool  # an attempt to reach etcd has failed since the agent could last be sure
    last_proof: int  # the latest proof of this life, for any lease
    serve_without_etcd: int | None  # time after `last_proof` in which calls may be answered; None: no limit


@dataclass(frozen=True, slots=True)
class Permission:
    """A pod's permission to answer: until when, and which calls. `why` is for people."""

    until: int
    mode: Mode
    why: str


def margin(ttl: int) -> int:
    """Returns how long before the end of its lease a proof expires: 2 s for a lease of 10 s, a fifth of a shorter
    lease. This allows for clocks that run at different speeds, and for the moment between a look at the clock and the
    answer."""
    return min(2 * SECOND, ttl // 5)


def pause(ttl: int) -> int:
    """Returns the time between two decisions: a second, or a tenth of a lease that is shorter than 10 s, so that the
    proof does not expire before the next decision."""
    return min(SECOND, ttl // 10)


def permit(standing: PodStanding) -> Permission:
    """Decides what the pod may answer until the agent decides again, about a second later."""
    now, ttl = standing.now, standing.ttl
    if standing.proof is not None and standing.keyed:
        proven = standing.proof + ttl - margin(ttl)
        # A proof that is about to expire is given up early, or calls would find the fence closed until the agent
        # decides again.
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


def judge(mode: Mode, until: int, now: int, said: Said) -> CallVerdict:
    """Decides on a call that arrives at `now` under a permission."""
    if mode is Mode.CLOSED or now >= until:
        return CallVerdict.NOT_HERE
    if mode is Mode.PROVEN or said is Said.VERIFIED:
        return CallVerdict.ANSWER
    if mode is Mode.GRACE and said is Said.AWAY:
        return CallVerdict.ANSWER
    return CallVerdict.VERIFY_FIRST
