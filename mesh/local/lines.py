"""The log lines of several processes as one readable stream: `pod-1  | 12:03:04 info  model loaded  model=a ms=12`.

The children, including etcd, log JSON, so their lines can be parsed. Other lines, such as those of a traceback or of
Envoy, are shown unchanged. A thread writes the lines from a bounded queue, so that a terminal stopped with Ctrl-S does
not block the supervisor or, through full pipes, the mesh. Lines that do not fit into the queue are dropped and counted.
"""

import contextlib
import io
import json
import queue
import threading
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any, TextIO

LEVELS = {"debug": 10, "info": 20, "warn": 30, "warning": 30, "error": 40, "critical": 50, "fatal": 50, "panic": 50}
WARNING = 30

_LEVEL_COLOURS = {10: "2", 20: "32", 30: "33", 40: "31", 50: "1;31"}
_NAME_COLOURS = ("36", "35", "34", "33", "32", "96", "95", "94")
_LEVEL_NAMES = {10: "debug", 20: "info", 30: "warn", 40: "error", 50: "fatal"}
_TIMES = ("time", "ts")
_LEFT_OUT = frozenset({"time", "ts", "level", "process", "logger", "event", "msg", "caller", "traceback", "stacktrace"})

QUEUE = 20_000
"""Maximum number of lines that wait for the terminal: a few seconds of a mesh that logs a lot."""


def level_of(data: dict[str, Any]) -> int:
    """Returns the level of a structured line, or 20 (info) if it has no known level."""
    return LEVELS.get(str(data.get("level", "")).lower(), 20)


def parse(line: str) -> dict[str, Any] | None:
    """Returns the data of a structured line, or None for any other line."""
    if not line.startswith("{"):
        return None
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) and ("event" in data or "msg" in data) else None


def readable(data: dict[str, Any], *, name: str = "", colours: bool = False) -> list[str]:
    """Formats a structured line for people: one line, followed by the lines of its traceback, if any. Leaves out the
    source of the line if it is `name`."""
    number = level_of(data)
    level = _LEVEL_NAMES.get(number, "info")
    event = one_line(str(data.get("event", data.get("msg", ""))))
    process = str(data.get("process", ""))
    where = f"{one_line(process)}: " if process and process != name else ""
    pairs = "".join(
        f" {_dim(one_line(key) + '=', colours)}{_value(value)}" for key, value in data.items() if key not in _LEFT_OUT
    )
    shown = _colour(f"{level:<5}", _LEVEL_COLOURS.get(number, ""), colours)
    made = [f"{_clock(data)} {shown} {where}{event}{' ' if pairs else ''}{pairs}"]
    trace = data.get("traceback") or data.get("stacktrace")
    if trace:
        made += [f"    {one_line(row)}" for row in str(trace).splitlines()]
    return made


class Printer:
    """A printer of lines, each with the name of its source. Call `line` from any thread, and `close` at the end.
    `quiet` hides lines below warnings (1) or below errors (2). With `raw`, lines are printed unchanged, without
    names."""

    def __init__(
        self, names: list[str], *, stream: TextIO, quiet: int = 0, raw: bool = False, colours: bool | None = None
    ) -> None:
        self.on_broken: Callable[[], object] | None = None  # called from the printer's thread once the stream is closed
        self.dropped = 0
        self._stream = stream
        self._least = (0, WARNING, LEVELS["error"])[min(quiet, 2)]
        self._raw = raw
        self._colours = stream.isatty() if colours is None else colours
        self._width = max((len(name) for name in names), default=0)
        self._name_colours = {name: _NAME_COLOURS[i % len(_NAME_COLOURS)] for i, name in enumerate(names)}
        self._queue: queue.Queue[str | None] = queue.Queue(QUEUE)
        self._thread = threading.Thread(target=self._write, name="log-printer", daemon=True)
        self._thread.start()

    def line(self, name: str, line: str) -> None:
        """Prints one line of the output of `name`, unless `quiet` hides lines of its level."""
        data = parse(line)
        if (20 if data is None else level_of(data)) < self._least:
            return
        if self._raw:
            self._put(line)
            return
        prefix = _colour(f"{name:<{self._width}} |", self._name_colours.get(name, ""), self._colours)
        rows = [one_line(line)] if data is None else readable(data, name=name, colours=self._colours)
        self._put("\n".join(f"{prefix} {row}" for row in rows))

    def text(self, text: str) -> None:
        """Prints a text of this process unchanged, regardless of `quiet`."""
        self._put(text)

    def close(self, timeout: float = 2.0) -> None:
        """Writes the waiting lines. Gives up after `timeout` seconds."""
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=timeout)
        self._thread.join(timeout)

    def _put(self, text: str) -> None:
        try:
            self._queue.put_nowait(text)
        except queue.Full:
            self.dropped += 1

    def _write(self) -> None:
        while (text := self._queue.get()) is not None:
            if self.dropped:
                count, self.dropped = self.dropped, 0
                text = f"... {count} lines not shown\n{text}"
            try:
                self._stream.write(text + "\n")
                if self._queue.empty():
                    self._stream.flush()
            except (OSError, ValueError):  # a closed pipe, a closed stream
                if self.on_broken is not None:
                    self.on_broken()
                return
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


class LogStream(io.TextIOBase):
    """A stream for this process's own log, whose lines are printed with the others."""

    def __init__(self, printer: Printer, name: str) -> None:
        self._printer = printer
        self._name = name

    def write(self, text: str) -> int:
        """Prints complete lines, as logging writes them."""
        for line in text.splitlines():
            self._printer.line(self._name, line)
        return len(text)

    def isatty(self) -> bool:
        """Returns False: the printer adds the colours."""
        return False


def _clock(data: dict[str, Any]) -> str:
    """Returns the local time of day of a line, or the current time if the line has none."""
    for key in _TIMES:
        value = data.get(key)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                return datetime.fromisoformat(value).astimezone().strftime("%H:%M:%S")
    return time.strftime("%H:%M:%S")


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    text = one_line(text)
    return text if text and " " not in text and '"' not in text else json.dumps(text, ensure_ascii=False)


def one_line(text: str) -> str:
    """Escapes characters that move a terminal's cursor or change its colours."""
    return text if text.isprintable() else "".join(c if c.isprintable() or c == "\t" else repr(c)[1:-1] for c in text)


def _colour(text: str, code: str, on: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if on and code else text


def _dim(text: str, on: bool) -> str:
    return _colour(text, "2", on)
