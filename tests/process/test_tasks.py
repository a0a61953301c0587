"""Background tasks: essential duties end with a report, expendable ones are restarted, and hanging ones are
detected."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from mesh.process import tasks as module
from mesh.process.restarts import RestartPolicy
from mesh.process.tasks import Duty, Tasks, turned
from tests.support.waiting import until

FOLLOW = Duty("follow etcd", "nothing is followed")
RATE = Duty("rate", "the rate is not told", essential=False)
SAYS = "the task 'follow etcd', which this process cannot do without, "


async def fails() -> None:
    raise KeyError("pod-1")


async def ends() -> None:
    pass


async def stays() -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("work", "says"), [(fails, "failed: KeyError: 'pod-1'"), (ends, "ended")], ids=["fails", "ends"]
)
async def test_the_end_of_an_essential_duty_is_told_with_its_reason(
    work: Callable[[], Coroutine[Any, Any, None]], says: str
) -> None:
    lost: list[str] = []
    held = Tasks(lost.append)
    held.run(FOLLOW, work)
    await until(lambda: lost)
    assert lost == [SAYS + says]
    await held.close()
    assert len(lost) == 1


async def test_an_essential_duty_that_is_cancelled_by_anybody_else_is_lost_too() -> None:
    """An essential duty that is cancelled by accident, for instance by a task group or a timeout, is reported as lost
    although it ends without an error."""
    lost: list[str] = []
    held = Tasks(lost.append)
    held.run(FOLLOW, stays).cancel()
    await until(lambda: lost)
    assert lost == [SAYS + "was cancelled"]


async def test_closing_ends_them_in_silence() -> None:
    lost: list[str] = []
    held = Tasks(lost.append)
    held.run(FOLLOW, stays)
    held.run(RATE, stays)
    held.start(stays(), "some call")
    await held.close()
    assert not lost
    assert len(held) == 0


async def test_several_of_one_kind_are_told_apart() -> None:
    lost: list[str] = []
    held = Tasks(lost.append)
    held.run(FOLLOW, stays, "0")
    held.run(FOLLOW, ends, "1")
    await until(lambda: lost)
    assert lost == ["the task 'follow etcd 1', which this process cannot do without, ended"]
    await held.close()


async def test_an_expendable_duty_that_fails_is_logged_and_started_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "AGAIN", RestartPolicy(first=0.001, longest=0.004))
    lost: list[str] = []
    starts = []

    async def work() -> None:
        starts.append(1)
        if len(starts) < 4:
            raise ValueError("a bad number")
        await asyncio.Event().wait()

    held = Tasks(lost.append)
    with caplog.at_level(logging.ERROR):
        held.run(RATE, work)
        await until(lambda: len(starts) == 4)
    assert "started again" in caplog.text
    assert "a bad number" in caplog.text
    assert not lost
    await held.close()


async def test_an_expendable_duty_that_is_done_is_done() -> None:
    lost: list[str] = []
    held = Tasks(lost.append)
    held.run(RATE, ends)
    await until(lambda: not len(held))
    assert not lost


async def test_a_duty_that_hangs_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A duty that should call `turned()` and does not is lost. A duty that calls it is not, nor is one that need not
    call it."""
    monkeypatch.setattr(module, "_LOOK", 0.01)
    lost: list[str] = []
    turns = 0

    async def works() -> None:
        nonlocal turns
        while True:
            turned()
            turns += 1
            await asyncio.sleep(0.001)

    held = Tasks(lost.append)
    held.run(Duty("works", "-", turns=0.2), works)
    held.run(Duty("waits", "-"), stays)
    held.run(Duty("hangs", "-", turns=0.2), stays)
    await until(lambda: lost)
    seen = turns
    await until(lambda: turns > seen + 300, why="time for another verdict")
    assert lost == [
        "the task 'hangs', which this process cannot do without, hangs: it should turn at least every 0.2 s"
    ]
    await held.close()
    assert len(lost) == 1


async def test_a_task_that_a_duty_starts_turns_its_own_wheel() -> None:
    """A duty that another duty starts reports its own progress separately."""
    pulses = []

    async def inner() -> None:
        pulses.append(module._pulse.get())

    held = Tasks(lambda why: None)

    async def outer() -> None:
        pulses.append(module._pulse.get())
        held.run(RATE, inner)
        await asyncio.Event().wait()

    turned()  # outside of a duty this call does nothing
    held.run(FOLLOW, outer)
    await until(lambda: len(pulses) == 2)
    assert None not in pulses
    assert pulses[0] is not pulses[1]
    await held.close()


async def test_errors_that_somebody_awaits_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    held = Tasks(awaited=(KeyError,))
    with caplog.at_level(logging.ERROR):
        task = held.start(fails(), "read")
        await asyncio.wait({task})
        await asyncio.sleep(0)
    assert not caplog.text


async def test_a_task_that_forgets_its_cancel_is_cancelled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_AGAIN", 0.01)
    forgotten = 0

    async def forgetful() -> None:
        nonlocal forgotten
        while forgotten < 2:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                forgotten += 1
        await asyncio.Event().wait()

    held = Tasks()
    held.start(forgetful(), "forgetful")
    await asyncio.sleep(0)
    await held.close()
    assert (forgotten, len(held)) == (2, 0)
