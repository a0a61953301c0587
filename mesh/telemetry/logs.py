"""Structured log lines: an event in a few words, and its data as key=value or as JSON.

structlog makes the events, and the standard library's `logging` writes them. The lines of libraries (grpc, asyncio,
aiohttp) therefore have the same form, and level filters work as usual. This module renders lines itself, because a log
line must never fail or reveal a secret. If `str` of a value raises, the line says so, and text that is not printable is
escaped. As text, an event is one line, followed by any traceback, indented. Values under the names of secrets are
hidden.

Everything is written to standard error, which the parent process may redirect.
"""

import contextlib
import json
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, Literal, TextIO


@contextlib.contextmanager
def _without(module: str) -> Iterator[None]:
    """Hides a module for the duration of the block, as if it were not installed."""
    before = sys.modules.get(module)
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]
        if before is not None:
            sys.modules[module] = before


# structlog uses rich for tracebacks if rich is installed. This module renders tracebacks, and importing rich would cost
# each process 115 ms at its start and 4.7 MB.
with _without("rich"):
    import structlog

Format = Literal["text", "json"]

_MAX_VALUE = 4000  # characters of one value, so that lines stay short even if a client sends a huge id
_HIDDEN = frozenset({"password", "secret", "token", "authorization", "credentials", "private_key", "model_key"})
_USERINFO = re.compile(r"(?<=://)[^/@\s:]*:[^/@\s]+@")  # user:password@ of an address
_SIGNATURE = re.compile(r"(?i)((?:x-amz-signature|x-goog-signature|sig|signature|access_token)=)[^&\s\"']+")
_PLAIN = re.compile(r"[^\s\"'=\\]+")
_COLOURS = {
    "debug": "\x1b[2m",
    "info": "\x1b[32m",
    "warning": "\x1b[33m",
    "error": "\x1b[31m",
    "critical": "\x1b[1;31m",
}
_RESET = "\x1b[0m"

# Libraries that log at INFO what Mesh logs itself (every request of aiohttp, every retry of a channel), or at DEBUG the
# headers of each call (hpack).
_NOISY = ("aiohttp", "asyncio", "grpc", "charset_normalizer", "hpack")


def _text(value: object) -> str:
    """Returns any value as text, even if its `__str__` raises."""
    if isinstance(value, bytes | bytearray):
        text = bytes(value[:_MAX_VALUE]).decode("utf-8", "backslashreplace")
    elif isinstance(value, float):
        text = f"{value:.6g}" if abs(value) < 1e6 else str(value)
    else:
        try:
            text = str(value)
        except Exception as error:
            text = f"<{type(value).__name__}: not shown, its text raised {type(error).__name__}>"
    if len(text) > _MAX_VALUE:
        text = f"{text[:_MAX_VALUE]}... ({len(text)} characters)"
    if "://" in text:
        text = _USERINFO.sub("***@", text)
    return _SIGNATURE.sub(r"\1***", text) if "=" in text else text


def _one_line(text: str) -> str:
    """Escapes characters that are not printable or cannot be encoded."""
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def _value(value: object) -> str:
    text = json.dumps(_jsonable(value)) if isinstance(value, Mapping | list | tuple) else _text(value)
    if _PLAIN.fullmatch(text) and text.isprintable():
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())


def _jsonable(value: object, depth: int = 0) -> object:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if value - value == 0.0 else str(value)  # JSON has neither NaN nor infinities
    if depth < 4:
        if isinstance(value, Mapping):
            return {_text(key): _hide(key, item, depth + 1) for key, item in list(value.items())[:200]}
        if isinstance(value, list | tuple | set | frozenset):
            return [_jsonable(item, depth + 1) for item in list(value)[:200]]
    return _text(value)


def _hide(key: object, value: object, depth: int) -> object:
    return "***" if isinstance(key, str) and key.lower() in _HIDDEN else _jsonable(value, depth)


def _trace(exc_info: object) -> str:
    """Returns the traceback of any form of `exc_info`, or an empty string."""
    error: BaseException | None = None
    if isinstance(exc_info, BaseException):
        error = exc_info
    elif isinstance(exc_info, tuple):
        error = exc_info[1] if len(exc_info) == 3 else None
    elif exc_info:
        error = sys.exc_info()[1]
    if error is None:
        return ""
    try:
        return "".join(traceback.format_exception(error)).rstrip()
    except Exception:
        return f"{type(error).__name__} (its traceback cannot be shown)"


