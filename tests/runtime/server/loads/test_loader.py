"""Loads and unloads: measured sizes, failures with their status, every way to end, and complete clean-up."""

import asyncio
import gc
import threading
import weakref

import numpy as np
import pytest

from mesh.runtime import turns
from mesh.runtime.server.loads import loader as loader_module
from mesh.runtime.server.loads.loader import Order
from mesh.runtime.server.onnx import making, memory
from mesh.runtime.server.onnx.device import Device
from mesh.runtime.sharedmemory.slot import SlotState
from mesh.statuses import Code, MeshError, Reason
from tests.runtime.server.conftest import answered, outputs
from tests.support import models
from tests.support.waiting import until

MIB = 1 << 20
FOREVER = {"iterations": np.array([1 << 60], np.int64)}

exact = pytest.mark.skipif(not memory.EXACT, reason="this C library does not count what it has allocated")


async def refused(parts, name: str, content: bytes) -> MeshError:
    with pytest.raises(MeshError) as error:
        await parts.load(name, content, slot=0)
    return error.value


@exact
async def test_sizes_are_measured_to_the_byte(parts):
    """4 MiB of weights count as 4 to 4.2 MiB, and small models of the same form differ by less than 30 %."""
    # The first session of a process takes memory that belongs to no model.
    await parts.load("first", models.constant(1))
    # Made before and kept: what this test frees in the middle of a load would be measured with it.
    small = [models.logistic_regression(number) for number in range(5)]
    large = [models.weights(float(number), mebibytes=4) for number in range(5)]
    sizes = []
    for number in range(5):
        copy = await parts.load(f"regression-{number}", small[number])
        sizes.append(copy.host_bytes)
        big = await parts.load(f"weights-{number}", large[number])
        assert 4 * MIB <= big.host_bytes <= 4.2 * MIB
    assert max(sizes[1:]) < 1.3 * min(sizes[1:])
    assert 20_000 < sizes[-1] < 200_000


class Elsewhere(Device):
    """A device that holds sessions completely and whose reported memory never changes."""

    def memory(self) -> tuple[int, int]:
        return 1 << 30, 8 << 30


@exact
async def test_weights_on_a_device_are_not_counted_in_host_memory_too(make):
    """Weights on a device are not counted in host memory as well. However little the device reports, a model counts
    there with half its file and the minimum for a session."""
    device = Elsewhere("cuda", ("CPUExecutionProvider",))
    parts = make(on=device)
    await parts.load("first", models.constant(1))
    copy = await parts.load("m", models.unused_weights(mebibytes=4))
    assert copy.host_bytes < MIB
    assert copy.device_bytes >= device.least + 2 * MIB


async def test_a_model_that_is_loaded_answers(parts):
    """The board shows the copy as loaded, with the revision of its token."""
    copy = await parts.load("m", models.constant(4), token=b"agent-1.99", slot=3)
    use = parts.board.read(3)
    assert (use.state, use.revision) == (SlotState.LOADED, 99)
    assert copy.host_bytes >= 1
    assert list(parts.copies) == [copy]


async def test_the_board_says_loading_before_the_file_is_touched(parts):
    """A file that kills the server, or never finishes loading, can then be identified."""
    task = asyncio.create_task(parts.load("m", models.endless_loop(), token=b"a.5", slot=2))
    await until(lambda: parts.board.read(2).state, why="the load is on the board")
    assert (parts.board.read(2).state, parts.board.read(2).revision) == (SlotState.LOADING, 5)
    assert parts.board.suspects()
    await parts.loader.unload("m")
    assert parts.board.read(2).state is SlotState.FREE
    with pytest.raises(MeshError, match="cancelled"):
        await task


async def test_a_load_that_is_asked_for_twice_is_made_once(parts):
    """A model that is requested twice is loaded once, whether the first load is still under way or done."""
    path = parts.write("m", models.weights(1.0, mebibytes=1))
    order = Order("m", path, b"a.1", 0)
    first, second = await asyncio.gather(parts.loader.load(order), parts.loader.load(order))
    assert first is second
    assert await parts.loader.load(order) is first


async def test_another_copy_of_an_id_replaces_the_first(parts):
    """The token shows that the copy belongs to a new registration."""
    await parts.load("m", models.constant(1), token=b"a.1", slot=0)
    path = parts.write("n", models.constant(2))
    await parts.loader.load(Order("m", path, b"a.2", 1))
    assert parts.board.read(0).state is SlotState.FREE
    assert parts.board.read(1).state is SlotState.LOADED
    assert parts.copies.find(b"m", b"a.1") is None
    assert parts.copies.find(b"m", b"a.2") is not None


