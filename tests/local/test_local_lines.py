"""Log lines of several processes as one readable stream."""

import io
import json
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.local.lines import Printer, parse, readable
from mesh.telemetry import logs


def printed(*lines, names=("etcd", "pod-1"), **options):
    stream = io.StringIO()
    printer = Printer(list(names), stream=stream, colours=False, **options)
    for name, line in lines:
        printer.line(name, line)
    printer.close()
    return stream.getvalue().splitlines()


def structured(**data):
    return json.dumps({"time": "2026-01-02T03:04:05.678Z", "process": "pod-1", "logger": "x", **data})


def test_a_line_stands_behind_its_name():
    """A log line is printed after its process's name, aligned, with its level, its event and its data. Fields that
    every line has are left out."""
    (line,) = printed(("pod-1", structured(level="info", event="model loaded", model="a b", ms=12)))
    prefix, _, rest = line.partition(" | ")
    assert prefix == "pod-1"
    assert rest.split(" ", 1)[1] == 'info  model loaded  model="a b" ms=12'


def test_a_process_below_is_named():
    """A line of an agent's model server has another name than the agent's own lines."""
    (line,) = printed(("pod-1", structured(level="info", event="up").replace('"pod-1"', '"pod-1/server"')))
    assert "pod-1/server: up" in line


def test_etcds_lines_read_alike():
    """etcd's lines look like the others, although zap has other names for the same fields."""
    (line,) = printed(
        ("etcd", '{"level":"warn","ts":"2026-01-02T03:04:05.6Z","caller":"x.go:1","msg":"slow","took":"2s"}')
    )
    assert line.startswith("etcd  | ")
    assert line.endswith("warn  slow  took=2s")


def test_a_traceback_keeps_its_lines_and_its_name():
    """Each row of a traceback is printed after the process's name, so that grep finds it."""
    lines = printed(("pod-1", structured(level="error", event="failed", traceback="Traceback:\n  File x\nKeyError")))
    assert len(lines) == 4
    assert all(line.startswith("pod-1 | ") for line in lines)
    assert lines[3].endswith("    KeyError")


@pytest.mark.parametrize(
    ("quiet", "shown"),
    [(0, ["debug", "info", "warning", "error", "plain"]), (1, ["warning", "error"]), (2, ["error"])],
)
def test_quiet_shows_what_is_worse(quiet, shown):
    """With -q only warnings and errors are shown, with -qq only errors. Lines without a level count as info."""
    entries = [
        ("pod-1", structured(level=level, event=f"it-{level}")) for level in ("debug", "info", "warning", "error")
    ]
    lines = printed(*entries, ("pod-1", "it-plain"), quiet=quiet)
    assert [
        word for word in ("debug", "info", "warning", "error", "plain") if any(f"it-{word}" in line for line in lines)
    ] == shown


def test_raw_lines_pass_as_they_came():
    """Raw lines are passed on unchanged, for programs that collect logs."""
    line = structured(level="info", event="up")
    assert printed(("pod-1", line), raw=True) == [line]


@given(st.text(), st.dictionaries(st.text(), st.text() | st.integers() | st.none(), max_size=4))
def test_no_line_moves_the_terminal(text, data):
    """Whatever a child writes, only printable characters and tabs are printed."""
    for line in (text, json.dumps({"event": text, **{k: v for k, v in data.items() if k != "traceback"}})):
        parsed = parse(line.replace("\n", " "))
        for row in [line] if parsed is None else readable(parsed):
            shown = printed(("pod-1", row))
            assert all(character.isprintable() or character == "\t" for row in shown for character in row)


def test_our_own_log_joins():
    """Lines that this process logs with structlog are printed among the others."""
    from mesh.local.lines import LogStream

    stream = io.StringIO()
    printer = Printer(["mesh"], stream=stream, colours=False)
    try:
        logs.configure(fmt="json", process="mesh", stream=LogStream(printer, "mesh"))
        logs.get("x").warning("it happened", count=3)
    finally:
        logs.configure()
    printer.close()
    assert stream.getvalue().rstrip().endswith("warn  it happened  count=3")


class Stuck(io.StringIO):
    """A terminal stopped with Ctrl-S."""

    def __init__(self):
        super().__init__()
        self.go_on = threading.Event()
        self.writing = threading.Event()

    def write(self, text):
        self.writing.set()
        self.go_on.wait(10)
        return super().write(text)


def test_a_terminal_that_stands_still_holds_nobody_up():
    """A stopped terminal does not block the mesh: lines that do not fit are dropped and counted."""
    stream = Stuck()
    printer = Printer(["a"], stream=stream, colours=False)
    printer.line("a", "first")
    assert stream.writing.wait(10)
    for number in range(20_100):
        printer.line("a", str(number))
    stream.go_on.set()
    printer.close(10)
    text = stream.getvalue()
    assert "... 100 lines not shown" in text
    assert "19999" in text


def test_a_reader_that_went_is_told():
    """If the reader of the output has gone, as in `mesh up | head`, the printer reports it."""
    stream = io.StringIO()
    stream.close()
    gone = threading.Event()
    printer = Printer(["a"], stream=stream, colours=False)
    printer.on_broken = gone.set
    printer.line("a", "x")
    assert gone.wait(10)
    printer.close()
