"""Tests of the judge of histories, which finds wrong, stale, lost and forgotten answers, and accuses nothing else."""

import random

import pytest

from tests.chaos.checker import Summary, judge
from tests.chaos.history import Call, Change, History, Outcome

DONE, REFUSED, UNKNOWN = Outcome.DONE, Outcome.REFUSED, Outcome.UNKNOWN


def kinds(history, registry, **options):
    return [fault.kind for fault in judge(history, {"m": registry}, **options)]


def register(value, began, ended, outcome=DONE):
    return Change("m", value, began, ended, outcome)


def remove(began, ended, outcome=DONE):
    return Change("m", None, began, ended, outcome)


def answer(value, began, ended=None):
    return Call("m", "r", began, began + 0.01 if ended is None else ended, float(value))


def failed(code, began, ended=None):
    return Call("m", "r", began, began + 0.01 if ended is None else ended, None, code)


REPLACED = [register(1, 0, 1), remove(10, 11), register(2, 12, 13)]
"""A model that is registered with file 1, removed, and registered with file 2 at some moment between 12 and 13."""


@pytest.mark.parametrize(
    ("call", "found"),
    [
        pytest.param(answer(1, 5), [], id="the registration that stands"),
        pytest.param(answer(1, 0.5), [], id="before it was acknowledged"),
        pytest.param(answer(1, 10.5), [], id="while it is removed"),
        pytest.param(answer(1, 11.5), [], id="removed, without a successor"),
        pytest.param(answer(1, 12.5, 14), [], id="the former while the new one is registered"),
        pytest.param(answer(2, 12.5, 12.6), [], id="the new one before it is acknowledged"),
        pytest.param(answer(1, 12.99, 20), [], id="begun before the acknowledgement, however long it takes"),
        pytest.param(answer(2, 14), [], id="the new one"),
        pytest.param(answer(1, 13.01), ["stale"], id="the former after the acknowledgement"),
        pytest.param(answer(1, 1000), ["stale"], id="the former much later"),
        pytest.param(answer(2, 5, 6), ["wrong"], id="before anybody asked for it"),
        pytest.param(answer(7, 14), ["wrong"], id="a file that was never registered"),
        pytest.param(answer(1.5, 14), ["wrong"], id="no file's answer"),
        pytest.param(failed("NOT_FOUND", 5), ["lost"], id="not found while it stands"),
        pytest.param(failed("NOT_FOUND", 14), ["lost"], id="not found after the new one was acknowledged"),
        pytest.param(failed("NOT_FOUND", 0.5), [], id="not found before the acknowledgement"),
        pytest.param(failed("NOT_FOUND", 9.9, 10.1), [], id="not found as it is being removed"),
        pytest.param(failed("NOT_FOUND", 11.5), [], id="not found, removed"),
        pytest.param(failed("NOT_FOUND", 12.5, 14), [], id="not found as the new one is being registered"),
        pytest.param(failed("UNAVAILABLE", 5), [], id="a failure"),
    ],
)
def test_one_answer(call, found):
    assert kinds(History(changes=REPLACED, calls=[call]), [1, None, 2]) == found


def test_an_answer_of_another_model():
    """Each id is judged by its own registrations, so another model's answer is wrong."""
    other = Change("other", 5, 0, 1, DONE)
    history = History(changes=[*REPLACED, other], calls=[answer(5, 14)])
    assert [fault.kind for fault in judge(history, {"m": [1, None, 2], "other": [5]})] == ["wrong"]


def test_a_registration_that_was_refused_answers_nothing():
    history = History(changes=[register(1, 0, 1), register(2, 2, 3, REFUSED)], calls=[answer(2, 4)])
    assert kinds(history, [1]) == ["wrong"]


def test_a_registration_of_unknown_fate_may_answer_where_it_took_place():
    changes = [register(1, 0, 1), remove(2, 3), register(2, 4, 9, UNKNOWN)]
    assert kinds(History(changes=changes, calls=[answer(2, 10)]), [1, None, 2]) == []
    assert kinds(History(changes=changes, calls=[answer(2, 10)]), [1, None]) == ["wrong"]


def test_the_former_may_answer_while_its_successor_is_not_acknowledged():
    changes = [register(1, 0, 1), remove(2, 3), register(2, 4, 9, UNKNOWN)]
    assert kinds(History(changes=changes, calls=[answer(1, 10)]), [1, None, 2]) == []


