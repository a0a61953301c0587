"""The limits and times of cold starts."""

from dataclasses import dataclass

from placement.failures import EXPIRY_MS


@dataclass(frozen=True, slots=True)
class Rules:
    """Limits and times of one machine. Times in milliseconds, sizes in bytes."""

    load_wait_ms: int = 120_000  # longest that a waiter without an earlier deadline waits
    max_waiters: int = 20_000
    max_waiters_per_model: int = 2_000
    max_waiting_bytes: int = 256 << 20  # of the messages that waiters hold
    failure_expiry_ms: int = EXPIRY_MS

    max_refusals: int = 5  # refusals after which no further pod is asked in one go
    max_stale: int = 5  # answers "stale" for a record that has just been read
    pause_ms: int = 500  # between two looks, if the view does not change earlier
    patience_ms: int = 10_000
    """Time for which a flight without waiters waits for pods to come back, or for claims of dead pods to end: a lease's
    time to live. A flight with waiters waits three times as long, but no longer than `load_wait_ms`."""
    waited_ms: int = 1_000
    """An agent that takes longer than this to refuse a load must have waited for room first."""
