"""Real child processes that send heartbeats, are stopped or fall silent, and what is done about them."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mesh import process
from mesh.process import heartbeat, proc
from mesh.process.tasks import Duty, Tasks
from tests.support.waiting import until

ROOT = Path(__file__).resolve().parents[2]
QUICK = process.HangLimits(stopped=0.2, silent=0.6, suspect=0.2, interval=0.05)

_BEATS = """
import asyncio, os, signal, time
from mesh.process import begin_beating
async def main():
    begin_beating()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, time.sleep, 600)  # the loop hangs
    print("up", os.environ.get("MESH_HEARTBEAT_FD"), flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


async def a_child(code: str = _BEATS, **options: Any) -> process.Process:
    child = await process.spawn([sys.executable, "-c", code], name="child", beats=True, **options)
    await until(lambda: child.tail, why="the child is up")
    return child


async def test_a_childs_loop_is_heard_and_its_own_children_are_not_in_its_place() -> None:
    child = await a_child()
    try:
        assert child.tail == ("up None",), "the child does not see the variable"
        await until(lambda: child.heard(), why="the child beats")
        first = child.heard()
        await until(lambda: child.heard() > first, why="the child beats again")
        assert child.heard() <= time.monotonic()
    finally:
        await child.terminate(5)


@pytest.mark.parametrize(
    ("number", "why", "stopped"),
    [(signal.SIGSTOP, "was stopped by a signal", True), (signal.SIGUSR1, "gave no sign of life", False)],
    ids=["stopped", "silent"],
)
async def test_a_child_that_hangs_is_killed(number: signal.Signals, why: str, stopped: bool) -> None:
    """The watch reports once why the child hangs, and kills the child."""
    verdicts: list[process.HangVerdict] = []
    child = await a_child()
    # The child beats twice a second, so limits on silence below a second would hit a healthy child.
    limits = process.HangLimits(stopped=0.2, silent=2.0, suspect=1.0, interval=0.05)
    watch = process.Watch(child, child.heard, limits=limits, on_hung=verdicts.append)
    assert (watch.hung, watch.trouble) == (None, None)
    child.send_signal(number)
    assert await child.wait(20) == -signal.SIGKILL
    assert [verdict.why.startswith(why) for verdict in verdicts] == [True]
    assert watch.hung == verdicts[0]
    assert watch.hung.stopped is stopped
    assert (watch.trouble or "").startswith(f"child {why}")


async def test_a_child_that_ends_by_itself_did_not_hang() -> None:
    child = await a_child("print('up', flush=True)")
    watch = process.Watch(child, child.heard, limits=QUICK)
    assert await child.wait(10) == 0
    await until(lambda: watch._task.done(), why="the watch ends with the child")
    assert watch.hung is None


async def test_a_duty_that_keeps_a_child_turns_while_the_child_is_watched() -> None:
    """A duty that keeps a child may wait for the child's end for days. While the child is watched, the duty does not
    count as hanging."""
    lost: list[str] = []
    tasks = Tasks(lost.append)
    watched = asyncio.get_running_loop().create_future()

    async def keep() -> None:
        child = await process.spawn(["sleep", "60"], name="child")
        watch = process.Watch(child, lambda: time.monotonic())
        watched.set_result(child)
        try:
            await child.wait()
        finally:
            watch.close()

    tasks.run(Duty("keep a child", "nothing", turns=60), keep)
    child = await watched
    (standing,) = tasks._duties
    for _ in range(2):
        last = standing.pulse.last
        await until(lambda last=last: standing.pulse.last > last, why="the duty turns")
    child.kill()
    await tasks.settle(10.0)
    assert [why.partition(",")[0] for why in lost] == ["the task 'keep a child'"]


async def test_who_is_watched_no_more_is_left_alone() -> None:
    child = await a_child()
    watch = process.Watch(child, child.heard, limits=QUICK)
    watch.close()
    child.send_signal(signal.SIGSTOP)
    await until(lambda: (seen := proc.stat(child.pid)) is not None and seen.state == "T", why="the child is stopped")
    await asyncio.sleep(3 * QUICK.stopped)  # there is no condition to wait for when something must not happen
    assert child.returncode is None
    child.kill()
    await child.wait(10)


_PARENT = f"""
import asyncio, sys
from mesh import process
async def main():
    child = await process.spawn([sys.executable, "-c", {_BEATS!r}], name="child", beats=True)
    limits = process.HangLimits(stopped=0.4, silent=2.0, suspect=1.0, interval=0.1)
    watch = process.Watch(child, child.heard, limits=limits, on_hung=lambda verdict: print("hung", flush=True))
    while not child.heard():
        await asyncio.sleep(0.01)
    print(child.pid, flush=True)
    await child.wait()
asyncio.run(main())
"""


async def test_who_is_stopped_together_with_its_watcher_goes_on_with_it() -> None:
    """If a child and its watcher are stopped together, as by Ctrl-Z, the child survives even if the watcher continues
    first."""
    parent = subprocess.Popen([sys.executable, "-c", _PARENT], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert parent.stdout is not None
    pid = int(await asyncio.to_thread(parent.stdout.readline))
    try:
        for each in (parent.pid, pid):
            os.kill(each, signal.SIGSTOP)
        await asyncio.sleep(3.0)  # longer than all limits above
        for each in (parent.pid, pid):
            os.kill(each, signal.SIGCONT)
        told = asyncio.create_task(asyncio.to_thread(parent.stdout.readline))
        await asyncio.wait({told}, timeout=1.0)
        assert not told.done(), "the child was killed when it continued"
        os.kill(pid, signal.SIGSTOP)  # the watcher continues, and the child is stopped now
        assert await asyncio.wait_for(told, 20) == "hung\n"
    finally:
        parent.kill()
        parent.wait(10)
        parent.stdout.close()


async def test_each_answer_is_a_sign_of_life() -> None:
    """If a program is polled, each positive answer is a sign of life. A negative answer or an error is not, and polling
    continues."""
    answers: list[Any] = [False, RuntimeError("a bad question"), True]
    asked = 0

    async def ask() -> bool:
        nonlocal asked
        asked += 1
        answer = answers[min(asked, len(answers)) - 1]
        if isinstance(answer, Exception):
            raise answer
        return bool(answer)

    before = time.monotonic()
    one = process.Answers(ask, name="asked", interval=0.001)
    try:
        assert one.last() == 0.0
        await until(lambda: one.last() > 0)
        assert asked >= 3
        assert one.last() >= before
    finally:
        one.close()


async def test_a_page_that_is_none_is_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the variable for the heartbeat page is left over and its descriptor is another file by now, nothing is written
    to that file."""
    file = tmp_path / "precious"
    file.write_bytes(b"x" * 64)
    with file.open("r+b") as opened:
        for value in (str(opened.fileno()), "-1", "999999", "nonsense"):
            monkeypatch.setenv(heartbeat.VARIABLE, value)
            heartbeat.begin()
            assert heartbeat.VARIABLE not in os.environ
    assert file.read_bytes() == b"x" * 64


def test_the_kernels_line_is_read_whatever_the_name(tmp_path: Path) -> None:
    """The kernel's status line is parsed correctly even if the process's name is `) R 1 (`."""
    for pid, state in (("7", "T"), ("8", "R")):
        folder = tmp_path / pid / "task" / pid
        folder.mkdir(parents=True)
        fields = " ".join(map(str, range(4, 14)))
        line = f"{pid} () R 1 () {state} {fields} 250 150 0 0 20 0 1\n"
        (tmp_path / pid / "stat").write_text(line)
        (folder / "stat").write_text(line)
    seen = proc.stat(7, proc=str(tmp_path))
    assert seen is not None
    assert (seen.state, seen.cpu) == ("T", 400 / os.sysconf("SC_CLK_TCK"))
    assert [proc.runnable(pid, proc=str(tmp_path)) for pid in (7, 8, 9)] == [False, True, False]
    assert proc.stat(9, proc=str(tmp_path)) is None
    own = proc.stat(os.getpid())
    assert own is not None
    assert own.state == "R"
