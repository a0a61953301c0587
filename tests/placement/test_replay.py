"""Replay of recorded decisions: the same answers, or a report of the differences."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.footprint import Footprint
from placement.replay import Question, parse, render, replay
from placement.room import Need, ResidentCopy, RoomVerdict

held = st.builds(
    ResidentCopy,
    key=st.text(max_size=5),
    bytes=st.integers(0, 50),
    idle_ms=st.integers(0, 10_000),
    in_flight=st.integers(0, 2),
    busy_reason=st.sampled_from(["", "pinned"]),
    other_copies=st.integers(0, 2),
    standing=st.none() | st.tuples(st.integers(0, 2), st.floats(-1e9, 1e9)),
    fresh=st.booleans(),
)
questions = st.builds(
    Question,
    model_id=st.text(max_size=5),
    need=st.builds(
        Need,
        st.builds(Footprint, st.integers(0, 120), st.integers(0, 20)),
        st.builds(Footprint, st.integers(-20, 100), st.integers(-5, 20)),
        st.builds(Footprint, st.integers(0, 100), st.integers(0, 20)),
    ),
    idle_ms=st.integers(0, 10_000),
    held=st.lists(held, max_size=8, unique_by=lambda one: one.key).map(tuple),
)


@given(st.lists(questions, max_size=5))
def test_what_is_written_gets_the_same_answers(asked):
    """A replayed decision gets the same answer again, because the record contains everything that decided it."""
    lines = [render(question, question.ask()) for question in asked]
    assert replay(lines) == (len(asked), [])
    for line, question in zip(lines, asked, strict=True):
        assert parse(line)[0] == question


def test_another_answer_is_shown():
    """A different answer is shown with both the recorded and the present decision."""
    question = Question("m", Need.of_host(10, 0, 100), 0, (ResidentCopy("a", 10, 5000), ResidentCopy("b", 10, 1000)))
    data = json.loads(render(question, question.ask()))
    assert data["victims"] == ["a"]
    data["victims"] = ["b"]
    count, (difference,) = replay(["", json.dumps(data)])
    assert (count, difference.line, difference.victims, difference.now.victims) == (1, 2, ("b",), ("a",))
    assert difference.verdict is RoomVerdict.EVICT


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "it is not JSON"),
        ("[]", "it is not a JSON object"),
        ("null", "it is not a JSON object"),
        ("{}", "the field model must be a string"),
    ],
)
def test_what_is_no_decision(line, why):
    """A line that does not contain a decision is reported with its number."""
    with pytest.raises(ValueError, match=f"line 1: {why}"):
        replay([line])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"idle_ms": "1"}, "the field idle_ms must be a whole number"),
        ({"held": 3}, "the field held must be a list"),
        ({"held": [{"bytes": []}]}, r"the field held\[0\]\.bytes must be a whole number"),
        ({"held": [3]}, r"the field held\[0\] must be an object"),
        ({"held": [{"standing": [1]}]}, r"the field held\[0\]\.standing must be a list of two numbers"),
        ({"device": {"need": "x"}}, r"the field device\.need must be a whole number"),
        ({"verdict": "maybe"}, "the field verdict must be one of fits, evict, .*, not 'maybe'"),
        ({"victims": None}, "the field victims must be a list"),
    ],
)
def test_the_error_of_a_decision_names_the_field(change, why):
    question = Question("m", Need.of_host(10, 0, 100), 0, (ResidentCopy("a", 10, 5000),))
    data = json.loads(render(question, question.ask())) | change
    with pytest.raises(ValueError, match=why):
        parse(json.dumps(data))
