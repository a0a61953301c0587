"""The retry policy: whether, where and when a call that got no answer is sent again.

Unary calls and streams share this rule; they only differ in whether everything that was sent is still available.

| outcome of the attempt | then |
| --- | --- |
| not here: the pod does not hold the copy | forget the copy; use another one, or load one |
| verify first: the pod must not answer before the record is read | read it, then use the same copy again |
| verify first, but only this router cannot reach etcd | use another copy; for the last one, read until etcd answers |
| unreached: no connection could be made | use another copy, or load one |
| busy: all connections to the pod are in use | use another copy; never load one |
| lost: sent, and no byte of a reply arrived | try once, elsewhere, after a moment, if method and model are safe |
| broken: lost within the reply | give up |

Unless the attempt was lost or broken, nothing has run, so any method may be sent again. No call is sent more than
`MAX_TRIES` times, or again once a part of it is no longer available. After a second attempt that reached no copy, the
call waits before the next one, and each time twice as long (`BACKOFF`).

This module has no I/O and no clock: the router forgets copies, reads records and waits (`router.calls.attempts`).
"""

import enum
from dataclasses import dataclass

from placement.fence import Said

MAX_TRIES = 8
"""Number of attempts after which the caller gets the error of the last one; ModelMesh's number."""

SETTLE = 0.2
"""Seconds between the loss of a call and its second attempt: a pod notices its server's death at once, and writes the
blame into the model's record some milliseconds later. The router reads that record before the second attempt."""

BACKOFF = 0.02
"""Seconds between the second and the third attempt if the second reached no copy. When a model server dies, its pod
refuses calls a moment before its agent notices the death, and until then each load ends at once with the same copy. All
waits of a call add up to 1.3 seconds, and an agent notices a death within a fraction of a second."""

KILLER = 2
"""Number of servers lost in calls of one model from which on a lost call of the model is not sent again."""


class Trouble(enum.Enum):
    """The outcome of an attempt."""

    NOT_HERE = "not here"  # the pod does not hold the copy; nothing has run
    VERIFY_FIRST = "verify first"  # the pod must not answer before the record is verified; nothing has run
    UNREACHED = "unreached"  # nothing was sent: there is no connection to the pod
    BUSY = "busy"  # nothing was sent: all connections to the pod are in use
    LOST = "lost"  # some of the request was sent, and no byte of a reply arrived: it may have run
    BROKEN = "broken"  # the reply had begun


class End(enum.Enum):
    """The reason why a call is given up."""

    EXHAUSTED = "exhausted"  # it was tried as often as allowed; nothing has run
    UNKEPT = "unkept"  # it has not run, and not all of it is available to be sent again
    BUSY = "busy"  # no connection is free
    LOST = "lost"  # it may have run


class Beyond(enum.Enum):
    """The outcome for a call that exceeds its model's share of the connections to a pod."""

    ELSEWHERE = "elsewhere"
    WAIT = "wait"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True, kw_only=True)
class Try:
    """An attempt without an answer, and the facts on which the decision depends."""

    trouble: Trouble
    tries: int  # of this call so far, including this one
    safe: bool  # the method may run twice
    repeated: bool  # it was already sent again after a loss
    kept: bool  # everything that was sent of it is available
    said: Said  # of the record, in this try
    others: bool  # there is another copy that was not tried and may be called
    deaths: int = 0  # servers lost recently in calls of this model, including this one
    remaining: float | None = None  # seconds until the caller gives up; None: never


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The decision on a call. If `end` is None, the call is sent again."""

    why: str
    end: End | None = None
    forget: bool = False  # the copy does not exist
    avoid: bool = False  # not to this copy again while there is another
    verify: bool = False  # to this copy again, once its record is read
    insist: bool = False  # and "etcd is away" is not accepted
    pause: float = 0.0  # seconds until then


def decide(tried: Try) -> Decision:
    """Decides whether the call is sent again."""
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
        return Decision(forget=True, pause=_backoff(tried), why="the pod does not hold it")
    if tried.trouble is Trouble.VERIFY_FIRST:
        if tried.said is not Said.AWAY:
            return Decision(verify=True, why="the pod must verify it first")
        if tried.others:
            return Decision(avoid=True, why="the pod reaches etcd, this router does not, and another copy can be asked")
        return Decision(verify=True, insist=True, why="the pod reaches etcd, this router does not")
    if tried.trouble is Trouble.BUSY and not tried.others:
        # Another try would find the same at once, and a load would not help.
        return Decision(end=End.BUSY, avoid=True, why="all connections are in use")
    return Decision(avoid=True, pause=_backoff(tried), why="nothing was sent")


def beyond_share(*, elsewhere: bool, unary: bool, waiting: int, most: int) -> Beyond:
    """Decides on a call that exceeds its model's share of the connections to a pod.

    `elsewhere` is true if another copy has room. `waiting` calls wait for this copy already, of at most `most`. Only
    unary calls wait: streams may hold connections for hours, so further ones are refused.
    """
    if elsewhere:
        return Beyond.ELSEWHERE
    return Beyond.WAIT if unary and waiting < most else Beyond.REFUSE


def _backoff(tried: Try) -> float:
    """Returns the seconds until the next attempt, at most half of those that the caller still waits."""
    if tried.tries == 1 or tried.trouble is Trouble.BUSY:
        return 0.0
    pause: float = BACKOFF * 2.0 ** (tried.tries - 2)
    return pause if tried.remaining is None else max(0.0, min(pause, tried.remaining / 2))


def _gone(tried: Try) -> bool:
    """Returns whether the copy counts as missing. It also counts as missing if its pod asks to verify a call that was
    already verified."""
    if tried.trouble is Trouble.VERIFY_FIRST:
        return tried.said is Said.VERIFIED
    return tried.trouble is Trouble.NOT_HERE


def _lost(tried: Try) -> Decision:
    """Decides on a call that a server may have run. It is sent once more if it is safe to run it twice."""
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
