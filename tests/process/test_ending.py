"""The end of a process that cannot continue: orderly if possible, never late, with the reason in its last line."""

import asyncio
import json
import subprocess
import sys

import pytest

from mesh.process.ending import Ending

PROGRAM = """
import asyncio, sys
from mesh.process.ending import Ending
from mesh.telemetry import logs

async def closing():
    if {hangs}:
        await asyncio.Event().wait()
    logs.get("test").info("closed in order")

async def main():
    ending = Ending()
    if {why!r}:
        ending.because({why!r})
        ending.because("a second reason")
    return await ending.close(closing(), within=0.05)

logs.configure(level="info", fmt="json", process="test")
sys.exit(asyncio.run(main()))
"""


def ended(*, why: str, hangs: bool) -> tuple[int, list[str]]:
    """Runs the program, and returns its exit status and the lines of its log."""
    program = PROGRAM.format(why=why, hangs=hangs)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize("hangs", [False, True], ids=["in order", "hangs"])
def test_the_first_reason_is_the_last_line(hangs: bool) -> None:
    status, lines = ended(why="the task 'tick' ended", hangs=hangs)
    assert status == 1
    assert json.loads(lines[-1])["why"] == "the task 'tick' ended"
    assert any("closed in order" in line for line in lines) is not hangs


def test_an_ordinary_end_is_silent() -> None:
    status, lines = ended(why="", hangs=False)
    assert status == 0
    assert len(lines) == 1


async def test_who_ends_anyway_needs_no_reason() -> None:
    """When a process is already closing, the end of a task is not a reason, and the exit status stays 0."""
    ending = Ending()

    async def closing() -> None:
        ending.because("the task 'tick' ended")

    assert await ending.close(closing(), within=60.0) == 0
    assert not ending.why


async def test_waiters_get_the_reason_of_the_end() -> None:
    ending = Ending()
    waiting = asyncio.ensure_future(ending.wait())
    ending.because("no more")
    assert await waiting == "no more"
