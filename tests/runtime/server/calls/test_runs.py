"""Calls that run in threads: none blocks another, each ends when its caller no longer waits, and none is lost."""

import threading
import time

import numpy as np
import pytest

from mesh.runtime.server.calls import runs as runs_module
from mesh.runtime.server.calls import watch as watch_module
from mesh.statuses import Code
from tests.runtime.server.conftest import ONE, Parts, answered, outputs
from tests.support import models
from tests.support.waiting import until

FOREVER = {"iterations": np.array([1 << 60], np.int64)}
SHORT = {"iterations": np.array([20], np.int64)}


async def slow(parts: Parts, name: str = "slow", slot: int = 1) -> None:
    """Loads a model that runs for as long as its input says, and marks it as slow."""
    copy = await parts.load(name, models.slow(), slot=slot)
    copy.pace.too_long(8)


async def running(parts: Parts, count: int, slot: int = 1) -> None:
    await until(lambda: parts.board.read(slot).running == count, why=f"{count} calls run")


async def test_a_long_call_runs_in_a_thread_while_others_are_answered(parts):
    """The board shows the long call, and the reply to another call contains the server's load."""
    await slow(parts)
    await parts.load("quick", models.constant(5))
    long = parts.infer("slow", **FOREVER)
    await running(parts, 1)
    quick = parts.infer("quick", x=ONE)
    assert quick.code is Code.OK
    assert quick.answers[0][3] == [(b"mesh-load", b"1")]
    assert long.code is None
    assert parts.board.read(1).in_flight == 1
    long.cancel()
    await running(parts, 0)


async def test_a_call_thought_to_be_short_is_taken_out_of_the_loop(parts):
    """A call that takes unexpectedly long in the loop is stopped, run again in a thread, and answered once. From then
    on calls of its size run in threads."""
    copy = await parts.load("slow", models.slow(), slot=1)
    assert copy.pace.inline[(8).bit_length()]
    # Long enough to be ended in the loop at any speed of the machine, because this test is about that limit.
    inputs = models.slow_inputs(12 * watch_module.LIMIT_NS / 1e9)
    call = parts.infer("slow", **inputs)
    assert call.code is None
    assert not copy.pace.inline[(8).bit_length()]
    (found,) = await outputs(call)
    assert found.item() == pytest.approx(inputs["iterations"].item(), rel=0.01)
    use = parts.board.read(1)
    assert (use.calls, use.failed, use.in_flight, use.running) == (1, 0, 0, 0)
    assert not parts.watch.options.terminate
    (again,) = await outputs(parts.infer("slow", **SHORT))
    assert again.item() == 20


async def test_the_first_call_of_a_larger_size_runs_in_a_thread(parts):
    copy = await parts.load("m", models.identity(shape=(None,)))
    x = np.zeros(5000, np.float32)
    first = parts.infer("m", x=x)
    assert first.code is None
    await answered(first)
    copy.pace.note(x.nbytes, 1000)
    copy.pace.inline[x.nbytes.bit_length()] = True  # on a busy machine one run alone may not show it
    assert parts.infer("m", x=x).code is Code.OK


async def test_a_call_is_ended_at_its_deadline(parts):
    """The caller gets the error at the deadline, and the thread is free soon after."""
    await slow(parts)
    call = await answered(parts.infer("slow", seconds=0.1, **FOREVER))
    assert call.code is Code.DEADLINE_EXCEEDED
    assert "still running" in call.text
    await running(parts, 0)
    use = parts.board.read(1)
    assert (use.calls, use.failed, use.in_flight) == (1, 1, 0)
    assert parts.runs.count == 0


async def test_a_call_is_ended_when_its_caller_goes(parts):
    """A running or waiting call ends when its caller disconnects, and the model continues to answer others."""
    await slow(parts)
    calls = [parts.infer("slow", **FOREVER) for _ in range(4)]  # two threads for one model
    await running(parts, 2)
    assert (parts.board.read(1).in_flight, parts.runs._waiting) == (4, 2)
    for call in calls:
        call.cancel()
    await running(parts, 0)
    assert parts.board.read(1).in_flight == 0
    assert (parts.runs.count, parts.runs._waiting, parts.runs._bytes, parts.runs.stuck) == (0, 0, 0, 0)
    assert (await outputs(parts.infer("slow", **SHORT)))[0].item() == 20


