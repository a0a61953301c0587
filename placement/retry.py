"""The retry policy: whether, where and when a call without an answer is sent again, or given up.

One rule for unary calls and streams; they only differ in whether all that was sent is still available.

| outcome of the attempt | then |
| --- | --- |
| not here: the pod holds no such copy | that copy is forgotten; another one, or a load |
| verify first: the pod must not answer before the record is read | read it, then the same copy again |
| verify first, and etcd is away for this router only | another copy; the last one is read until etcd answers |
| unreached: no connection could be made | another copy, or a load |
| busy: all connections to the pod are in use | another copy; never a load |
| lost: sent, and no byte of a reply came | once, elsewhere, after a moment, if method and model are safe |
| broken: lost within the reply | given up |

An attempt of the first four kinds has run nothing, so any method may be sent again. No call is sent more than
`MAX_TRIES` times, nor again once a part of it is no longer available.

No I/O and no clock: the router forgets copies, reads records and waits (`router.calls.attempts`).
"""

import enum
from dataclasses import dataclass

from placement.fence import Said

MAX_TRIES = 8
"""Attempts before the last trouble is the answer; the predecessor's number."""

SETTLE = 0.2
"""Seconds between the loss of a call and its second attempt: a pod notices its server's death at once, and writes the
blame into the model's record some milliseconds later. The second attempt reads that first."""

KILLER = 2
"""Servers lost in calls of one model before no further one is risked."""


class Trouble(enum.Enum):
    """The outcome of an attempt."""

    NOT_HERE = "not here"  # the pod holds no such copy; it has run nothing
    VERIFY_FIRST = "verify first"  # the pod must not answer before the record is verified; it has run nothing
    UNREACHED = "unreached"  # nothing was sent: there is no connection to the pod
    BUSY = "busy"  # nothing was sent: all connections to the pod are in use
    LOST = "lost"  # some of the request was sent, and no byte of a reply came: it may have run
    BROKEN = "broken"  # the reply had begun


class End(enum.Enum):
    """The end of a call that is given up."""

    EXHAUSTED = "exhausted"  # it was tried as often as may be; nothing was run
    UNKEPT = "unkept"  # it was not run, and not all of it is at hand to be sent again
    BUSY = "busy"  # no connection is free
    LOST = "lost"  # it may have run


class Beyond(enum.Enum):
    """The fate of a call beyond its model's share of the connections to a pod."""

    ELSEWHERE = "elsewhere"
    WAIT = "wait"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True, kw_only=True)
class Try:
    """An attempt without an answer, and what is known by then."""

    trouble: Trouble
    tries: int  # of this call so far, this one among them
    safe: bool  # the method may run twice
    repeated: bool  # it was sent again after a loss already
    kept: bool  # all that was sent of it is at hand
    said: Said  # of the record, in this try
    others: bool  # there is another copy that was not tried and may be called
    deaths: int = 0  # servers lost lately in calls of this model, this one among them
    remaining: float | None = None  # seconds until the caller gives up; None: never


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The decision on a call. `end` None: it is sent again."""

    why: str
    end: End | None = None
    forget: bool = False  # the copy is not there
    avoid: bool = False  # not to this copy again, as long as there is another
    verify: bool = False  # to this copy again, once its record is read
    insist: bool = False  # and "etcd is away" is no answer
    pause: float = 0.0  # seconds until then


def decide(tried: Try) -> Decision:
    """Decides on the call."""
    if tried.trouble is Trouble.BROKEN:
        return Decision(end=End.LOST, why="the reply had begun")
    if tried.trouble is Trouble.LOST:
        return _lost(tried)
    forget = _gone(tried)
    if not tried.kept:
        return Decision(end=End.UNKEPT, forget=forget, why="too much was sent to send it again")
    if tried.tries >= MAX_TRIES:
        return Decision(end=End.EXHAUSTED, forget=forget, why=f"it was tried {tried.tries} times")
    if forget:
        return Decision(forget=True, why="the pod does not hold it")
    if tried.trouble is Trouble.VERIFY_FIRST:
        if tried.said is not Said.AWAY:
            return Decision(verify=True, why="the pod must verify it first")
        if tried.others:
            return Decision(avoid=True, why="the pod reaches etcd, this router does not, and another copy can be asked")
        return Decision(verify=True, insist=True, why="the pod reaches etcd, this router does not")
    if tried.trouble is Trouble.BUSY and not tried.others:
        # Trying again would find the same, at once, as often as it may; and a load is no remedy.
        return Decision(end=End.BUSY, avoid=True, why="all connections are in use")
    return Decision(avoid=True, why="nothing was sent")


def beyond_share(*, elsewhere: bool, unary: bool, waiting: int, most: int) -> Beyond:
    """Decides on a call beyond its model's share of the connections to a pod. `elsewhere`: another copy has room;
    `waiting`: calls that wait for this copy, at most `most`. Only unary calls wait: streams may hold connections for
    hours, so further ones are refused."""
    if elsewhere:
        return Beyond.ELSEWHERE
    return Beyond.WAIT if unary and waiting < most else Beyond.REFUSE


def _gone(tried: Try) -> bool:
    """Tells whether the copy counts as missing. So does one whose pod demands what it was just given."""
    if tried.trouble is Trouble.VERIFY_FIRST:
        return tried.said is Said.VERIFIED
    return tried.trouble is Trouble.NOT_HERE


def _lost(tried: Try) -> Decision:
    """Decides on a call that a server may have run: it is sent once more if running it twice is safe."""
    why = ""
    if not tried.safe:
        why = "its method is not known to be safe to run twice"
    elif tried.repeated:
        why = "it was sent a second time already"
    elif tried.deaths >= KILLER:
        why = f"{tried.deaths} servers were lost in calls of this model"
    elif not tried.kept:
        why = "too much was sent to send it again"
    elif tried.tries >= MAX_TRIES:
        why = f"it was tried {tried.tries} times"
    elif tried.remaining is not None and tried.remaining <= SETTLE:
        why = "its deadline comes first"
    if why:
        return Decision(end=End.LOST, why=why)
    return Decision(avoid=True, pause=SETTLE, why="its method is safe to run twice")