def test_a_later_attempt_that_is_acknowledged_counts():
    """A registration that is retried until it is acknowledged counts from the acknowledged attempt."""
    changes = [register(1, 0, 1), remove(2, 3), register(2, 4, 9, UNKNOWN), register(2, 10, 11)]
    assert kinds(History(changes=changes, calls=[answer(1, 10.5)]), [1, None, 2]) == []
    assert kinds(History(changes=changes, calls=[answer(1, 12)]), [1, None, 2]) == ["stale"]


def test_any_acknowledged_successor_counts():
    """Any acknowledged successor makes an answer stale, even a successor two registrations later whose predecessor was
    never acknowledged."""
    changes = [register(1, 0, 1), remove(2, 3), register(2, 4, 5, UNKNOWN), remove(6, 7), register(3, 8, 9)]
    history = History(changes=changes, calls=[answer(1, 10), answer(2, 10)])
    assert kinds(history, [1, None, 2, None, 3]) == ["stale", "stale"]


def test_a_registration_that_takes_effect_late_may_answer_after_another():
    """A registration whose first attempt is delayed may take effect, and answer, after its successor is gone."""
    changes = [register(1, 0, 1, UNKNOWN), register(2, 2, 3), remove(4, 5)]
    history = History(changes=changes, calls=[answer(1, 6)])
    assert kinds(history, [2, None, 1]) == []
    assert kinds(history, [1, None, 2, None]) == ["stale"]


def test_a_registration_that_took_effect_twice_accuses_no_answer_between():
    """If a registration took effect twice, no answer in between is accused, because nobody knows which of the two was
    acknowledged."""
    changes = [register(1, 0, 1, UNKNOWN), register(2, 2, 3, UNKNOWN), register(1, 4, 5)]
    assert kinds(History(changes=changes, calls=[answer(2, 6)]), [1, None, 2, None, 1]) == []


def test_a_removal_of_unknown_fate_explains_what_is_not_found():
    changes = [register(1, 0, 1), remove(2, 3, UNKNOWN)]
    assert kinds(History(changes=changes, calls=[failed("NOT_FOUND", 10)]), [1]) == []
    assert kinds(History(changes=changes, calls=[failed("NOT_FOUND", 1.5)]), [1]) == ["lost"]


def test_a_removal_that_was_refused_explains_nothing():
    changes = [register(1, 0, 1), remove(2, 3, REFUSED)]
    assert kinds(History(changes=changes, calls=[failed("NOT_FOUND", 10)]), [1]) == ["lost"]


def test_the_removal_before_explains_nothing():
    changes = [register(1, 0, 1), remove(2, 3), register(2, 4, 5)]
    assert kinds(History(changes=changes, calls=[failed("NOT_FOUND", 6)]), [1, None, 2]) == ["lost"]


@pytest.mark.parametrize(
    ("changes", "registry"),
    [
        pytest.param([register(1, 0, 1)], [], id="a registration that is not there"),
        pytest.param([register(1, 0, 1), remove(2, 3)], [1], id="a removal that was not done"),
        pytest.param([register(1, 0, 1), register(2, 2, 3)], [2, None, 1], id="in another order"),
        pytest.param([register(1, 0, 1), remove(2, 3), register(2, 4, 5)], [1], id="the second of two"),
    ],
)
def test_the_registry_is_held_against_the_acknowledgements(changes, registry):
    assert "forgotten" in kinds(History(changes=changes), registry)


def test_overlapping_registrations_may_stand_in_either_order():
    changes = [register(1, 0, 5), register(2, 1, 4)]
    assert kinds(History(changes=changes), [1, None, 2]) == kinds(History(changes=changes), [2, None, 1]) == []


def test_a_failure_that_nothing_explains():
    history = History(changes=REPLACED, calls=[failed("INTERNAL", 5), failed("UNAVAILABLE", 5)])
    found = judge(history, {"m": [1, None, 2]}, legitimate=lambda call: call.code == "UNAVAILABLE")
    assert [(fault.kind, fault.at) for fault in found] == [("status", 5.01)]


