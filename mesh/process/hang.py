"""The decision whether a process hangs: a state machine without clock or I/O, which receives observations of the
process.

A process that is stopped (SIGSTOP) is recognised by its state, and given up after a few seconds. A process that is
silent, because its event loop gives no signs of life, may be healthy on a machine that has no CPU time for it. Silence
therefore counts only while the process could have given a sign of life:

- time in which the watcher itself was late does not count: the machine had no CPU time for it either;
- while one of its threads waits for a processor, only the CPU time that the process got counts: a busy loop
  on a free machine has all of it, a starved process little;
- while it waits for a disk, a quarter counts: it may be paging. (SIGKILL would wait for the disk as well.)

A gap of several seconds between two observations means that the watcher itself was stopped: Ctrl-Z, a debugger or a
suspended machine stops all of a mesh. Earlier observations are then discarded, and all time limits begin again.

A process under a debugger (state `t`) counts as silent, not as stopped, because a debugger may stop it for short times.
"""

import enum
from dataclasses import dataclass

STOPPED, TRACED, DISK = "T", "t", "D"
"""The states of a process in /proc/PID/stat that matter here. The others are R (runs, or waits for a processor), S and
Z."""

_DISK_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class HangLimits:
    """Time limits for each state of a process, in seconds. The watched processes beat every half second."""

    stopped: float = 3.0
    silent: float = 12.0
    start: float = 90.0  # silent since its start: many interpreters that start at once on a busy machine take long
    interval: float = 0.5  # between two looks
    suspect: float = 4.0  # silence after which it is a suspect

    @property
    def gap(self) -> float:
        """Seconds between two observations beyond which all earlier ones are discarded."""
        return 6 * self.interval


@dataclass(frozen=True, slots=True)
class Observation:
    """An observation of a process at one moment."""

    now: float  # seconds of the monotonic clock, as all times here
    state: str  # of its main thread, as in /proc/PID/stat; "": not known
    cpu: float  # seconds of CPU that its threads have had so far
    runnable: bool  # one of its threads runs, or waits for a processor
    heard: float  # when it gave its last sign of life; 0: none yet


class ProcessState(enum.Enum):
    """The possible verdicts on a process."""

    WELL = "well"
    SUSPECT = "suspect"  # not to be relied on, but not yet to be replaced
    HUNG = "hung"


@dataclass(frozen=True, slots=True)
class HangVerdict:
    """The verdict on a process, and the reason."""

    doing: ProcessState
    why: str = ""
    stopped: bool = False  # from outside, by a signal or a debugger: the process itself did not cause it


WELL = HangVerdict(ProcessState.WELL)


class Hang:
    """The judgement of one process, from its start to its end."""

    __slots__ = ("_heard", "_last", "_silent", "_stopped", "limits")

    def __init__(self, limits: HangLimits) -> None:
        self.limits = limits
        self._last: Observation | None = None
        self._stopped = 0.0  # seconds
        self._silent = 0.0  # seconds that count
        self._heard = 0.0

    @property
    def silent(self) -> float:
        """Seconds of silence that count."""
        return self._silent

    def look(self, seen: Observation) -> HangVerdict:
        """Adds an observation, and returns the verdict. Observations come about every `limits.interval` seconds."""
        last, self._last = self._last, seen
        elapsed = 0.0 if last is None else max(0.0, seen.now - last.now)
        if last is None or elapsed > self.limits.gap:
            self._heard = seen.heard
            self._stopped = self._silent = 0.0
            return WELL
        counted = elapsed if elapsed <= 2 * self.limits.interval else self.limits.interval
        self._stopped = self._stopped + counted if seen.state == STOPPED else 0.0
        if seen.heard > self._heard:
            self._heard = seen.heard
            self._silent = 0.0
        else:
            self._silent += _usable(counted, last, seen)
        return self._verdict(seen)

    def _verdict(self, seen: Observation) -> HangVerdict:
        limits = self.limits
        if self._stopped > 0:
            why = f"was stopped by a signal for {self._stopped:.0f} s"
            return HangVerdict(
                ProcessState.HUNG if self._stopped >= limits.stopped else ProcessState.SUSPECT, why, stopped=True
            )
        if not seen.heard:  # the process is starting
            if self._silent >= limits.start:
                return HangVerdict(ProcessState.HUNG, f"gave no sign of life in {self._silent:.0f} s since its start")
            return WELL
        traced = seen.state == TRACED
        how = f"gave no sign of life for {self._silent:.0f} s{' under a debugger' if traced else ''}"
        if self._silent >= limits.silent:
            return HangVerdict(ProcessState.HUNG, how, stopped=traced)
        return HangVerdict(ProcessState.SUSPECT, how, stopped=traced) if self._silent >= limits.suspect else WELL


def _usable(counted: float, last: Observation, seen: Observation) -> float:
    """Returns the part of the time since the last observation in which the process could have given a sign of life, in
    seconds."""
    if seen.runnable:
        return min(counted, max(0.0, seen.cpu - last.cpu))
    return counted * (_DISK_SHARE if seen.state == DISK else 1.0)