async def test_a_call_that_waits_for_a_thread_has_a_deadline_too(make):
    parts = make(threads=1)
    await slow(parts)
    first = parts.infer("slow", **FOREVER)
    await running(parts, 1)
    second = await answered(parts.infer("slow", seconds=0.1, **FOREVER))
    assert second.code is Code.DEADLINE_EXCEEDED
    assert "waited for a thread" in second.text
    first.cancel()
    await running(parts, 0)


async def test_one_model_leaves_a_thread_to_the_others(make):
    parts = make(threads=1)
    await slow(parts)
    await slow(parts, "other", slot=2)
    endless = [parts.infer("slow", **FOREVER) for _ in range(5)]
    await running(parts, 1)
    assert (await outputs(parts.infer("other", **SHORT)))[0].item() == 20
    for call in endless:
        call.cancel()
    await running(parts, 0)


async def test_models_with_calls_waiting_take_turns(make, monkeypatch):
    """A later model does not wait for all calls of an earlier one."""
    parts = make(threads=2)
    order: list[str] = []
    gate = threading.Event()

    def ran_by(name: str):
        def run(names, feed, options):
            gate.wait(10)
            order.append(name)
            return [np.zeros(1, np.float32)]

        return run

    for name in ("one", "two", "blocker"):
        await slow(parts, name)
        if name != "blocker":
            monkeypatch.setattr(parts.copies.get(name).session, "_run", ran_by(name))
    blockers = [parts.infer("blocker", **FOREVER) for _ in range(2)]  # one thread is left
    calls = [parts.infer(name, **SHORT) for name in ("one", "one", "one", "one", "two", "two", "two")]
    gate.set()
    for call in calls:
        await answered(call)
    assert order == ["one", "one", "two", "one", "two", "one", "two"]
    for call in blockers:
        call.cancel()


async def test_too_many_calls_are_refused(make, monkeypatch):
    """When too many calls or too many bytes wait, new calls are refused with RESOURCE_EXHAUSTED. The waiting calls are
    not affected."""
    monkeypatch.setattr(runs_module, "MAX_WAITING", 2)
    parts = make(threads=1)
    await slow(parts)
    calls = [parts.infer("slow", **FOREVER) for _ in range(3)]
    await running(parts, 1)
    refused = parts.infer("slow", **SHORT)
    assert refused.code is Code.RESOURCE_EXHAUSTED
    assert "2 calls are waiting" in refused.text
    monkeypatch.setattr(runs_module, "MAX_WAITING_BYTES", 8 * 3 + 7)
    calls[2].cancel()
    assert parts.infer("slow", **SHORT).code is None
    monkeypatch.setattr(runs_module, "MAX_WAITING", 3)
    refused = parts.infer("slow", **SHORT)
    assert refused.code is Code.RESOURCE_EXHAUSTED
    assert "24 bytes of input, of at most 31" in refused.text
    calls[0].cancel()
    calls[1].cancel()
    await until(lambda: parts.runs.count == 0, why="the call that waited is answered")


@pytest.mark.parametrize("values", [1, 1 << 19], ids=["read at once", "read in its thread"])
async def test_what_calls_hold_is_counted_while_they_are_here_and_not_after(parts, values):
    """A call's bytes count from its arrival until it is answered, which bounds the memory that large requests take."""
    copy = await parts.load("m", models.identity(shape=(None,)))
    x = np.zeros(values, np.float32)
    copy.pace.too_long(x.nbytes)
    call = parts.infer("m", x=x)
    assert parts.runs._bytes >= x.nbytes
    assert (await answered(call)).code is Code.OK
    assert parts.runs._bytes == 0