def test_a_fault_tells_what_and_when():
    (fault,) = judge(History(changes=REPLACED, calls=[answer(1, 14)]), {"m": [1, None, 2]})
    assert str(fault) == (
        "stale: m: call by r, from 14.000: answer 1; its successor 2 was acknowledged at 13.000, 1.000 s before"
    )


def test_the_story_of_a_model():
    """The story of a model has the faults injected into the mesh, the model's changes, and its answers. Equal answers
    are merged into one line."""
    history = History(changes=[*REPLACED, Change("other", 9, 13, 14, DONE)])
    history.calls = [answer(1, 13.5), answer(1, 13.6), answer(2, 13.7), Call("other", "r", 13, 14, 9.0)]
    history.note(9.5, "router-3: cut off from etcd")
    history.note(70, "etcd: frozen")
    assert [line.strip() for line in history.story("m", 15)] == [
        "1.000  register 1 by , from 0.000: done",
        "9.500  router-3: cut off from etcd",
        "11.000  unregister by , from 10.000: done",
        "13.000  register 2 by , from 12.000: done",
        "13.510  call by r, from 13.500: answer 1 (2 such answers, the last at 13.610)",
        "13.710  call by r, from 13.700: answer 2",
    ]


def test_the_summary_counts():
    calls = [answer(2, 14), answer(1, 14), failed("UNAVAILABLE", 5)]
    history = History(changes=[*REPLACED, register(3, 20, 21, UNKNOWN)], calls=calls)
    summary = Summary.of(history, judge(history, {"m": [1, None, 2]}))
    assert (summary.calls, summary.answered, summary.failed) == (3, 2, {"UNAVAILABLE": 1})
    assert (summary.faults["stale"], summary.faults["wrong"]) == (1, 0)
    assert (summary.acknowledged, summary.unknown) == (2, 1)
    assert "1 stale" in str(summary)


class Model:
    """One id of a correct mesh, or, with `stale`, of a mesh whose copies of a former registration keep answering."""

    def __init__(self, draw: random.Random, *, stale: bool) -> None:
        self.history = History()
        self.registry: list[int | None] = []
        self.faults = 0
        self._draw = draw
        self._stale = stale
        self._now = 0.0
        self._value: int | None = None
        self._former: int | None = None
        self._promised = 0.0  # when the present registration was acknowledged
        self._count = 0

    def _span(self) -> tuple[float, float]:
        began = self._now
        self._now += self._draw.uniform(0.1, 1.0)
        return began, self._now

    def step(self) -> None:
        """Makes one change or call at a time, so its true outcome is known."""
        self._now += self._draw.uniform(0.01, 0.5)
        began, ended = self._span()
        unknown = self._draw.random() < 0.2
        outcome = UNKNOWN if unknown else DONE
        act = self._draw.random()
        if act < 0.1:
            if self._value is not None:
                self._former = self._value
                self._value = None
                self.registry.append(None)
            self.history.changes.append(remove(began, ended, outcome))
        elif act < 0.25:
            self._count += 1
            if self._value is None:
                self._value = self._count
                self.registry.append(self._count)
                self._promised = float("inf") if unknown else ended
                self.history.changes.append(register(self._count, began, ended, outcome))
            else:
                self.history.changes.append(register(self._count, began, ended, REFUSED))
        elif self._stale and self._former is not None and self._draw.random() < 0.3:
            self.history.calls.append(answer(self._former, began, ended))
            self.faults += self._value is not None and self._promised < began
        elif self._value is None:
            self.history.calls.append(failed("NOT_FOUND", began, ended))
        else:
            self.history.calls.append(answer(self._value, began, ended))


@pytest.mark.parametrize("seed", range(40))
def test_random_histories_of_a_mesh_that_is_right(seed):
    model = Model(random.Random(seed), stale=False)
    for _ in range(300):
        model.step()
    assert judge(model.history, {"m": model.registry}) == []


@pytest.mark.parametrize("seed", range(40))
def test_random_histories_of_a_mesh_that_is_stale(seed):
    """The judge finds each stale answer in random histories of a stale mesh, and accuses nothing else."""
    model = Model(random.Random(seed), stale=True)
    for _ in range(300):
        model.step()
    found = judge(model.history, {"m": model.registry})
    assert {fault.kind for fault in found} <= {"stale"}
    assert len(found) == model.faults > 0
