import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.telemetry import logs


class Hostile:
    """A value whose conversion to text fails."""

    def __str__(self):
        raise RuntimeError("no text")

    __repr__ = __str__


@pytest.fixture
def stream():
    """Yields the stream to which lines are logged, and restores the root logger afterwards."""
    stream = io.StringIO()
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield stream
    root.handlers[:] = before
    root.setLevel(level)


def test_text_is_one_line_with_level_process_event_and_data(stream):
    logs.configure(fmt="text", process="worker-1", stream=stream)
    logs.get("t.text").info("model loaded", model="a b", ms=3.25, path="/x/y")
    line = stream.getvalue()
    assert line.count("\n") == 1
    assert line.split(" ", 1)[1] == 'info    worker-1: model loaded model="a b" ms=3.25 path=/x/y\n'


def test_json_keeps_numbers_and_nesting(stream):
    logs.configure(fmt="json", process="worker-1", stream=stream)
    logs.get("t.json").warning("slow", ms=3.25, pods=["a", "b"], ok=True, none=None)
    line = json.loads(stream.getvalue())
    assert line.items() >= {"level": "warning", "process": "worker-1", "logger": "t.json", "event": "slow"}.items()
    assert line.items() >= {"ms": 3.25, "pods": ["a", "b"], "ok": True, "none": None}.items()


def test_fields_named_like_parts_of_the_line_do_not_replace_them(stream):
    logs.configure(fmt="json", process="p", stream=stream)
    logs.get("t.clash").info("x", level="deep", process="other")
    line = json.loads(stream.getvalue())
    assert (line["level"], line["process"], line["level_"], line["process_"]) == ("info", "p", "deep", "other")


def test_level_filters_ours_and_others(stream):
    logs.configure(level="warning", process="p", stream=stream)
    logs.get("t.level").info("hidden")
    logging.getLogger("some.library").info("hidden")
    logs.get("t.level").error("shown")
    assert stream.getvalue().count("\n") == 1


@pytest.mark.parametrize("name", ["grpc", "grpc.aio", "asyncio", "aiohttp.access"])
def test_libraries_come_out_in_the_same_form_without_their_chatter(stream, name):
    logs.configure(level="debug", fmt="json", process="p", stream=stream)
    logging.getLogger(name).info("a request was served")
    logging.getLogger(name).warning("trouble with %s", "x")
    assert json.loads(stream.getvalue())["event"] == "trouble with x"


def test_headers_of_calls_are_not_logged(stream):
    logs.configure(level="debug", stream=stream)
    hpack.Decoder().decode(hpack.Encoder().encode([("authorization", "secret")]))
    assert stream.getvalue() == ""


def test_configured_twice_writes_once(stream):
    logs.configure(process="p", stream=stream)
    logs.configure(process="q", stream=stream)
    logs.get("t.twice").info("x")
    assert stream.getvalue().count("\n") == 1
    assert " q: x" in stream.getvalue()


@pytest.mark.parametrize("fmt", ["text", "json"])
def test_secrets_are_not_shown(stream, fmt):
    logs.configure(fmt=fmt, process="p", stream=stream)
    logs.get("t.secret").info(
        "x",
        password="hunter1",
        Authorization="hunter2",
        url="https://user:hunter3@host/path",
        nested={"token": "hunter4"},
        signed="https://h/p?X-Amz-Signature=hunter5&x=1",
    )
    assert "hunter" not in stream.getvalue()
    assert "host/path" in stream.getvalue()


@pytest.mark.parametrize("fmt", ["text", "json"])
def test_an_exception_brings_its_traceback(stream, fmt):
    logs.configure(fmt=fmt, process="p", stream=stream)
    try:
        raise KeyError("which")
    except KeyError:
        logs.get("t.trace").exception("failed")
    assert "KeyError: 'which'" in stream.getvalue()
    if fmt == "text":
        assert all(row.startswith("    ") for row in stream.getvalue().splitlines()[1:])


@pytest.mark.parametrize("fmt", ["text", "json"])
def test_wrong_arguments_of_a_library_do_not_raise(fmt):
    record = logging.LogRecord("t", logging.ERROR, "", 0, "%d of %d", ("one",), None)
    assert "one" in logs.Lines(fmt=fmt, process="p").format(record)


def test_a_stream_without_reader_is_no_failure(stream):
    class Broken(io.StringIO):
        def write(self, _):
            raise BrokenPipeError

    logs.configure(process="p", stream=Broken())
    logs.get("t.broken").info("into the void")