# -- what cannot be loaded


@pytest.mark.parametrize(
    ("content", "reason", "says"),
    [
        pytest.param(b"", Reason.BAD_REQUEST, "empty", id="empty"),
        pytest.param(b"this is no model", Reason.BAD_REQUEST, "", id="not-onnx"),
        pytest.param(models.logistic_regression(0)[:400], Reason.BAD_REQUEST, "", id="truncated"),
        pytest.param(b"\0" * 4096, Reason.BAD_REQUEST, "", id="zeros"),
        pytest.param(b"ORTM" * 100, Reason.BAD_REQUEST, "", id="another-format"),
        pytest.param(models.external_data("../x"), Reason.BAD_REQUEST, "external data", id="outside"),
        pytest.param(
            models.constant(1).replace(b"Expand", b"Expend"), Reason.BAD_REQUEST, "Expend", id="unknown-operator"
        ),
        pytest.param(models.sequence_input(), Reason.BAD_REQUEST, "'x' is seq(tensor(float))", id="no-tensor-in"),
        pytest.param(models.sequence_output(), Reason.BAD_REQUEST, "'y' is seq(tensor(float))", id="no-tensor-out"),
    ],
)
async def test_what_cannot_be_loaded_says_why(parts, content, reason, says):
    """A failed load leaves the slot free and the id unknown. Other models continue to answer."""
    await parts.load("good", models.constant(3), slot=1)
    error = await refused(parts, "bad", content)
    assert error.reason is reason
    assert error.text
    assert says in error.text
    assert parts.board.read(0).state is SlotState.FREE
    assert parts.copies.get("bad") is None
    assert not parts.loader._loading
    assert await parts.value("good") == 3


async def test_a_file_that_is_not_there_is_not_found(parts):
    with pytest.raises(MeshError) as error:
        await parts.loader.load(Order("m", str(parts.folder / "none.onnx")))
    assert error.value.reason is Reason.UNKNOWN_MODEL
    assert "none.onnx" in error.value.text


async def test_a_slot_that_is_not_on_the_board_is_refused(parts):
    with pytest.raises(MeshError, match="no slot 8: the use board has 8"):
        await parts.load("m", models.constant(1), slot=8)


async def test_a_model_that_does_not_end_fails_in_time(make):
    """A load that does not end fails with DEADLINE_EXCEEDED and names the time limit. The next load still gets a
    thread."""
    parts = make(timeout=0.3, concurrency=1)
    error = await refused(parts, "endless", models.endless_loop())
    assert error.reason is Reason.DEADLINE
    assert "0.3 s" in error.text
    await parts.load("good", models.constant(3))
    assert await parts.value("good") == 3
    assert parts.board.read(0).state is SlotState.FREE


async def test_a_model_that_fails_on_made_up_input_is_loaded(parts):
    """A warm-up call with generated input may fail although callers know valid input."""
    await parts.load("m", models.picky())
    (found,) = await outputs(parts.infer("m", x=np.ones((4, 1), np.float32)))
    assert found.shape == (2, 2)


async def test_a_model_with_enormous_declared_inputs_is_loaded_without_a_warm_up(parts):
    """No input of such a size is made up for a warm-up call."""
    await parts.load("m", models.identity(shape=(1 << 20, 1 << 20)))


# -- ends


async def test_a_load_that_is_cancelled_leaves_nothing(parts):
    """A load that is cancelled while it runs or waits leaves nothing behind, and an unload returns once the load is
    gone."""
    tasks = [asyncio.create_task(parts.load(f"m{number}", models.endless_loop(), slot=number)) for number in range(4)]
    await until(lambda: len(list(parts.board.uses())) == 4, why="all are on the board")
    for task in tasks:
        task.cancel()
    for number, task in enumerate(tasks):
        with pytest.raises(asyncio.CancelledError):
            await task
        await parts.loader.unload(f"m{number}")
    assert list(parts.board.uses()) == []
    assert not parts.loader._loading
    await parts.load("good", models.constant(3))


