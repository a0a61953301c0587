"""Rows of the results of `mesh simulate`, for the table and the picture."""

from dataclasses import dataclass

from placement.simulator.cluster import Counts
from placement.simulator.run import Result


@dataclass(frozen=True, slots=True)
class Row:
    """The result of one simulation. `result` is None for the clairvoyant, which has only counts."""

    policy: str
    pods: int
    room: float  # the capacity of all pods, as a share of all models' bytes
    counts: Counts
    result: Result | None
