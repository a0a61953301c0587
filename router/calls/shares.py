"""A model's share of the connections to a pod, so that one slow model does not take them all.

HTTP/1.1 carries one call at a time on a connection, and a worker has a limited number of them to a pod. A model may
take another one while it has fewer than are free: the dynamic threshold of Choudhury and Hahne for shared buffers. Thus
one busy model gets half of them, two get a third each, and there is always one left for the next. Further calls wait
for calls in that pod to end, of their own model or of others; if too many wait, that model's calls alone are refused.
"""

from typing import Protocol

from mesh.statuses import MeshError, Reason

_RETRY = 0.5  # seconds


class SharedCopy(Protocol):
    """The part of a copy that counts here: our calls of it, and our calls in its pod."""

    @property
    def calls(self) -> int:
        """The calls in flight to this copy."""

    @property
    def in_flight(self) -> int:
        """The calls in flight to its pod."""


def full(copy: SharedCopy, connections: int) -> bool:
    """Returns whether the model has its share of that many connections. A model without a call always gets one."""
    return copy.calls > 0 and copy.calls >= connections - copy.in_flight


def refusal(model: str, pod: str, calls: int) -> MeshError:
    """Returns the error for a call beyond the number that may wait."""
    text = f"{calls} calls of {model} are in flight to {pod}, its share of the connections, and as many wait as may"
    return MeshError(Reason.OVERLOADED, text, retry_after=_RETRY)
