"""The inbox: frames from bytes cut in any way, and a pause in reading while it holds too much."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.statuses import Reason
from mesh.wire import framing, inbox
from mesh.wire.budget import Budget
from tests.support.wire import cut, frames

LIMIT = 1 << 20


def collect(box):
    taken = []
    while (frame := box.take()) is not None:
        taken.append(frame)
    return taken


@given(st.lists(st.binary(max_size=40), max_size=10), st.lists(st.integers(0, 1000), max_size=20))
def test_any_cutting_of_the_bytes_gives_the_same_frames(messages, places):
    box = inbox.Inbox(LIMIT, lambda holding: None)
    for piece in cut(frames(*messages), places):
        box.feed(piece)
    box.end()
    assert collect(box) == [framing.pack(message) for message in messages]
    assert box.drained


@given(st.binary(max_size=100), st.lists(st.integers(0, 1000), max_size=20))
def test_any_bytes_are_frames_or_raise_a_frame_error(data, places):
    box = inbox.Inbox(30, lambda holding: None)
    try:
        for piece in cut(data, places):
            box.feed(piece)
        box.end()
    except framing.FrameError:
        pass
    for frame in collect(box):
        assert framing.unpack(b"\0" + frame[1:], limit=30) == frame[5:]


def test_reading_stops_while_much_is_held_and_goes_on_once_it_was_taken():
    said = []
    box = inbox.Inbox(LIMIT, said.append)
    box.feed(frames(bytes(inbox.HIGH)))
    assert said == [True]
    box.feed(frames(bytes(10)))
    assert said == [True], "the end is reported once"
    box.take()
    assert said == [True, False]


async def test_a_message_counts_until_its_reader_waits_for_the_next():
    budget = Budget(LIMIT)
    box = inbox.Inbox(LIMIT, lambda holding: None, budget)
    box.feed(frames(bytes(1000)))
    await box.read()
    assert budget.held >= 1000
    waiting = asyncio.ensure_future(box.read())
    await asyncio.sleep(0)
    assert budget.held == 0
    box.feed(frames(bytes(2000)))
    await waiting
    assert budget.held >= 2000
    box.end()
    assert await box.read() is None
    assert budget.held == 0


def test_many_empty_messages_count_too():
    said = []
    box = inbox.Inbox(LIMIT, said.append)
    box.feed(frames(b"") * 10_000)
    assert said == [True]


def test_reading_does_not_stop_within_a_message_that_nobody_could_take_yet():
    said = []
    box = inbox.Inbox(LIMIT, said.append)
    for piece in cut(frames(bytes(inbox.HIGH * 3)), [inbox.HIGH, inbox.HIGH * 2]):
        assert said == []
        box.feed(piece)
    assert said == [True]


def test_the_end_lets_reading_go_on():
    said = []
    box = inbox.Inbox(LIMIT, said.append)
    box.feed(frames(bytes(inbox.HIGH)))
    box.end()
    assert said == [True, False]
    collect(box)
    assert said == [True, False]


def test_a_message_above_the_limit_is_refused_as_soon_as_its_prefix_is_there():
    box = inbox.Inbox(100, lambda holding: None)
    with pytest.raises(framing.FrameError) as error:
        box.feed(b"\0\0\0\0\x65")
    assert error.value.reason is Reason.TOO_LARGE


def test_an_end_within_a_message_is_refused():
    box = inbox.Inbox(100, lambda holding: None)
    box.feed(frames(b"abc")[:-1])
    with pytest.raises(framing.FrameError) as error:
        box.end()
    assert error.value.reason is Reason.BAD_REQUEST


async def test_a_reader_waits_for_the_next_frame_and_for_the_end():
    box = inbox.Inbox(100, lambda holding: None)
    reading = asyncio.ensure_future(box.read())
    await asyncio.sleep(0)
    assert not reading.done()
    box.feed(frames(b"a"))
    assert await reading == frames(b"a")
    reading = asyncio.ensure_future(box.read())
    await asyncio.sleep(0)
    box.end()
    assert await reading is None
    assert await box.read() is None


async def test_a_cancelled_read_loses_nothing():
    box = inbox.Inbox(100, lambda holding: None)
    reading = asyncio.ensure_future(box.read())
    await asyncio.sleep(0)
    box.feed(frames(b"a"))  # this call wakes the reader, which is cancelled in the same turn of the loop
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert await box.read() == frames(b"a")


async def test_a_failure_comes_after_the_frames_before_it_or_at_once():
    for drop in (False, True):
        box = inbox.Inbox(100, lambda holding: None)
        box.feed(frames(b"a"))
        box.fail(ConnectionError("gone"), drop=drop)
        if not drop:
            assert await box.read() == frames(b"a")
        for _ in range(2):
            with pytest.raises(ConnectionError):
                await box.read()


async def test_two_readers_at_once_are_a_mistake_that_says_so():
    box = inbox.Inbox(100, lambda holding: None)
    reading = asyncio.ensure_future(box.read())
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError):
        await box.read()
    reading.cancel()
