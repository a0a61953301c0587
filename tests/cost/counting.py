"""Measurement of the instructions and the memory of one operation.

Instructions are bytecode instructions of the project's own packages. Those of asyncio, numpy and the tests' fakes do
not count. Work inside an extension counts as one instruction, however long it takes, but large copies show in the
memory.
"""

import functools
import gc
import sys
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = tuple(f"{ROOT / name}/" for name in ("mesh", "placement", "puller", "router"))

_WARM_UPS = 4
"""Number of runs before the first count, which fill caches, known headers, and the interpreter's free lists."""

_COUNTS = 5
"""Number of counts, of which the lowest is taken, because a clock or a sweep adds instructions to some runs."""


@dataclass(frozen=True, slots=True)
class Cost:
    functions: dict[str, int]  # instructions by function, as "mesh/wire/heads.py split_request"
    memory: int  # bytes: the most allocated at once beyond what was there before

    @property
    def instructions(self) -> int:
        return sum(self.functions.values())


def cost(operation: Callable[[], object]) -> Cost:
    """Returns the cost of an operation, which must do the same work each time it is called."""
    for _ in range(_WARM_UPS):
        operation()
    counts = []
    for _ in range(_COUNTS):
        executed: Counter[CodeType] = Counter()
        with _tracing(executed):
            operation()
        counts.append(executed)
    least = min(counts, key=lambda one: one.total())
    functions: Counter[str] = Counter()
    for code, count in least.items():
        functions[_name(code)] += count
    return Cost(dict(sorted(functions.items())), min(_peaks(operation)))


def _peaks(operation: Callable[[], object]) -> Iterator[int]:
    """Runs the operation several times, and yields the peak memory of each run in bytes."""
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        operation()
        for _ in range(_COUNTS):
            before, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            operation()
            yield tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
        gc.enable()


@functools.cache
def _name(code: CodeType) -> str:
    """Returns a file and a function. Functions defined inside another function count as part of the outer one."""
    return f"{Path(code.co_filename).relative_to(ROOT)} {code.co_qualname.partition('.<locals>')[0]}"


@contextmanager
def _tracing(executed: Counter[CodeType]) -> Iterator[None]:
    """Counts the instructions that this thread executes in the project's packages."""
    if sys.version_info >= (3, 12):
        with _monitoring(executed):
            yield
        return

    def local(frame: FrameType, event: str, _: object) -> Any:
        if event == "opcode":
            executed[frame.f_code] += 1
        return local

    def entered(frame: FrameType, event: str, _: object) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGES):
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        return local

    former = sys.gettrace()
    sys.settrace(entered)
    try:
        yield
    finally:
        sys.settrace(former)


@contextmanager
def _monitoring(executed: Counter[CodeType]) -> Iterator[None]:
    """Counts with `sys.monitoring`. It reports all threads, of which only this one is counted."""
    monitoring: Any = sys.monitoring  # type: ignore[attr-defined]
    tool = monitoring.PROFILER_ID
    here = threading.get_ident()

    def instruction(code: CodeType, _: int) -> Any:
        if not code.co_filename.startswith(PACKAGES):
            return monitoring.DISABLE
        if threading.get_ident() == here:
            executed[code] += 1
        return None

    monitoring.use_tool_id(tool, "tests.cost")
    monitoring.register_callback(tool, monitoring.events.INSTRUCTION, instruction)
    monitoring.set_events(tool, monitoring.events.INSTRUCTION)
    try:
        yield
    finally:
        monitoring.set_events(tool, monitoring.events.NO_EVENTS)
        monitoring.register_callback(tool, monitoring.events.INSTRUCTION, None)
        monitoring.free_tool_id(tool)
