"""Eviction as a strategy: in which order copies go, behind one interface.

A policy knows only an order. Whether a copy may go at all (calls in flight, pinned, used more recently than whoever
needs the room) and how many must is decided in `placement.room`, alike for all policies. So a policy can be exchanged
without a word about safety, and the same property tests hold for each.

- `base`: the interface, and the heap that all of them stand on.
- `lru`: least recently used first; the default.
- `gdsf`: what is cheap to load again, large and rarely used first.
- `probation`: either of them behind a small queue in which newcomers prove themselves, against scans.
- `named`: from a setting's text to a policy.
"""

from placement.policies.base import Policy, Standing, Uses
from placement.policies.gdsf import Gdsf
from placement.policies.lru import Lru
from placement.policies.named import NAMES, check, named
from placement.policies.probation import Probation

__all__ = ["NAMES", "Gdsf", "Lru", "Policy", "Probation", "Standing", "Uses", "check", "named"]
