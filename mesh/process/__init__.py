"""Processes: the children of one, how they are kept running, and how a process itself ends.

`programs` finds programs, `ports` free ports for them, `child` starts, hears and ends one life; `watcher` kills those
that hang, by the rules in `hang`. `supervisor` keeps a child running, by the rules in `restarts`. `tasks` are a
process's own, `ending` is what follows when it cannot go on. What to run and what its death means is left to the
callers.
"""

from mesh.process.child import MAX_LINE, Process, describe_exit, spawn, tethered
from mesh.process.hang import HangLimits, HangVerdict
from mesh.process.heartbeat import begin as begin_beating
from mesh.process.ports import free_port
from mesh.process.programs import find_binary, python
from mesh.process.watcher import HUNG_HELP, STOPPED_BEFORE, Answers, Watch

__all__ = [
    "HUNG_HELP",
    "MAX_LINE",
    "STOPPED_BEFORE",
    "Answers",
    "HangLimits",
    "HangVerdict",
    "Process",
    "Watch",
    "begin_beating",
    "describe_exit",
    "find_binary",
    "free_port",
    "python",
    "spawn",
    "tethered",
]