class Deaf:
    """A model that ignores `terminate`, like a single endless operator."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def run(self, names, feed, options):
        self.go.wait(20)
        return [np.zeros(1, np.float32)]


async def test_a_run_that_cannot_be_ended_costs_its_thread_alone(make, monkeypatch):
    """The caller of a run that cannot be ended is answered in time, and another thread takes over. Once the run
    returns, all is as before."""
    monkeypatch.setattr(runs_module, "_STUCK", 0.1)
    parts = make(threads=1)
    await slow(parts)
    await slow(parts, "other", slot=2)
    copy = parts.copies.get("slow")
    session, deaf = copy.session, Deaf()
    monkeypatch.setattr(session, "_run", deaf.run)
    call = await answered(parts.infer("slow", seconds=0.05, **SHORT))
    assert call.code is Code.DEADLINE_EXCEEDED
    await until(lambda: parts.runs.stuck == 1, why="the run is found not to end")
    assert parts.runs._workers.count == 3
    assert parts.board.read(1).running == 1  # still a suspect
    others = [parts.infer("other", **SHORT) for _ in range(3)]
    for other in others:
        assert (await outputs(other))[0].item() == 20
    deaf.go.set()
    await running(parts, 0)
    assert parts.runs.stuck == 0
    assert parts.board.read(1).in_flight == 0


async def test_replies_are_written_in_the_thread_and_errors_come_back(make):
    """The thread that runs a call also writes its reply. After a failed run, it continues with other calls."""
    parts = make(threads=1)
    copy = await parts.load("m", models.picky(), slot=1)
    copy.pace.too_long(4)
    copy.pace.too_long(16)
    bad = await answered(parts.infer("m", x=ONE))
    assert bad.code is Code.INTERNAL
    (good,) = await outputs(parts.infer("m", x=np.ones((4, 1), np.float32)))
    assert good.tolist() == [[1, 1], [1, 1]]


async def test_the_watch_sleeps_while_nothing_runs(parts, monkeypatch):
    """An idle server costs nothing. The watch for long runs wakes up for the next run."""
    copy = await parts.load("slow", models.slow(), slot=1)
    await until(lambda: parts.watch.asleep, why="the watch sleeps")
    call = parts.infer("slow", **models.slow_inputs(4 * watch_module.LIMIT_NS / 1e9))
    assert call.code is None
    assert not copy.pace.inline[(8).bit_length()]
    await answered(call)
    assert call.code is Code.OK


async def test_ends_leave_nothing_behind(make):
    """Closing the server answers every call that is in it."""
    parts = make(threads=1)
    await slow(parts)
    calls = [parts.infer("slow", **FOREVER) for _ in range(3)]
    await running(parts, 1)
    await parts.runs.close()
    assert {call.code for call in calls} == {Code.UNAVAILABLE}
    await until(lambda: parts.runs.count == 0, why="the thread has returned")


async def test_time_spent_is_counted(parts):
    await slow(parts)
    began = time.monotonic_ns()
    await answered(parts.infer("slow", **models.slow_inputs(0.05)))
    assert 0 < parts.board.read(1).busy_ns <= time.monotonic_ns() - began


async def test_a_large_call_in_the_loop_counts_with_its_processor_time(parts, monkeypatch):
    """A large call that loses time to other processes stays in the loop, because only its own processor time counts,
    and the reply does not share memory with the next request."""
    copy = await parts.load("m", models.identity(shape=(None,)))
    x = np.arange(25_000, dtype=np.float32)
    await answered(parts.infer("m", x=x))
    index = x.nbytes.bit_length()
    noted = []
    monkeypatch.setattr(parts.port, "_clock", iter((5_000, 47_000) * 2).__next__)
    monkeypatch.setattr(type(copy.pace), "note", lambda pace, size, took: noted.append((size, took)))
    copy.pace.inline[index] = True
    first, second = parts.infer("m", x=x), parts.infer("m", x=-x)
    assert noted == [(x.nbytes, 42_000)] * 2
    assert ((await outputs(first))[0] == x).all()
    assert ((await outputs(second))[0] == -x).all()