class Lines(logging.Formatter):
    """A formatter of log records, one line of text or JSON each."""

    def __init__(self, *, fmt: Format, process: str, colours: bool = False) -> None:
        super().__init__()
        self._fmt = fmt
        self._process = process
        self._colours = colours

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line, without its end. Does not raise."""
        if isinstance(record.msg, dict):  # from structlog
            data = dict(record.msg)
            event = data.pop("event", "")
            exc_info: object = data.pop("exc_info", None)
        else:
            data = {}
            try:
                event = record.getMessage()
            except Exception:  # a library passed the wrong % arguments
                event = f"{_text(record.msg)} {_text(record.args)}"
            exc_info = record.exc_info
        trace = _trace(exc_info)
        level = record.levelname.lower()
        if self._fmt == "json":
            line: dict[str, object] = {
                "time": _timestamp(record.created),
                "level": level,
                "process": self._process,
                "logger": record.name,
                "event": _text(event),
            }
            for key, value in data.items():
                name = _text(key)
                line[f"{name}_" if name in line else name] = _hide(key, value, 0)
            if trace:
                line["traceback"] = trace
            return json.dumps(line)  # ASCII, so that even half a surrogate pair can be written
        fields = "".join(
            f" {_one_line(key)}={'***' if key.lower() in _HIDDEN else _value(value)}" for key, value in data.items()
        )
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        shown = f"{_COLOURS.get(level, '')}{level:<7}{_RESET}" if self._colours else f"{level:<7}"
        line_text = f"{clock}.{int(record.msecs):03d} {shown} {self._process}: {_one_line(_text(event))}{fields}"
        if trace:
            line_text += "\n" + "\n".join("    " + _one_line(row) for row in trace.splitlines())
        return line_text


def _timestamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1000):03d}Z"


class _Handler(logging.StreamHandler[TextIO]):
    """A handler for standard error, whose reader may have ended."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Ignores the error, because a process must not fail because of its log."""


def _to_stdlib(
    _logger: object, _method: str, event: MutableMapping[str, Any]
) -> tuple[tuple[MutableMapping[str, Any]], dict[str, Any]]:
    return (event,), {}


# Done at import, so that loggers work in a process (a test, a script) that configures nothing.
structlog.configure(
    processors=[structlog.stdlib.filter_by_level, _to_stdlib],
    logger_factory=structlog.stdlib.LoggerFactory(),
    wrapper_class=structlog.stdlib.BoundLogger,
    cache_logger_on_first_use=True,
)

# If nothing is configured, as in terminal commands, Python itself writes warnings to standard error; this makes them
# lines like ours instead of a record's dict.
if logging.lastResort is not None:
    logging.lastResort.setFormatter(
        Lines(fmt="json" if os.environ.get("MESH_LOG_FORMAT") == "json" else "text", process="mesh")
    )


def configure(*, level: str = "info", fmt: Format = "text", process: str = "", stream: TextIO | None = None) -> None:
    """Sends every log line of this process to standard error (or `stream`). Another call replaces the settings.

    `level` is debug, info, warning or error; `process` names this process in each line. Raises ValueError for a level
    or a format that does not exist.
    """
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"{level!r} is not a log level: use debug, info, warning or error")
    if fmt not in ("text", "json"):
        raise ValueError(f"{fmt!r} is not a log format: use text or json")
    stream = sys.stderr if stream is None else stream
    handler = _Handler(stream)
    handler.setFormatter(Lines(fmt=fmt, process=process, colours=fmt == "text" and stream.isatty()))
    root = logging.getLogger()
    for old in [handler for handler in root.handlers if isinstance(handler, _Handler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(number)
    for name in _NOISY:
        logging.getLogger(name).setLevel(max(number, logging.WARNING))


def get(name: str) -> structlog.stdlib.BoundLogger:
    """Returns the logger of a module: `log = logs.get(__name__)`, then `log.info("model loaded", model=...,
    ms=...)`."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger
