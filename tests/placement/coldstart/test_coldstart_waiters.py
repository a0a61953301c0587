"""The waiters of a cold start: bounds, deadlines, and exactly one answer each. Also events that cannot happen."""

import weakref

import pytest

from placement.coldstart import events, instructions
from placement.coldstart.alarms import Alarms
from placement.coldstart.events import Record
from placement.coldstart.problems import ProblemReason
from placement.coldstart.rules import Rules
from placement.coldstart.story import Impossible
from tests.support.coldstarts import RECORD, Carrier

RULES = Rules(max_waiters=4, max_waiters_per_model=2, max_waiting_bytes=100, load_wait_ms=1000)


def waits(carrier):
    found = carrier.machine.statistics()
    return found.flights, found.waiters, found.bytes


@pytest.mark.parametrize(
    ("waiting", "more", "text"),
    [
        pytest.param([("m", 0), ("m", 0)], ("m", 0), "2 calls wait for model m to load", id="of-one-model"),
        pytest.param([("k", 0), ("k", 0), ("l", 0), ("l", 0)], ("m", 0), "4 calls wait for models", id="in-all"),
        pytest.param([("k", 60)], ("m", 41), "hold 60 of 100 bytes", id="bytes"),
    ],
)
def test_bounds(waiting, more, text):
    """A caller beyond the bounds is refused at once, with the time after which to retry. When a waiter leaves, another
    caller can join."""
    carrier = Carrier("a", rules=RULES)
    for number, (model_id, size) in enumerate(waiting):
        carrier.join(number, model_id, size=size)
    before = waits(carrier)
    carrier.join("more", more[0], size=more[1])
    assert waits(carrier) == before
    problem = carrier.problems["more"]
    assert (problem.reason, problem.retry_ms) == (ProblemReason.OVERLOADED, 1000)
    assert text in problem.text
    carrier.leave(0, waiting[0][0])
    carrier.join("again", more[0], size=more[1])
    assert "again" not in carrier.problems


def test_a_deadline_that_has_passed_is_told_at_once():
    carrier = Carrier("a")
    carrier.now_ms = 500
    carrier.join(deadline_ms=500)
    assert carrier.problems["w"].reason is ProblemReason.DEADLINE
    assert waits(carrier) == (0, 0, 0)


def test_each_waiter_has_its_own_deadline():
    carrier = Carrier("a", rules=RULES)
    carrier.join("long", deadline_ms=999)
    carrier.join("short", deadline_ms=10)
    assert carrier.wanted_ms == 10
    carrier.after(10)
    assert carrier.problems["short"].text == "m was not loaded by the call's deadline"
    assert carrier.wanted_ms == 999
    carrier.read()
    carrier.says(events.Loaded)
    assert carrier.served == ["long"]


def test_a_waiter_whose_deadline_passes_learns_why_no_pod_was_asked():
    carrier = Carrier("a", rules=RULES)
    carrier.join(deadline_ms=10)
    carrier.read()
    carrier.says(events.Loaded, believed=False)
    carrier.after(10)
    assert carrier.problems["w"].text == "m was not loaded by the call's deadline: a has just restarted"


@pytest.mark.parametrize("deadline_ms", [None, 60_000])
def test_nobody_waits_longer_than_the_longest_wait_and_the_load_goes_on(deadline_ms):
    carrier = Carrier("a", rules=RULES)
    carrier.join(deadline_ms=deadline_ms)
    carrier.read()
    carrier.after(999)
    assert carrier.problems == {}
    carrier.after(1)
    assert carrier.problems["w"].text == "m was not loaded within 1 s; its load continues"
    assert carrier.machine.loading("m")


def test_one_that_left_is_told_nothing():
    carrier = Carrier("a", rules=RULES)
    carrier.join("gone", size=10)
    carrier.after(20)
    (departed,) = carrier.leave("gone")
    assert (type(departed), departed.waited_ms) == (instructions.Departed, 20)
    assert carrier.leave("gone") == []
    assert carrier.leave("nobody", "nothing") == []
    carrier.read()
    carrier.says(events.Loaded)
    assert (carrier.served, carrier.problems) == ([], {})
    assert waits(carrier) == (0, 0, 0)


