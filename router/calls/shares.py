"""A model's share of the connections to a pod, so that one slow model does not take them all.

HTTP/1.1 carries one call at a time on a connection, and a worker has a limited number of connections to a pod. A model
may take another one while it has fewer than are free: the dynamic threshold of Choudhury and Hahne for shared buffers.
One busy model thus gets half of them, two get a third each, and one is always left for the next model. Further calls
wait for calls in that pod to end, of any model; if too many wait, only that model's calls are refused.
"""

from typing import Protocol

from mesh.statuses import MeshError, Reason

_RETRY = 0.5  # seconds


class SharedCopy(Protocol):
    """The part of a copy that matters here: this worker's calls to the copy and to its pod."""

    @property
    def calls(self) -> int:
        """The calls in flight to this copy."""

    @property
    def in_flight(self) -> int:
        """The calls in flight to its pod."""


def full(copy: SharedCopy, connections: int) -> bool:
    """Returns whether the model has used up its share of that many connections. A model without a call gets one."""
    return copy.calls > 0 and copy.calls >= connections - copy.in_flight


def refusal(model: str, pod: str, calls: int) -> MeshError:
    """Returns the error for a call beyond the number that may wait."""
    text = f"{calls} calls of {model} are in flight to {pod}, its share of the connections, and as many wait as may"
    return MeshError(Reason.OVERLOADED, text, retry_after=_RETRY)
