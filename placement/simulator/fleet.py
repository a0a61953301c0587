"""The models of a simulation: their sizes, and the time to load each."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

MEDIAN_BYTES = 4 << 20
SPREAD = 1.2
"""Standard deviation of the logarithm of sizes: 19 of 20 models lie within a factor of ten of the median."""

LATENCY_MS = 10.0
"""Time that each load takes whatever the model's size: claim, pull, session, answer."""

BYTES_PER_MS = 100_000
"""Bytes that a load transfers in each further millisecond: 100 MB/s from the store into a session."""


@dataclass(frozen=True, slots=True)
class SimulatedModel:
    """The figures of one model."""

    bytes: int
    load_ms: int


def load_ms(size: int) -> int:
    """Returns the assumed time to load a model of `size` bytes, in milliseconds."""
    return max(1, round(LATENCY_MS + size / BYTES_PER_MS))


def lognormal(seed: int = 0, *, median: int = MEDIAN_BYTES, spread: float = SPREAD) -> Callable[[str], SimulatedModel]:
    """Returns a function that makes models with sizes as in real fleets: many small, a few large. A model's size
    depends only on its id and the arguments."""

    def model(model_id: str) -> SimulatedModel:
        drawn = random.Random(f"{seed} {model_id}").normalvariate(0.0, spread)
        size = max(64 << 10, round(median * math.exp(min(drawn, 4.0))))
        return SimulatedModel(size, load_ms(size))

    return model


def equal(size: int) -> Callable[[str], SimulatedModel]:
    """Returns a function that makes models of `size` bytes each."""
    model = SimulatedModel(size, load_ms(size))
    return lambda model_id: model
