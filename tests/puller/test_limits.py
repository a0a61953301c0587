"""The limits shared by all pulls of a pod: connections, bandwidth, and the division of large files into parts."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puller.errors import PullError, PullErrorKind
from puller.limits import PullLimits


@given(
    gaps=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=6),
    part=st.integers(1, 20),
)
def test_parts_cover_what_is_missing_and_nothing_else(gaps, part):
    """The parts of a range cover exactly what is missing, in order. No part is too long or empty."""
    missing, at = [], 0
    for skipped, length in gaps:
        missing.append((at + skipped, at + skipped + length))
        at += skipped + length + 1
    parts = PullLimits(range_bytes=part).parts(missing)
    assert all(0 < end - start <= part for start, end in parts)
    covered = [byte for start, end in parts for byte in range(start, end)]
    assert covered == [byte for start, end in missing for byte in range(start, end)]


def test_bandwidth_is_shared_by_all_pulls():
    """All pulls share the bandwidth: a burst is free, then each byte takes its time, and a quiet hour earns no more
    than a burst."""
    now = [100.0]
    limits = PullLimits(bytes_per_second=1000, clock=lambda: now[0])
    waits = [limits.take(1000) for _ in range(3)]
    assert waits == sorted(waits)
    assert waits[2] - waits[1] == pytest.approx(1.0)
    now[0] += 3600
    again = [limits.take(1000) for _ in range(3)]
    assert again == pytest.approx(waits)
    assert PullLimits().take(10**12) == 0.0


async def test_connections_are_bounded_and_given_back():
    """Connections are limited: a caller waits while all are taken, and a failed connection is released."""
    limits = PullLimits(connections=2)

    async def fails():
        async with limits.connection("a"):
            waiting.append(asyncio.ensure_future(limits.acquire("a")))
            await asyncio.sleep(0)
            assert (limits.statistics().connections, limits.statistics().waiting) == (2, 1)
            raise ZeroDivisionError

    waiting = []
    async with limits.connection("a"):
        with pytest.raises(ZeroDivisionError):
            await fails()
        await asyncio.wait_for(waiting[0], 10)
        assert (limits.statistics().connections, limits.statistics().waiting) == (2, 0)
        limits.release("a")
    assert limits.statistics().connections == 0


async def test_parts_come_a_few_at_a_time_and_the_first_error_ends_all():
    """As many parts are fetched at once as the limit for ranges allows, and the first error ends the transfer."""
    now, most, done = 0, 0, []

    async def fetch(start, end):
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0)
        now -= 1
        done.append((start, end))
        if start == 50:
            raise PullError(PullErrorKind.UNREACHABLE, "gone")

    limits = PullLimits(ranges=3, range_bytes=10)
    await limits.in_parts([(0, 40)], fetch)
    assert most == 3
    assert sorted(done) == [(0, 10), (10, 20), (20, 30), (30, 40)]
    with pytest.raises(PullError, match="gone"):
        await limits.in_parts([(50, 1000)], fetch)
    assert len(done) < 50


@pytest.mark.parametrize("wrong", [{"connections": 0}, {"ranges": 0}, {"range_bytes": 0}, {"bytes_per_second": -1}])
def test_limits_that_make_no_sense(wrong):
    """Invalid limits are refused when they are set, instead of hanging the first pull."""
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"^{name} is {value}: it must be"):
        PullLimits(**wrong)
