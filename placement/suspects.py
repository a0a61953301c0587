"""Who may have brought a model server down, from how it ended and what each of its threads was at.

A crash happens in one thread. Where it is known which, and that one was inside a model, that model is the cause, and
nobody else is asked. A thread that was in none may have stumbled over memory that a model has spoilt, so then everybody
who was at work is suspect, as where nothing is known of threads. A server that hung was held up by what its event loop
ran; what runs or loads in threads holds nobody up. Freeing a model has crashed servers too, but copies come and go all
the time, so it is a suspicion only where nothing else was going on.

Nobody is blamed for an end that came from outside: a stop, a kill by hand, a replacement. A kill for memory is one from
outside with a cause inside: who was at work may have taken it.

One death is a suspicion, however sure: what follows from several is not decided here.
"""

import enum
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Cause(enum.Enum):
    """How a model server ended, as far as that can be told."""

    CRASH = "crash"  # by a signal that a thread causes: SIGSEGV, SIGABRT, SIGFPE, SIGBUS, SIGILL
    EXIT = "exit"  # by itself, with a status
    MEMORY = "memory"  # killed by the kernel, which had no memory left, or killed by nobody knows whom
    KILLED = "killed"  # by a signal from outside that had nothing to do with memory
    HANG = "hang"  # killed by us: it gave no sign of life
    STOPPED = "stopped"  # killed by us: somebody had stopped it
    REPLACED = "replaced"  # ended by us, for reasons that are known already


_FROM_OUTSIDE = {Cause.KILLED, Cause.STOPPED, Cause.REPLACED}


class Doing(enum.Enum):
    """What was done with a model."""

    LOADING = "loading"
    RUNNING = "running"
    FREEING = "freeing"


@dataclass(frozen=True, slots=True)
class Work(Generic[Key]):
    """A model that was at work when its server ended, or one thread of it."""

    model: Key
    doing: Doing
    thread: int = 0  # 0: not known
    in_loop: bool = False  # in the event loop's own thread
    digest: str = ""  # of the request that it ran for


@dataclass(frozen=True, slots=True)
class Suspect(Generic[Key]):
    """A model that may have caused it."""

    model: Key
    doing: Doing
    sure: bool  # nobody else can have
    digests: tuple[str, ...] = ()  # of the requests that it ran for, where they are known
    why: str = ""


def suspects(cause: Cause, work: Iterable[Work[Key]], *, thread: int = 0) -> tuple[Suspect[Key], ...]:
    """Names who may have caused an end. `thread`: the one that crashed, 0 where that is not known."""
    work = tuple(work)
    if cause in _FROM_OUTSIDE:
        return ()
    if cause is Cause.CRASH and thread:
        there = [one for one in work if one.thread == thread]
        if there:
            return _suspects(there[:1], "it crashed in the thread that was in this model", sure=True)
    if cause is Cause.HANG:
        there = [one for one in work if one.in_loop]
        if there:
            return _suspects(there[:1], "its event loop was in this model", sure=True)
        running = [one for one in work if one.doing is Doing.RUNNING]
        return _suspects(running, "this model was running", sure=False)
    at_work = [one for one in work if one.doing is not Doing.FREEING]
    return _suspects(at_work or work, "this model was at work", sure=False)


def _suspects(work: Iterable[Work[Key]], why: str, *, sure: bool) -> tuple[Suspect[Key], ...]:
    by_model: dict[Key, list[Work[Key]]] = {}
    for one in work:
        by_model.setdefault(one.model, []).append(one)
    return tuple(
        Suspect(
            model,
            Doing.LOADING if any(one.doing is Doing.LOADING for one in found) else found[0].doing,
            sure,
            tuple(dict.fromkeys(one.digest for one in found if one.digest)),
            why,
        )
        for model, found in by_model.items()
    )
