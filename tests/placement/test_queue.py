"""The order of queued loads, and the forecast of their waiting times for callers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.queue import LoadQueue, forecast


def drain(queue: LoadQueue[str]) -> list[str]:
    return [key for key in iter(queue.pop, None) if key is not None]


def test_callers_first_then_the_most_recently_used():
    """Loads with callers come first, in the order of the callers. The other loads follow, the most recently used models
    first."""
    queue: LoadQueue[str] = LoadQueue()
    queue.push("stale", waiting=False, idle_ms=9_000)
    queue.push("recent", waiting=False, idle_ms=10)
    queue.push("first caller", waiting=True)
    queue.push("second caller", waiting=True)
    assert [item.key for item in queue] == ["first caller", "second caller", "recent", "stale"]
    assert drain(queue) == ["first caller", "second caller", "recent", "stale"]


def test_a_caller_lifts_what_is_queued():
    """A caller raises the rank of a queued load, and a later request without a caller does not lower it."""
    queue: LoadQueue[str] = LoadQueue()
    queue.push("a", waiting=False, idle_ms=5)
    queue.push("b", waiting=False, idle_ms=50)
    queue.push("b", waiting=True)
    queue.push("b", waiting=False, idle_ms=900)
    assert (len(queue), queue.ahead_of("b"), queue.ahead_of("a")) == (2, 0, 1)
    assert drain(queue) == ["b", "a"]


def test_cancelled_loads_have_no_turn():
    """A cancelled load leaves the queue at once, and may enter it again."""
    queue: LoadQueue[str] = LoadQueue()
    queue.push("a", waiting=True)
    queue.push("b", waiting=True)
    assert queue.cancel("a")
    assert not queue.cancel("a")
    queue.push("a", waiting=True)
    assert drain(queue) == ["b", "a"]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["push", "pop", "cancel"]), st.sampled_from("abcdef"), st.booleans(), st.integers(0, 9)
        )
    )
)
def test_a_queue_behaves_as_a_sorted_list(steps):
    queue: LoadQueue[str] = LoadQueue()
    model: dict[str, tuple[int, int, int]] = {}
    arrivals = 0
    for step, key, waiting, idle in steps:
        if step == "push":
            arrivals += 1
            item = (0, arrivals, arrivals) if waiting else (1, idle, arrivals)
            known = model.get(key)
            if known is None or (waiting and known[0]) or (not waiting and known[0] and idle < known[1]):
                model[key] = item
            queue.push(key, waiting=waiting, idle_ms=idle)
        elif step == "pop":
            expected = min(model, key=model.__getitem__, default=None)
            assert queue.pop() == expected
            model.pop(expected, None)
        else:
            assert queue.cancel(key) == (model.pop(key, None) is not None)
        assert [item.key for item in queue] == sorted(model, key=model.__getitem__)
        statistics = queue.statistics()
        assert (statistics.queued, statistics.waiting) == (len(model), sum(not kind for kind, _, _ in model.values()))


@pytest.mark.parametrize(
    ("arguments", "expected", "in_time"),
    [
        pytest.param({"load_ms": 500, "deadline_ms": 1000}, 500, True, id="free-thread"),
        pytest.param({"load_ms": 5000, "deadline_ms": 1000}, 5000, False, id="load-too-long"),
        pytest.param({"load_ms": 0, "deadline_ms": 1}, 0, True, id="nobody-knows"),
        pytest.param({"load_ms": 9000}, 9000, True, id="no-deadline"),
        pytest.param({"load_ms": 2000, "begun_ms": 1500, "deadline_ms": 600}, 500, True, id="nearly-done"),
        pytest.param({"load_ms": 2000, "begun_ms": 3000, "deadline_ms": 1}, 0, True, id="overdue"),
        pytest.param(
            {"load_ms": 100, "in_progress": 2, "threads": 2, "mean_load_ms": 1000, "ahead": 8, "deadline_ms": 500},
            4600,
            False,
            id="long-queue",
        ),
        pytest.param(
            {"load_ms": 100, "in_progress": 1, "threads": 2, "mean_load_ms": 1000, "deadline_ms": 500},
            100,
            True,
            id="one-thread-free",
        ),
    ],
)
def test_forecasts(arguments, expected, in_time):
    """The expected time to wait and load is compared with the deadline. If it is too long, it is also the time after
    which the caller should retry."""
    found = forecast(**arguments)
    assert (found.expected_ms, found.in_time) == (expected, in_time)
    assert found.retry_after_ms == (0 if in_time else expected)
    assert found.why


@given(
    st.integers(1, 10_000),
    st.integers(0, 50),
    st.integers(0, 8),
    st.integers(1, 8),
    st.integers(0, 5000),
    st.integers(0, 9000),
)
def test_more_ahead_is_never_sooner(load_ms, ahead, in_progress, threads, mean, deadline):
    """A longer queue never makes the expected time shorter, and a caller that is in time stays so with a later
    deadline."""
    arguments = {"in_progress": in_progress, "threads": threads, "mean_load_ms": mean}
    one = forecast(load_ms, ahead=ahead, deadline_ms=deadline, **arguments)
    more = forecast(load_ms, ahead=ahead + 1, deadline_ms=deadline, **arguments)
    assert load_ms <= one.expected_ms <= more.expected_ms
    assert not one.in_time or forecast(load_ms, ahead=ahead, deadline_ms=deadline + 1, **arguments).in_time
