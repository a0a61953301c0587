"""The extent of a run: how many rounds of each part, and how long.

Rounds are short and many, each with a ratio of its own, because the machine's speed drifts more within a minute than
within a round.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Plan:
    """Rounds, and seconds of one system in one round."""

    chain: int = 7
    large: int = 3
    closed: int = 5
    closed_seconds: float = 2.0
    open: int = 3  # of each rate
    open_seconds: float = 5.0
    rates: tuple[int, ...] = (500, 1000)  # calls a second of the open loop


QUICK = Plan(chain=1, large=1, closed=1, closed_seconds=1.0, open=1, open_seconds=1.0)
"""A plan to see that everything works. Its figures mean nothing."""