async def test_an_unload_waits_for_calls_in_flight(parts):
    """During an unload, new calls are answered *not here* at once. The memory is freed after the last running call."""
    copy = await parts.load("m", models.slow(), token=b"a.1", slot=0)
    copy.pace.too_long(8)
    session = weakref.ref(copy.session._session)
    call = parts.send_to("m", b"a.1", **models.slow_inputs(0.4))
    await until(lambda: parts.board.read(0).running, why="the call runs")
    task = asyncio.create_task(parts.loader.unload("m"))
    await until(lambda: parts.board.read(0).state is SlotState.UNLOADING, why="the unload has begun")
    assert parts.send_to("m", b"a.1", **FOREVER).code is Code.UNAVAILABLE
    assert call.code is None
    assert not task.done()
    await task
    assert (await answered(call)).code is Code.OK
    assert parts.board.read(0).state is SlotState.FREE
    del copy
    gc.collect()
    assert session() is None


async def test_an_unload_ends_calls_that_last_too_long(parts):
    """Running calls that an unload ends get an error that the model is gone. Waiting calls are sent to other pods."""
    copy = await parts.load("m", models.slow(), slot=0)
    copy.pace.too_long(8)
    calls = [parts.infer("m", **FOREVER) for _ in range(3)]
    await until(lambda: parts.board.read(0).running == 2, why="both calls run")
    await parts.loader.unload("m", grace=0.05)
    assert [call.code for call in calls] == [Code.UNAVAILABLE] * 3
    assert [(b"mesh-not-here", b"1") in call.answers[0][3] for call in calls] == [False, False, True]
    assert parts.board.read(0).state is SlotState.FREE


async def test_a_call_that_cannot_be_ended_fails_the_unload(parts, monkeypatch):
    """After the failed unload, the slot stays taken and suspect, because the call still writes to it."""
    monkeypatch.setattr(loader_module, "_STOPPING", 0.05)
    copy = await parts.load("m", models.slow(), slot=0)
    copy.pace.too_long(8)
    event = asyncio.Event()
    loop = asyncio.get_running_loop()

    def deaf(names, feed, options):
        asyncio.run_coroutine_threadsafe(event.wait(), loop).result(10)
        return [np.zeros(1, np.float32)]

    monkeypatch.setattr(copy.session, "_run", deaf)
    parts.infer("m", **FOREVER)
    await until(lambda: parts.board.read(0).running, why="the call runs")
    with pytest.raises(MeshError, match="cannot be ended") as error:
        await parts.loader.unload("m", grace=0.05)
    assert error.value.reason is Reason.DEADLINE
    assert [slot for slot, _ in parts.board.suspects()] == [0]
    event.set()
    await until(lambda: not parts.board.read(0).running, why="the run has returned")


async def test_an_unload_of_another_copy_leaves_this_one(parts):
    """An outdated order to unload an earlier copy does not affect the present one. Unloading an unknown id succeeds."""
    await parts.load("m", models.constant(1), token=b"a.2", slot=0)
    await parts.loader.unload("m", token=b"a.1")
    await parts.loader.unload("nobody")
    assert parts.copies.get("m") is not None
    await parts.loader.unload("m", token=b"a.2")
    assert parts.copies.get("m") is None


async def test_a_purge_ends_everything(parts):
    await parts.load("idle", models.constant(1), slot=0)
    copy = await parts.load("busy", models.slow(), slot=1)
    copy.pace.too_long(8)
    call = parts.infer("busy", **FOREVER)
    loading = asyncio.create_task(parts.load("loading", models.endless_loop(), slot=2))
    await until(lambda: len(list(parts.board.uses())) == 3 and parts.board.read(1).running, why="all are there")
    await parts.loader.purge()
    assert list(parts.board.uses()) == []
    assert call.code is Code.UNAVAILABLE
    with pytest.raises(MeshError):
        await loading


# -- measuring


async def test_a_load_that_lasts_does_not_hold_up_the_others(make, monkeypatch):
    """While an endless load is being measured, other loads wait only for a moment, and then continue with a size
    estimated from their file."""
    monkeypatch.setattr(making, "MEASURING_WAIT", 0.05)
    parts = make(concurrency=2)
    endless = asyncio.create_task(parts.load("endless", models.endless_loop(), slot=0))
    await until(lambda: parts.board.read(0).state, why="the load is under way")
    content = models.weights(2.0, mebibytes=2)
    copy = await parts.load("m", content)
    assert copy.host_bytes == len(content) + len(content) // 4 + 65536
    assert await parts.value("m") == 2
    await parts.loader.unload("endless")
    with pytest.raises(MeshError):
        await endless


