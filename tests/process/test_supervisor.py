"""Supervision of a real child process, from its start through deaths, hangs and restarts to its end."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from mesh import process
from mesh.process import supervisor as module
from mesh.process.restarts import RestartPolicy
from mesh.process.supervisor import ChildLife, Ended, Program, StartFailed, State, Supervisor
from mesh.process.tasks import Duty, Tasks
from tests.support.waiting import until

KEEP = Duty("keep", "nothing is kept")
SLEEP = "print('up', flush=True); import time; time.sleep(600)"


class Kept:
    """A supervised program, and the events that its supervisor reports."""

    def __init__(self, code: str = SLEEP, **options: Any) -> None:
        self.code = code
        self.lives: list[ChildLife] = []
        self.deaths: list[Ended] = []
        self.given_up: list[str] = []
        self.lost: list[str] = []
        self.ready = self.hung = 0
        program = Program("kept", self.spawn, policy=RestartPolicy(first=0.001, longest=0.01), start_timeout=30.0)
        self.supervisor = Supervisor(
            replace(program, **options),
            on_ready=self.became_ready,
            on_death=self.deaths.append,
            on_hung=self.hangs,
            on_given_up=self.given_up.append,
        )
        self.tasks = Tasks(self.lost.append)

    async def spawn(self, life: ChildLife) -> process.Process:
        self.lives.append(life)
        return await process.spawn([sys.executable, "-I", "-S", "-c", self.code], name="kept", beats=True)

    async def missing(self) -> str:
        child = self.supervisor.child
        return "" if child is not None and "up" in child.tail else "it says nothing"

    def became_ready(self) -> None:
        self.ready += 1

    def hangs(self) -> None:
        self.hung += 1

    def run(self) -> None:
        self.tasks.run(KEEP, self.supervisor.run)

    @property
    def pid(self) -> int:
        assert self.supervisor.pid is not None
        return self.supervisor.pid


@contextlib.asynccontextmanager
async def kept(code: str = SLEEP, **options: Any) -> AsyncIterator[Kept]:
    made = Kept(code, **options)
    try:
        yield made
    finally:
        await made.supervisor.stop(5.0)
        await made.tasks.close()
        assert made.supervisor.pid is None


async def test_one_that_dies_is_started_again() -> None:
    async with kept() as one:
        one.run()
        await until(lambda: one.ready == 1)
        for _ in range(3):
            before, count = one.pid, one.ready
            os.kill(before, signal.SIGKILL)
            await until(lambda: one.ready == count + 1)  # noqa: B023
            assert one.pid != before
        assert [ended.how for ended in one.deaths] == ["was killed by SIGKILL"] * 3
        assert [life.number for life in one.lives] == [1, 2, 3, 4]
        assert (one.supervisor.state, one.supervisor.starts, one.supervisor.deaths) == (State.READY, 4, 3)
    assert not one.lost


@pytest.mark.parametrize(
    ("limits", "stopped"),
    [
        (process.HangLimits(stopped=0.2, silent=60, interval=0.05), True),
        (process.HangLimits(start=0.3, interval=0.05), False),  # never beats
    ],
    ids=["stopped", "silent"],
)
async def test_one_that_hangs_is_killed_and_replaced(limits: process.HangLimits, stopped: bool) -> None:
    """The child's successor learns whether the hang was the child's own fault. If the child was stopped by a signal, it
    was not."""
    async with kept(limits=limits) as one:
        one.run()
        await until(lambda: one.ready == 1)
        if stopped:
            os.kill(one.pid, signal.SIGSTOP)
        await until(lambda: one.ready == 2, timeout=30)
        assert one.hung >= 1
        assert one.deaths[0].hung is not None
        assert one.deaths[0].hung.stopped is stopped
        assert one.lives[1].innocent is stopped


async def test_a_first_start_that_fails_is_told_and_not_tried_again() -> None:
    async with kept("print('no such device'); raise SystemExit(3)") as one:
        program = replace(
            one.supervisor.program, missing=one.missing, explain=lambda how, lines: f"it {how}: {lines[-1]}"
        )
        one.supervisor.program = program
        with pytest.raises(StartFailed, match="it ended with status 3: no such device"):
            await one.supervisor.start()
        assert len(one.lives) == 1
        assert not one.deaths, "the child has never served"


async def test_a_start_that_takes_too_long_leaves_nothing() -> None:
    async def never() -> str:
        return "no lease yet"

    async with kept(missing=never, start_timeout=0.2) as one:
        with pytest.raises(StartFailed, match=r"is not ready after 0\.2 s: no lease yet"):
            await one.supervisor.start()
        assert one.supervisor.pid is None


async def test_later_starts_are_waited_for_where_the_program_says_so() -> None:
    async with kept() as one:
        patient = replace(one.supervisor.program, missing=one.missing, wait_again=False)
        one.supervisor.program = patient
        await one.supervisor.start()
        one.code = "import time; time.sleep(600)"  # never ready again
        one.run()
        os.kill(one.pid, signal.SIGKILL)
        await until(lambda: one.ready == 2)


async def test_one_that_does_not_start_any_more_is_given_up() -> None:
    """The supervisor reports how the last child ended, and its duty ends too."""
    async with kept(policy=RestartPolicy(first=0.001, longest=0.01, give_up=3)) as one:
        one.supervisor.program = replace(one.supervisor.program, missing=one.missing)
        await one.supervisor.start()
        one.run()
        one.code = "raise SystemExit(7)"
        os.kill(one.pid, signal.SIGKILL)
        await until(lambda: one.lost)
        assert one.given_up == ["ended with status 7"]
        assert len(one.lives) == 1 + 3
        assert one.lost == ["the task 'keep', which this process cannot do without, ended"]


async def test_a_program_that_cannot_be_spawned_is_tried_again() -> None:
    async with kept() as one:
        spawn, failures = one.spawn, 0

        async def failing(life: ChildLife) -> process.Process:
            nonlocal failures
            if failures < 2:
                failures += 1
                raise OSError("out of processes")
            return await spawn(life)

        one.supervisor.program = replace(one.supervisor.program, spawn=failing)
        one.run()
        await until(lambda: one.ready == 1)
        assert one.supervisor.starts == 3
        assert not one.deaths


async def test_an_end_that_is_wanted_is_no_death() -> None:
    async with kept() as one:
        one.run()
        await until(lambda: one.ready == 1)
        one.supervisor.leave()
        os.kill(one.pid, signal.SIGTERM)
        await until(lambda: one.supervisor.pid is None)
        await asyncio.sleep(0)
        assert one.supervisor.state is State.STOPPED
        assert not one.deaths
        assert len(one.lives) == 1
    assert not one.lost


async def test_stopping_while_it_is_being_started_leaves_none() -> None:
    async with kept() as one:
        one.run()
        await until(lambda: one.lives)
    assert len(one.lives) == 1


async def test_what_is_not_watched_any_more_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a bug ends the watch over a child, the supervisor fails instead of keeping the child, because its hangs would
    go unnoticed."""
    monkeypatch.setattr(module, "_SLICE", 0.01)
    async with kept() as one:
        one.run()
        await until(lambda: one.ready == 1)
        monkeypatch.setattr(module.Watch, "failed", property(lambda watch: ValueError("a bad look")))
        await until(lambda: one.lost)
        assert "kept is no longer watched" in one.lost[0]
