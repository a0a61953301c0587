"""Eviction policies: the order in which copies are evicted, behind one interface.

A policy only defines an order. For all policies alike, `placement.room` decides how many copies must be evicted, and
which must not be (those with calls in flight, pinned ones, those used more recently than the newcomer). Policies can
therefore be exchanged safely, and the same property tests apply to each.

- `base`: the interface, and the heap that all of them use.
- `lru`: least recently used first; the default.
- `gdsf`: cheap to load again, large and rarely used first.
- `probation`: one of these two behind a small queue of newcomers, which protects against scans.
- `named`: the policies by name, for settings.
"""

from placement.policies.base import Policy, Standing, Uses
from placement.policies.gdsf import Gdsf
from placement.policies.lru import Lru
from placement.policies.named import EXPLAINED, NAMES, check, named
from placement.policies.probation import Probation

__all__ = ["EXPLAINED", "NAMES", "Gdsf", "Lru", "Policy", "Probation", "Standing", "Uses", "check", "named"]
