"""The extent of a run: the number of rounds of each part, and their length.

Rounds are short and many, and each has its own ratio, because the machine's speed drifts more within a minute than
within a round.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Plan:
    """The number of rounds of each part, and the seconds of one system in one round."""

    chain: int = 7
    large: int = 3
    closed: int = 5
    closed_seconds: float = 2.0
    direct: int = 9
    open: int = 3  # of each rate
    open_seconds: float = 5.0
    rates: tuple[int, ...] = (500, 1000)  # calls a second of the open loop


QUICK = Plan(chain=1, large=1, closed=1, closed_seconds=1.0, direct=1, open=1, open_seconds=1.0)
"""A plan that only shows whether everything works. Its figures mean nothing."""
