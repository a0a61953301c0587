"""The ends of model servers, and their causes as far as they are known."""

import signal
from dataclasses import dataclass

from mesh.process.supervisor import Ended
from placement.suspects import EndCause

_CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGBUS, signal.SIGILL}


@dataclass(frozen=True, slots=True)
class Death:
    """The end of a model server: how it ended, and the cause."""

    how: str  # for operators: "ended with status 1"
    cause: EndCause
    thread: int = 0  # the one that crashed, by its `threading.get_ident`; 0: unknown


def death_of(ended: Ended, *, crashed_in: int, kills: tuple[int, int]) -> Death:
    """Returns the end of a process, with its cause. `crashed_in` is the thread that the fault handler named, or 0.
    `kills` has the kernel's counts of kills for lack of memory before and after the end, each -1 if it is unknown."""
    code, how = ended.code, ended.how
    if ended.hung is not None:
        return Death(f"{how} and was killed", EndCause.STOPPED if ended.hung.stopped else EndCause.HANG)
    if code >= 0:
        return Death(how, EndCause.EXIT)
    if -code in _CRASHES:
        return Death(how, EndCause.CRASH, crashed_in)
    if -code != signal.SIGKILL:
        return Death(how, EndCause.KILLED)
    before, after = kills
    if after == before >= 0:
        return Death(f"{how} from outside", EndCause.KILLED)
    return Death(f"{how}{', probably for lack of memory' if after >= 0 else ''}", EndCause.MEMORY)
