"""The latest decisions of this pod, each with its reason, for `describe` and `mesh explain`.

The number of kept decisions is limited, because a pod under pressure decides thousands of times a minute, and only the
latest decisions help.
"""

import json
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

KEPT = 512


@dataclass(frozen=True, slots=True)
class Decision:
    """One decision. The first of `models` is the model that the decision is about; the others are involved."""

    kind: str  # evict, fail, refuse or unload
    models: tuple[str, ...]
    why: str
    at: float  # monotonic seconds


class Decisions:
    """A bounded list of decisions."""

    __slots__ = ("_kept",)

    def __init__(self) -> None:
        self._kept: deque[Decision] = deque(maxlen=KEPT)

    def note(self, kind: str, *models: str, why: str) -> None:
        """Notes a decision about the first of `models`, which involves the others. Forgets the oldest decision if there
        are too many."""
        self._kept.append(Decision(kind, models, why, time.monotonic()))

    def lines(self, model_id: str = "", *, limit: int = 50) -> Iterator[str]:
        """Yields decisions as JSON objects of one line, the newest first. With an id, yields only decisions that
        concern this model."""
        now = time.monotonic()
        found = 0
        for decision in reversed(self._kept):
            if model_id and model_id not in decision.models:
                continue
            if found >= limit:
                return
            found += 1
            yield json.dumps(
                {
                    "what": decision.kind,
                    "models": list(decision.models[:10]),
                    "why": decision.why,
                    "ago_ms": int((now - decision.at) * 1000),
                }
            )