def test_how_long_each_has_waited_is_known_when_it_is_told():
    carrier = Carrier("a")
    carrier.join("first")
    carrier.after(30)
    carrier.join("second")
    carrier.read()
    carrier.after(12)
    carrier.says(events.Loaded)
    assert [(told.waiter, told.waited_ms) for told in carrier.every(instructions.TellCopy)] == [
        ("first", 42),
        ("second", 12),
    ]


def test_closing_tells_all_and_takes_no_more():
    carrier = Carrier("a")
    carrier.join(1)
    carrier.join(2, "other")
    carrier.feed(events.Closed(carrier.now_ms))
    carrier.join(3)
    assert {problem.text for problem in carrier.problems.values()} == {"this router is stopping"}
    assert sorted(carrier.problems) == [1, 2, 3]
    assert waits(carrier) == (0, 0, 0)
    carrier.read()  # the answer to a read of a flight that has ended
    assert waits(carrier) == (0, 0, 0)


@pytest.mark.parametrize("how", ["left", "told", "expired"])
def test_nothing_of_a_waiter_is_kept_once_it_is_released(how):
    """Nothing refers to a released waiter, which may hold a message of megabytes and an alarm that is due only in
    minutes."""

    class Waiter:
        pass

    carrier = Carrier("a")
    waiter = Waiter()
    kept = weakref.ref(waiter)
    carrier.join(waiter, deadline_ms=50)
    if how == "left":
        carrier.leave(waiter)
    elif how == "told":
        carrier.read(None)
    else:
        carrier.after(50)
    carrier.given.clear()
    del waiter
    assert kept() is None, "the waiter is freed without a garbage collection"


class TestImpossible:
    """Events that cannot happen, and the errors that they raise."""

    @pytest.fixture
    def carrier(self):
        carrier = Carrier("a")
        carrier.join()
        carrier.read(Record(7, load_ms=5))
        return carrier

    def test_an_answer_to_another_question(self, carrier):
        asked = carrier.outstanding["m"]
        with pytest.raises(Impossible) as error:
            carrier.feed(events.RecordRead(9, "m", asked.cause, RECORD))
        told = str(error.value)
        assert "the flight is asking" in told
        assert "#1 +0 ms   -> Recall()" in told
        assert "#3 +0 ms RecordRead(answers=2, record=Record(created=7, load_ms=5" in told
        assert "-> Ask(pod='a', idle_ms=0, why='a call needs it: a has 1.0 GiB free" in told
        carrier.says(events.Loaded)
        assert carrier.served == ["w"]

    def test_an_answer_twice(self, carrier):
        asked = carrier.outstanding["m"]
        carrier.says(events.Failed, text="no")
        with pytest.raises(Impossible, match="nothing was asked that it answers"):
            carrier.feed(events.Loaded(0, "m", asked.cause))

    def test_an_answer_to_a_former_question(self, carrier):
        asked = carrier.outstanding["m"]
        carrier.says(events.Stale)
        with pytest.raises(Impossible, match="nothing was asked that it answers"):
            carrier.feed(events.Loaded(0, "m", asked.cause))
        carrier.read(Record(8))
        carrier.says(events.Loaded)
        assert carrier.served == ["w"]

    def test_waiting_twice(self, carrier):
        with pytest.raises(Impossible, match="it waits already"):
            carrier.join()
        assert waits(carrier) == (1, 1, 0)

    def test_a_story_is_bounded(self, carrier):
        for _ in range(500):
            carrier.feed(events.PodChanged(carrier.now_ms, "a"))
            carrier.says(events.TimedOut)
        with pytest.raises(Impossible) as error:
            carrier.feed(events.Loaded(0, "m", 1))
        assert len(str(error.value).splitlines()) == 65


def test_alarms_that_are_called_off_do_not_pile_up():
    alarms = Alarms()
    alarms.set(10**6, "stays")
    for number in range(10_000):
        alarms.call_off(alarms.set(number, "goes"))
        assert len(alarms._heap) < 200
    assert len(alarms) == 1
    assert alarms.earliest_ms() == 10**6
    assert alarms.ring(10**6 - 1) is None
    assert alarms.ring(10**6) == "stays"
    assert alarms.ring(10**6) is None


def test_alarms_of_one_moment_ring_in_the_order_of_setting():
    alarms = Alarms()
    kept = [alarms.set(5, number) for number in range(5)]
    alarms.call_off(kept[2])
    alarms.call_off(kept[2])
    assert [alarms.ring(5) for _ in range(5)] == [0, 1, 3, 4, None]
