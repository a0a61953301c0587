"""Processes: children and their supervision, and the tasks and the end of a process itself.

`programs` finds programs, and `ports` finds free ports for them. `child` starts a child, reads its output and ends it;
`watcher` kills children that hang, by the rules in `hang`; `supervisor` keeps a child running, by the rules in
`restarts`. `tasks` keeps a process's own tasks, and `ending` ends a process that cannot continue. Callers decide what
to run, and what to do after a child's death.
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