weird = st.one_of(
    st.text(st.characters(exclude_categories=())),
    st.binary(),
    st.floats(),
    st.integers(),
    st.none(),
    st.builds(Hostile),
    st.dictionaries(st.text(), st.floats(), max_size=3),
    st.lists(st.builds(Hostile), max_size=2),
)


@given(
    event=weird, fields=st.dictionaries(st.text(min_size=1), weird, max_size=4), fmt=st.sampled_from(["text", "json"])
)
def test_anything_can_be_logged_on_one_line(event, fields, fmt):
    record = logging.LogRecord("t", logging.INFO, "", 0, {**fields, "event": event, "exc_info": None}, (), None)
    line = logs.Lines(fmt=fmt, process="p").format(record)
    assert len(line.splitlines()) == 1
    line.encode("utf-8")
    if fmt == "json":
        json.loads(line)


@pytest.mark.parametrize(("level", "fmt"), [("loud", "text"), ("info", "xml")])
def test_unknown_level_or_format_is_refused(stream, level, fmt):
    with pytest.raises(ValueError, match="use"):
        logs.configure(level=level, fmt=fmt, process="p", stream=stream)


@pytest.mark.parametrize("fmt", ["text", "json"])
def test_a_process_that_configures_nothing_writes_lines_too(fmt: str):
    """A process that does not configure logging, such as a terminal command, writes warnings as log lines, not as
    dicts, and leaves out lower levels."""
    program = "from mesh.telemetry import logs; log = logs.get('x'); log.info('no'); log.warning('it ended', pid=1)"
    argv = [sys.executable, "-P", "-c", program]
    environment = {**os.environ, "MESH_LOG_FORMAT": fmt}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60, check=True)
    (line,) = done.stderr.splitlines()
    if fmt == "json":
        assert (json.loads(line)["event"], json.loads(line)["pid"]) == ("it ended", 1)
    else:
        assert line.endswith("warning mesh: it ended pid=1")


# --- gRPC's core, which writes to standard error by itself ---

_REFUSED = """
import socket, sys, threading
from mesh.telemetry import logs
import grpc
listening = socket.create_server(("127.0.0.1", 0))
def answer():
    while True:
        connection, _ = listening.accept()
        connection.recv(100)
        connection.sendall(b"no TLS, no TLS, no TLS")
        connection.close()
threading.Thread(target=answer, daemon=True).start()
logs.configure(fmt="json", process="p")
address = f"127.0.0.1:{listening.getsockname()[1]}"
try:
    grpc.secure_channel(address, grpc.ssl_channel_credentials()).unary_unary("/a/b")(b"", timeout=20)
except grpc.RpcError as error:
    logs.get("test").info("refused", why=error.details())
"""

_WATCHED = """
import importlib, os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "grpc" and os.environ.get("GRPC_VERBOSITY") != "NONE":
            raise AssertionError("gRPC comes before its verbosity is set")
sys.meta_path.insert(0, Watch())
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def _without_verbosity() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}


def test_lines_of_grpcs_core_do_not_stand_between_ours():
    """After a refused TLS handshake, gRPC's core writes no line to standard error, unless GRPC_VERBOSITY asks for it.
    The call's error names the handshake."""
    argv = [sys.executable, "-P", "-c", _REFUSED]
    done = subprocess.run(argv, env=_without_verbosity(), capture_output=True, text=True, timeout=60, check=True)
    (line,) = [json.loads(line) for line in done.stderr.splitlines()]
    assert "handshake" in line["why"]
    loud = {**os.environ, "GRPC_VERBOSITY": "INFO"}
    done = subprocess.run(argv, env=loud, capture_output=True, text=True, timeout=60, check=True)
    assert len(done.stderr.splitlines()) > 1, "gRPC's lines are written on request, which proves the test"


ROOT = Path(__file__).parents[2]


def processes() -> list[str]:
    """Returns the modules that are run as processes."""
    return sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for package in ("mesh", "router")
        for path in (ROOT / package).rglob("*.py")
        if '__name__ == "__main__"' in path.read_text()
    )


@pytest.mark.parametrize("module", processes())
def test_every_process_sets_it_before_grpc_is_loaded(module: str):
    subprocess.run([sys.executable, "-P", "-c", _WATCHED, module], env=_without_verbosity(), check=True, timeout=60)