@exact
async def test_what_others_bring_and_take_meanwhile_is_not_counted(parts, monkeypatch):
    """An unload during a measured load does not reduce the size that is measured."""
    await parts.load("first", models.constant(1))
    await parts.load("big", models.weights(1.0, mebibytes=32))
    warm_up = making._warm_up
    loop = asyncio.get_running_loop()

    def with_an_unload(*args):
        asyncio.run_coroutine_threadsafe(parts.loader.unload("big"), loop).result(10)
        return warm_up(*args)

    monkeypatch.setattr(making, "_warm_up", with_an_unload)
    copy = await parts.load("m", models.weights(2.0, mebibytes=4))
    assert 3.8 * MIB <= copy.host_bytes <= 4.4 * MIB


@exact
async def test_sizes_measured_beside_calls_stay_within_reason(parts):
    """A size that is measured while another model runs is at least half of the file, and at most eight times the file
    plus 8 MiB."""
    copy = await parts.load("slow", models.slow())
    copy.pace.too_long(8)
    call = parts.infer("slow", **FOREVER)
    content = models.weights(1.0, mebibytes=1)
    made = await parts.load("m", content)
    assert len(content) // 2 <= made.host_bytes <= 8 * len(content) + 8 * MIB
    call.cancel()
    await until(lambda: parts.runs.count == 0, why="the call has ended")


async def test_memory_is_given_back_once_for_many_unloads(parts):
    for number in range(5):
        await parts.load(f"m{number}", models.constant(number))
    for number in range(5):
        await parts.loader.unload(f"m{number}")
    await until(lambda: parts.loader.trimmer.count == 1, why="memory is trimmed")


async def test_warm_ups_that_do_not_end_give_their_places_to_others(make, monkeypatch):
    """Warm-ups that do not end give their turns to other loads, which are then measured as usual, even if more warm-ups
    hang than turns exist."""
    monkeypatch.setattr(turns, "LONG", 0.02)
    monkeypatch.setattr(making, "MEASURING_WAIT", 0.05)
    parts = make(concurrency=2)
    endless = [asyncio.create_task(parts.load(f"endless {n}", models.endless_loop(), slot=n)) for n in range(4)]
    meter = parts.loader._meter
    await until(lambda: meter.unmeasured == 4, why="all four loads have had their time")
    parts.loader._turns._long = 60.0
    monkeypatch.setattr(making, "MEASURING_WAIT", 60.0)
    content = models.weights(2.0, mebibytes=2)
    copy = await parts.load("good", content)
    assert len(parts.loader._loading) == 4
    assert copy.host_bytes != len(content) + len(content) // 4 + 65536
    assert await parts.value("good") == 2
    for n in range(4):
        await parts.loader.unload(f"endless {n}")
    ended = await asyncio.gather(*endless, return_exceptions=True)
    assert {str(error) for error in ended} == {"CANCELLED: the load was cancelled"}


async def test_loads_that_cannot_be_ended_are_said_and_bounded(make, monkeypatch):
    """Each load that cannot be ended keeps its thread, and its slot as a suspect. After a few of them, no further load
    begins until some have ended."""
    monkeypatch.setattr(loader_module, "_STOPPING", 0.05)
    parts = make(timeout=0.05, concurrency=8)
    ends, real = threading.Event(), making.make

    def deaf(path, **more):
        if "deaf" in more["model_id"]:
            ends.wait(20)
        return real(path, **more)

    monkeypatch.setattr(making, "make", deaf)
    for n in range(loader_module.MAX_STUCK):
        with pytest.raises(MeshError, match="cannot be ended") as error:
            await parts.load(f"deaf {n}", models.constant(n), slot=n)
        assert error.value.reason is Reason.DEADLINE
        assert error.value.details == {loader_module.STUCK: "1"}
        assert parts.board.read(n).state is SlotState.LOADING
        assert parts.loader.stuck == n + 1
    with pytest.raises(MeshError, match=f"{loader_module.MAX_STUCK} earlier loads cannot be ended") as error:
        await parts.load("good", models.constant(7))
    assert error.value.reason is Reason.UNAVAILABLE
    ends.set()
    await until(lambda: not parts.loader.stuck, why="the stuck loads have ended")
    assert parts.board.read(0).state is SlotState.FREE
    parts.loader._timeout = 20.0
    await parts.load("good", models.constant(7))
    assert await parts.value("good") == 7


async def test_a_locale_that_is_not_there_is_named_with_the_way_out(parts):
    error = await refused(parts, "m", models.lower("xx_XX.UTF-8"))
    assert error.text.startswith("the model needs the locale xx_XX.UTF-8, which this machine lacks: install")
    assert "locale-gen" in error.text
