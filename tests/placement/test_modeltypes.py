"""Types of models that pods accept: matching, choice of a pod, and planning."""

import pytest

from placement.choice import ChoiceVerdict, choose
from placement.modeltypes import takes, untaken
from placement.pod import Candidate

ONNX, TRITON = frozenset({"onnx"}), frozenset({"sklearn", "tensorflow:2"})


@pytest.mark.parametrize(
    ("served", "model_type", "taken"),
    [
        (frozenset(), "whatever", True),
        (ONNX, "onnx", True),
        (ONNX, "onnx:1", True),
        (ONNX, "onnx2", False),
        (ONNX, "xgboost", False),
        (ONNX, "", True),
        (TRITON, "tensorflow", True),
        (TRITON, "tensorflow:2", True),
        (TRITON, "tensorflow:1", False),
        (TRITON, "mt:sklearn:0|pv:grpc-v2", True),
        (TRITON, "mt:xgboost:1", False),
        (TRITON, "rt:triton", False),
        (frozenset({"rt:triton"}), "rt:triton", True),
    ],
)
def test_a_type_matches_by_name_and_by_version_where_both_have_one(
    served: frozenset[str], model_type: str, taken: bool
) -> None:
    assert takes(served, model_type) is taken


def pod(name: str, types: frozenset[str], used: int = 0) -> Candidate:
    return Candidate(name, 100, used, types=types)


def test_a_model_goes_only_to_pods_that_take_its_type() -> None:
    """A pod that takes other types is skipped, however much room it has. The text lists the types that it takes."""
    pods = [pod("a", ONNX), pod("b", TRITON, used=90), pod("c", ONNX)]
    chosen = choose("m", 50, pods, model_type="sklearn")
    assert chosen.pod == "b"
    assert {refused.pod: refused.why for refused in chosen.refused} == {
        "a": "takes only models of type onnx",
        "c": "takes only models of type onnx",
    }


def test_a_type_that_no_pod_takes_can_go_nowhere() -> None:
    chosen = choose("m", 1, [pod("a", ONNX), pod("b", TRITON)], model_type="xgboost")
    assert (chosen.pod, chosen.verdict) == (None, ChoiceVerdict.NOWHERE)
    assert "a takes only models of type onnx; b takes only models of type sklearn, tensorflow:2" in chosen.why


def test_a_missing_type_is_named_with_those_that_there_are() -> None:
    assert untaken("xgboost", [ONNX, TRITON]) == (
        "no pod accepts models of type xgboost: the pods of this mesh accept onnx, sklearn, tensorflow:2"
    )
    assert untaken("onnx:1", [ONNX, TRITON]) == ""
    assert untaken("xgboost", [ONNX, frozenset()]) == ""
    assert untaken("xgboost", []) == ""
