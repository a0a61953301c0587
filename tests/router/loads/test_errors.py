"""The conversion between problems of cold starts and errors for callers."""

import pytest

from mesh.statuses import MeshError, Reason
from placement.coldstart.problems import Problem, ProblemReason
from router.loads.errors import error_of, problem_of


@pytest.mark.parametrize("reason", ProblemReason)
def test_every_reason_is_one_of_the_mesh(reason):
    problem = Problem(reason, "text", 1500, {"pods": "a"})
    error = error_of(problem)
    assert (error.reason, error.text, error.retry_after, error.details) == (
        Reason[reason.name],
        "text",
        1.5,
        {"pods": "a"},
    )
    assert problem_of(error) == problem


def test_a_reason_that_means_nothing_to_a_cold_start_is_unavailable():
    assert problem_of(MeshError(Reason.FORBIDDEN, "no")) == Problem(ProblemReason.UNAVAILABLE, "no")
