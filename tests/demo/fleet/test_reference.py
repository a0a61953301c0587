"""Requests, which every model accepts, reference answers, and their comparison with other answers."""

import numpy as np
import pytest

from mesh.demo.fleet import sample_inputs
from mesh.demo.fleet.reference import Reference, difference

pytestmark = pytest.mark.timeout(300)  # the first test also pays for training the small fleet


def test_every_model_answers_its_requests(small):
    """Each model answers with one row for each row of a request. The models' outputs include floats and integers."""
    reference = Reference(sessions=3)
    rng = np.random.default_rng(0)
    answers = []
    for sample in small.models:
        inputs = sample_inputs(sample, rng)
        outputs = reference.answer(sample, inputs)
        batch = inputs["input"].shape[0]
        assert all(len(array) == batch for array in outputs.values())
        answers.append(outputs)
    kinds = {array.dtype.kind for outputs in answers for array in outputs.values()}
    assert {"f", "i"} <= kinds


def test_requests_repeat_with_their_seed(small):
    for seed in range(5):
        one, other = (sample_inputs(small.models[0], np.random.default_rng(seed)) for _ in range(2))
        assert np.array_equal(one["input"], other["input"])


def test_models_of_one_data_set_are_told_apart(small):
    """Models of one data set give different answers, so the demo can notice an answer from another customer's model."""
    reference = Reference()
    diabetes = [s for s in small.models if s.dataset == "diabetes" and s.inputs[0].datatype == "FP32"]
    assert len(diabetes) >= 2
    inputs = sample_inputs(diabetes[0], np.random.default_rng(1))
    one, other = (reference.answer(sample, inputs) for sample in diabetes[:2])
    assert difference(one, one) == ""
    assert difference(one, other)


FLOATS = np.array([[1.0, -2.0]], np.float32)
TEXTS = np.array(["a", "b"], object)


@pytest.mark.parametrize(
    ("right", "got", "same"),
    [
        pytest.param({"y": FLOATS}, {"y": FLOATS * np.float32(1 + 1e-6)}, True, id="rounding"),
        pytest.param({"y": FLOATS}, {"y": FLOATS * np.float32(1.001)}, False, id="another value"),
        pytest.param({"y": FLOATS}, {"y": FLOATS * np.float32("nan")}, False, id="nan"),
        pytest.param({"y": FLOATS}, {"y": FLOATS.ravel()}, False, id="shape"),
        pytest.param({"y": FLOATS}, {"z": FLOATS}, False, id="name"),
        pytest.param({"y": FLOATS}, {"y": FLOATS, "z": FLOATS}, False, id="one too many"),
        pytest.param({"y": FLOATS}, {}, False, id="nothing"),
        pytest.param({"y": np.array([1, 2])}, {"y": np.array([1, 3])}, False, id="integer"),
        pytest.param({"y": TEXTS}, {"y": np.array([b"a", b"b"], object)}, True, id="texts as bytes"),
        pytest.param({"y": TEXTS}, {"y": np.array([b"a", b"c"], object)}, False, id="another text"),
    ],
)
def test_differences(right, got, same):
    assert (difference(right, got) == "") == same
