"""The share of an alias's calls that a shadow gets: all calls, unless the shadow slows callers down."""

import random

import pytest

from placement.shadowing import ENOUGH, LEAST, STALE, Shadowing


def drive(shadowing, calls, *, slower, overlap=0.9, seed=1):
    """Makes calls in a row and returns how many of them the shadow got. While the shadow has a call in flight, most
    calls begin beside it and take `slower` times as long."""
    draw = random.Random(seed)
    given = 0
    busy = False
    for _ in range(calls):
        beside = busy and draw.random() < overlap
        time = 0.01 * draw.lognormvariate(0, 0.4) * (slower if beside else 1)
        shadowing.noted(time, beside=beside)
        busy = not shadowing.pauses and draw.random() < shadowing.part
        given += busy
    return given


def test_a_shadow_that_nobody_notices_gets_its_calls():
    """If calls beside the shadow's are as fast as others, the shadow gets over 85 % of them: it pauses now and then for
    comparison."""
    shadowing = Shadowing()
    assert drive(shadowing, 20_000, slower=1.0) > 17_000
    assert shadowing.slowdown == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("slower", [1.5, 3, 100])
def test_a_shadow_that_slows_callers_down_gets_few_calls(slower):
    shadowing = Shadowing()
    drive(shadowing, 5_000, slower=slower)
    assert shadowing.part < 3 * LEAST
    assert drive(shadowing, 20_000, slower=slower, seed=2) < 800


def test_a_shadow_gets_its_calls_back_once_callers_are_fast_again():
    """A slowdown that has passed is forgotten, although the shadow then gets only few calls to show it."""
    shadowing = Shadowing()
    drive(shadowing, 5_000, slower=3)
    assert shadowing.part < 3 * LEAST
    drive(shadowing, 40_000, slower=1.0, seed=2)
    assert shadowing.part > 0.5


def test_a_slowdown_that_no_client_notices_does_not_count():
    """A call of a tiny model takes 0.2 ms here. Clients do not notice if it takes 0.1 ms longer beside the shadow's,
    but they notice 0.8 ms."""
    shadowing = Shadowing()
    for _ in range(200):
        shadowing.noted(0.0002, beside=False)
        shadowing.noted(0.0003, beside=True)
    assert shadowing.part == 1.0
    for _ in range(200):
        shadowing.noted(0.0002, beside=False)
        shadowing.noted(0.0010, beside=True)
    assert shadowing.part < 0.1


def test_nothing_is_concluded_from_a_few_calls():
    """A few slow calls do not reduce the shadow's share, because the first calls may be slow for any reason."""
    shadowing = Shadowing()
    for _ in range(ENOUGH - 1):
        shadowing.noted(1.0, beside=False)
        shadowing.noted(1000.0, beside=True)
    assert (shadowing.part, shadowing.slowdown) == (1.0, 1.0)


def test_a_shadow_that_every_call_begins_beside_has_to_pause():
    """If every call begins during a shadow call, the shadow pauses until one begins without it."""
    shadowing = Shadowing()
    for number in range(STALE):
        assert not shadowing.pauses, number
        shadowing.noted(1.0, beside=True)
    assert shadowing.pauses
    shadowing.noted(1.0, beside=False)
    assert not shadowing.pauses


def test_a_time_of_zero_is_no_error():
    """The clock may not advance during a short call."""
    shadowing = Shadowing()
    for beside in (True, False) * ENOUGH:
        shadowing.noted(0.0, beside=beside)
    assert shadowing.slowdown == pytest.approx(1)
