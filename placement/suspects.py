"""Suspects: the models that may have brought a model server down, by how it ended and what its threads were doing.

A crash happens in one thread. If that thread is known and was running a model, that model is the cause. If it was not
running a model, it may have hit memory that a model corrupted, so every model at work is a suspect. The same is true if
nothing is known about threads. A server that hung was blocked by what its event loop ran; work in other threads does
not block it. If the event loop was in no model, all running models are suspects. Servers have also crashed while
unloading a model, but copies come and go all the time, so unloads are only suspect if nothing else was going on.

No model is blamed for an end that came from outside: a stop, a kill by hand, a replacement. A kill for lack of memory
comes from outside too, but its cause is inside: the models at work may have taken the memory.

A single death is only a suspicion, however clear the case; `placement.blame` decides what several deaths mean.
"""

import enum
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class EndCause(enum.Enum):
    """The way in which a model server ended, as far as is known."""

    CRASH = "crash"  # by a signal that a thread causes: SIGSEGV, SIGABRT, SIGFPE, SIGBUS, SIGILL
    EXIT = "exit"  # by itself, with a status
    MEMORY = "memory"  # killed by the kernel for lack of memory, or by an unknown sender
    KILLED = "killed"  # by a signal from outside that had nothing to do with memory
    HANG = "hang"  # killed by the agent: no sign of life
    STOPPED = "stopped"  # killed by the agent: it was stopped (SIGSTOP)
    REPLACED = "replaced"  # ended by the agent for a known reason


_FROM_OUTSIDE = {EndCause.KILLED, EndCause.STOPPED, EndCause.REPLACED}


class WorkKind(enum.Enum):
    """The kind of work on a model."""

    LOADING = "loading"
    RUNNING = "running"
    FREEING = "freeing"


@dataclass(frozen=True, slots=True)
class Work(Generic[Key]):
    """A model, or one of its threads, that was at work when the server ended."""

    model: Key
    doing: WorkKind
    thread: int = 0  # 0: unknown
    in_loop: bool = False  # in the event loop's own thread
    digest: str = ""  # of the request that it served


@dataclass(frozen=True, slots=True)
class Suspect(Generic[Key]):
    """A model that may have caused the end of its server."""

    model: Key
    doing: WorkKind
    sure: bool  # no other model can have caused it
    digests: tuple[str, ...] = ()  # of the requests that it served, if known
    why: str = ""


def suspects(cause: EndCause, work: Iterable[Work[Key]], *, thread: int = 0) -> tuple[Suspect[Key], ...]:
    """Names the models that may have caused a server's end. `work` lists all models at work at that moment, and
    `thread` is the thread that crashed, or 0 if unknown."""
    work = tuple(work)
    if cause in _FROM_OUTSIDE:
        return ()
    if cause is EndCause.CRASH and thread:
        there = [one for one in work if one.thread == thread]
        if there:
            return _suspects(there[:1], "it crashed in the thread that was in this model", sure=True)
    if cause is EndCause.HANG:
        there = [one for one in work if one.in_loop]
        if there:
            return _suspects(there[:1], "its event loop was in this model", sure=True)
        running = [one for one in work if one.doing is WorkKind.RUNNING]
        return _suspects(running, "this model was running", sure=False)
    at_work = [one for one in work if one.doing is not WorkKind.FREEING]
    return _suspects(at_work or work, "this model was at work", sure=False)


def _suspects(work: Iterable[Work[Key]], why: str, *, sure: bool) -> tuple[Suspect[Key], ...]:
    by_model: dict[Key, list[Work[Key]]] = {}
    for one in work:
        by_model.setdefault(one.model, []).append(one)
    return tuple(
        Suspect(
            model,
            WorkKind.LOADING if any(one.doing is WorkKind.LOADING for one in found) else found[0].doing,
            sure,
            tuple(dict.fromkeys(one.digest for one in found if one.digest)),
            why,
        )
        for model, found in by_model.items()
    )
