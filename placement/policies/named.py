"""Eviction policies by name: `lru`, `gdsf`, and either with `+probation`."""

from placement.policies.base import K, Policy, Uses
from placement.policies.gdsf import Gdsf
from placement.policies.lru import Lru
from placement.policies.probation import Probation

NAMES = ("lru", "gdsf", "lru+probation", "gdsf+probation")

EXPLAINED = (
    "lru: least recently used first; gdsf: cheap to load, large and rarely used first; with +probation: copies that "
    "were called only once before all others"
)
"""The policies in one sentence, for the help of options."""


def check(name: str) -> str:
    """Returns the name. Raises ValueError, with the existing names, if no policy has it."""
    if name not in NAMES:
        raise ValueError(f"{name!r} is not an eviction policy; use one of {', '.join(NAMES)}")
    return name


def named(name: str, uses: Uses[K]) -> Policy[K]:
    """Creates the policy of that name. Raises ValueError, with the existing names, if there is none."""
    check(name)
    base, _, behind = name.partition("+")
    inner: Policy[K] = Lru(uses) if base == "lru" else Gdsf(uses)
    return Probation(inner, uses) if behind else inner
