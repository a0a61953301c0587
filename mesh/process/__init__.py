"""Child processes: where their programs are, how they are started, bound to their parent's life, and ended.

`programs` finds them, `ports` finds free ports for them, `child` starts, hears and ends them; `watcher` kills those
that hang, by the rules in `hang`. What to start, when to start it again and what its lines mean is left to the callers.
"""

from mesh.process.child import MAX_LINE, Process, describe_exit, spawn, tethered
from mesh.process.hang import Limits, Verdict
from mesh.process.heartbeat import begin as begin_beating
from mesh.process.ports import free_port
from mesh.process.programs import find_binary, python
from mesh.process.watcher import HUNG_HELP, STOPPED_BEFORE, Answers, Watch

__all__ = [
    "HUNG_HELP",
    "MAX_LINE",
    "STOPPED_BEFORE",
    "Answers",
    "Limits",
    "Process",
    "Verdict",
    "Watch",
    "begin_beating",
    "describe_exit",
    "find_binary",
    "free_port",
    "python",
    "spawn",
    "tethered",
]
