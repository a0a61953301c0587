"""Child processes: where their programs are, how they are started, bound to their parent's life, and ended.

`programs` finds them, `ports` finds free ports for them, `child` starts, hears and ends them. What to start, when to
start it again and what its lines mean is left to the callers.
"""

from mesh.process.child import MAX_LINE, Process, describe_exit, spawn, tethered
from mesh.process.ports import free_port
from mesh.process.programs import find_binary, python

__all__ = ["MAX_LINE", "Process", "describe_exit", "find_binary", "free_port", "python", "spawn", "tethered"]
