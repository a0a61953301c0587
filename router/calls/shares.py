"""A model's share of the connections to a pod, so that one slow model does not take them all.

HTTP/1.1 carries one call at a time on a connection, and a worker has so many to a pod. A model may take another one
while it has fewer than are free: the dynamic threshold of Choudhury and Hahne for shared buffers. One busy model so
gets half of them, two a third each, and there is always one left for the next. What is beyond waits for calls in
that pod to end, its own model's or others', or, where too many wait, is refused: for that model alone.
"""

from typing import Protocol

from mesh.statuses import MeshError, Reason

_RETRY = 0.5  # seconds


class Copy(Protocol):
    """What counts of a copy: our calls of it, and our calls in its pod."""

    @property
    def calls(self) -> int:
        """In flight to this copy."""

    @property
    def in_flight(self) -> int:
        """In flight to its pod."""


def full(copy: Copy, connections: int) -> bool:
    """Tells whether the model has its share of that many connections. A model without a call always gets one."""
    return copy.calls > 0 and copy.calls >= connections - copy.in_flight


def refusal(model: str, pod: str, calls: int) -> MeshError:
    """Returns the error for a call beyond what may wait."""
    text = f"{calls} calls of {model} are in flight to {pod}, its share of the connections, and as many wait as may"
    return MeshError(Reason.OVERLOADED, text, retry_after=_RETRY)
