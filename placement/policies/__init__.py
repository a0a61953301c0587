"""Eviction policies: the order in which copies are evicted, behind one interface.

A policy only defines an order. `placement.room` decides, alike for all policies, whether a copy may be evicted (calls
in flight, pinned, used more recently than the newcomer) and how many must be. Policies can therefore be exchanged
safely, and the same property tests hold for each.

- `base`: the interface, and the heap that all of them use.
- `lru`: least recently used first; the default.
- `gdsf`: cheap to load again, large and rarely used first.
- `probation`: either of them behind a small queue of newcomers, against scans.
- `named`: the policies by name, for settings.
"""

from placement.policies.base import Policy, Standing, Uses
from placement.policies.gdsf import Gdsf
from placement.policies.lru import Lru
from placement.policies.named import NAMES, check, named
from placement.policies.probation import Probation

__all__ = ["NAMES", "Gdsf", "Lru", "Policy", "Probation", "Standing", "Uses", "check", "named"]
