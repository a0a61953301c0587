"""The conversion of cold starts' problems to errors for callers, and back.

Each reason in `placement.coldstart` has a counterpart of the same name among the mesh's error reasons."""

from mesh.statuses import MeshError, Reason
from placement.coldstart import problems
from placement.coldstart.problems import Problem


def error_of(problem: Problem) -> MeshError:
    """Returns the error that callers get."""
    retry_after = None if problem.retry_ms is None else problem.retry_ms / 1000
    return MeshError(Reason[problem.reason.name], problem.text, retry_after=retry_after, details=problem.details)


def problem_of(error: MeshError) -> Problem:
    """Returns an error as a problem of a cold start."""
    retry_ms = None if error.retry_after is None else round(error.retry_after * 1000)
    return Problem(problems.ProblemReason.named(error.reason.name), error.text, retry_ms, error.details)
