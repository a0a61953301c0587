"""The command line of the model server and its memory limit."""

import subprocess
import sys
from pathlib import Path

import pytest

from mesh.runtime.server import settings


def test_a_command_line_becomes_settings():
    given = settings.parse(
        [
            "--spi",
            "/run/spi",
            "--data",
            "0.0.0.0:8001",
            "--capacity",
            "1.5GiB",
            "--device",
            "cpu",
            "--load-timeout",
            "7",
        ]
    )
    assert (given.spi, given.host, given.port) == (Path("/run/spi"), "0.0.0.0", 8001)
    assert (given.capacity, given.device, given.load_timeout) == (3 << 29, "cpu", 7.0)
    assert (given.board, given.memory_limit, given.max_message) == (None, 0, 16 << 20)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        pytest.param([], "--spi", id="no-socket"),
        pytest.param(["--capacity", "much"], "not a size", id="size"),
        pytest.param(["--data", "nowhere"], "not an address", id="address"),
        pytest.param(["--threads", "0"], "a whole number of 1 or more", id="threads"),
        pytest.param(["--device", "tpu"], "tpu", id="device"),
    ],
)
def test_a_wrong_command_line_says_so(options, says, capsys):
    """An invalid command line is reported and ends with status 2, as in every command."""
    with pytest.raises(SystemExit) as error:
        settings.parse([*(["--spi", "/x"] if options else []), *options])
    assert error.value.code == 2
    assert says in capsys.readouterr().err


def test_the_memory_limit_bounds_what_is_really_used():
    """The memory limit applies to memory in use, not to memory merely reserved. An allocation beyond it fails, and the
    process lives on."""
    script = """
import mmap
from mesh.runtime.server.onnx import memory
reserved = mmap.mmap(-1, 1 << 30)
memory.limit(memory.private() + (200 << 20))
kept = bytearray(100 << 20)
try:
    bytearray(200 << 20)
except MemoryError:
    print("refused")
bytearray(50 << 20)
try:
    memory.limit(50 << 20)
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    refused, too_low = done.stdout.splitlines()
    assert refused == "refused"
    assert "a memory limit of 52428800 bytes is below" in too_low
