"""The split of calls by weight: shares, keys that keep their model, and models that cannot serve."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.splits import Split

TARGETS = st.dictionaries(st.text(min_size=1, max_size=8), st.integers(1, 1000), min_size=1, max_size=6)
POINTS = st.floats(0, 1, exclude_max=True)
KEYS = st.binary(max_size=40)

CANARY = {"fraud@7": 90, "fraud@8": 10}


def test_a_canary_at_ten_percent_gets_ten_percent_of_the_points():
    """Evenly spread points are shared by the models exactly in proportion to the weights."""
    split = Split(CANARY)
    got = Counter(split.at((number + 0.5) / 20_000) for number in range(20_000))
    assert got == {"fraud@7": 18_000, "fraud@8": 2_000}


def test_a_canary_at_ten_percent_gets_ten_percent_of_the_random_calls_of_two_routers():
    """A canary at 10 % gets 10 % ± 1 of 20,000 calls through two routers with independent random numbers. The tolerance
    is 4.7 standard deviations."""
    split = Split(CANARY)
    routers = random.Random(1), random.Random(2)
    got = Counter(split.at(routers[number % 2].random()) for number in range(20_000))
    assert 0.09 <= got["fraud@8"] / 20_000 <= 0.11


def test_a_canary_at_ten_percent_gets_ten_percent_of_the_keys():
    """20,000 users are spread in proportion to the weights, although each user's model is fixed."""
    split = Split(CANARY)
    got = Counter(split.of(b"user-%d" % number) for number in range(20_000))
    assert 0.09 <= got["fraud@8"] / 20_000 <= 0.11


@pytest.mark.parametrize("weights", [{}, {"a": 0}, {"a": -1, "b": 0}, {"a": float("nan")}, {"a": float("inf")}])
def test_a_split_without_a_usable_weight_is_refused(weights):
    """A split is refused if none of its weights is a positive, finite number, because no model could be chosen."""
    with pytest.raises(ValueError, match="positive weight"):
        Split(weights)


@given(TARGETS, POINTS)
def test_a_model_without_weight_gets_no_call(weights, point):
    split = Split({**weights, "idle-model": 0})
    assert split.at(point) != "idle-model"
    assert split.of(repr(point).encode()) != "idle-model"


@given(TARGETS, KEYS)
def test_a_key_has_the_same_model_in_every_router(weights, key):
    """The model of a key depends only on names, weights and the key, not on the order of the models in the record."""
    backwards = dict(reversed(weights.items()))
    assert Split(weights).of(key) == Split(backwards).of(key)


@given(TARGETS, KEYS, st.data())
def test_a_weight_that_rises_moves_keys_to_its_model_alone(weights, key, data):
    raised = data.draw(st.sampled_from(sorted(weights)))
    more = {**weights, raised: weights[raised] + data.draw(st.integers(1, 500))}
    before, after = Split(weights).of(key), Split(more).of(key)
    assert after in (before, raised)


@given(TARGETS, KEYS, st.data())
def test_a_model_that_cannot_serve_moves_its_own_keys_alone(weights, key, data):
    """If a model cannot serve, its keys go where they would go without that model, and the keys of other models
    stay."""
    split = Split(weights)
    down = data.draw(st.sampled_from(sorted(weights)))
    instead = split.of(key, without={down})
    if split.of(key) != down:
        assert instead == split.of(key)
    rest = {model: weight for model, weight in weights.items() if model != down}
    assert instead == (Split(rest).of(key) if rest else None)


@given(TARGETS, POINTS)
def test_every_model_is_tried_once_before_a_split_gives_up(weights, point):
    split, tried = Split(weights), []
    while (model := split.at(point, tried)) is not None:
        tried.append(model)
    assert sorted(tried) == sorted(weights)
    tried = []
    while (model := split.of(b"key", tried)) is not None:
        tried.append(model)
    assert sorted(tried) == sorted(weights)


def test_calls_of_a_model_that_cannot_serve_are_spread_by_the_other_weights():
    split = Split({"a": 50, "b": 30, "c": 10})
    got = Counter(split.at((number + 0.5) / 4000, {"a"}) for number in range(4000))
    assert got == {"b": 3000, "c": 1000}
