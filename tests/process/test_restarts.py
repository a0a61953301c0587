"""Decisions about restarts of processes that have ended, from events alone and without a real clock."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.process.restarts import Again, GivenUp, Impossible, Phase, RestartPolicy, Restarts

PLAIN = RestartPolicy(first=0.1, longest=5.0, steady=30.0)
PATIENT = RestartPolicy(first=0.5, longest=30.0, steady=60.0, at_once=1, give_up=3)


def decisions(policy: RestartPolicy, *lives: float | None) -> list[Again | GivenUp]:
    """Returns the decision after each of these lives, given in seconds from ready to end. None stands for a failed
    start."""
    machine, now, found = Restarts(policy), 100.0, []
    for life in lives:
        machine.began(now)
        if life is not None:
            machine.ready(now + 1)
        now += 1 + (life or 0.0)
        found.append(machine.ended(now))
        if isinstance(found[-1], GivenUp):
            break
        now += found[-1].pause
    return found


def pauses(policy: RestartPolicy, *lives: float | None) -> list[float]:
    return [decided.pause for decided in decisions(policy, *lives) if isinstance(decided, Again)]


@pytest.mark.parametrize(
    ("policy", "lives", "expected"),
    [
        pytest.param(PLAIN, [5, 5, 5, 5], [0.1, 0.2, 0.4, 0.8], id="dies young, again and again"),
        pytest.param(PLAIN, [5, 5, 31, 5], [0.1, 0.2, 0.1, 0.2], id="a steady life ends the row"),
        pytest.param(PLAIN, [31, 31, 31], [0.1, 0.1, 0.1], id="steady lives"),
        pytest.param(PLAIN, [None, None, 5], [0.1, 0.2, 0.4], id="failed starts count as ends"),
        pytest.param(PLAIN, [1] * 10, [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0, 5.0], id="up to the longest"),
        pytest.param(PATIENT, [100, 5, 5, 5], [0.0, 0.5, 1.0, 2.0], id="the first at once"),
        pytest.param(PATIENT, [5, None, None, 5, None, None], [0.0, 0.5, 1.0, 2.0, 4.0, 8.0], id="not given up yet"),
    ],
)
def test_pauses_grow_while_it_keeps_ending(
    policy: RestartPolicy, lives: list[float | None], expected: list[float]
) -> None:
    assert pauses(policy, *lives) == pytest.approx(expected)


def test_a_child_is_given_up_after_three_failed_starts_in_a_row() -> None:
    """A child is given up after three failed starts in a row. A successful start resets the count."""
    found = decisions(PATIENT, 5, None, None, 5, None, None, None, 5)
    assert found[-1] == GivenUp(3)
    assert len(found) == 7


def test_luck_spreads_the_pauses() -> None:
    found = []
    for luck in (0.0, 0.5, 1.0):
        machine = Restarts(PLAIN)
        machine.began(0.0)
        decided = machine.ended(0.0, luck=luck)
        assert isinstance(decided, Again)
        found.append(decided.pause)
    assert found == pytest.approx([0.08, 0.1, 0.12])


def test_an_impossible_event_tells_the_story() -> None:
    machine = Restarts(PLAIN)
    machine.began(1.0)
    with pytest.raises(Impossible, match="began while starting: began at 1, began at 2"):
        machine.began(2.0)
    with pytest.raises(Impossible):
        Restarts(PLAIN).ended(1.0)
    with pytest.raises(Impossible):
        Restarts(PLAIN).ready(1.0)


_POLICIES = st.builds(
    RestartPolicy,
    first=st.floats(0.001, 1.0),
    longest=st.floats(1.0, 60.0),
    steady=st.floats(1.0, 100.0),
    at_once=st.integers(0, 3),
    give_up=st.integers(0, 5),
    spread=st.floats(0.0, 0.5),
)


@given(_POLICIES, st.lists(st.tuples(st.none() | st.floats(0.0, 200.0), st.floats(0.0, 1.0)), max_size=100))
def test_bounds_hold_whatever_happens(policy: RestartPolicy, lives: list[tuple[float | None, float]]) -> None:
    """Apart from their random spread, pauses never exceed the longest pause, and get no shorter until the child has
    lived long enough. Exactly `at_once` restarts are immediate. A child is given up after `give_up` failed starts in a
    row."""
    machine, now, vain, row, before = Restarts(policy), 0.0, 0, 0, 0.0
    for life, luck in lives:
        machine.began(now)
        if life is None:
            vain += 1
        else:
            machine.ready(now)
            vain = 0
            if life >= policy.steady:
                row, before = 0, 0.0
        row += 1
        start, now = now, now + (life or 0.0)
        if life is not None and now - start != life:  # lost in rounding
            return
        decided = machine.ended(now, luck=luck)
        assert machine.phase is Phase.ENDED
        if policy.give_up and vain >= policy.give_up:
            assert decided == GivenUp(vain)
            return
        assert isinstance(decided, Again)
        assert decided.row == row
        assert (decided.pause == 0.0) == (row <= policy.at_once)
        unspread = decided.pause / (1 + policy.spread * (2 * luck - 1)) if decided.pause else 0.0
        assert before <= unspread + 1e-9
        assert unspread <= policy.longest * 1.000001
        before = unspread
