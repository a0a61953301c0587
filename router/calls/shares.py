"""A model's share of the connections to a pod, so that one slow model does not use them all.

HTTP/1.1 carries one call at a time on a connection, and a worker has a limited number of connections to a pod. A model
may use another connection as long as it uses fewer than are free. This is the dynamic threshold of Choudhury and Hahne
for shared buffers. One busy model thus gets half of the connections, two get a third each, and one connection is always
left for the next model. Further calls of the model wait until any call in that pod ends. If too many wait, only that
model's calls are refused.
"""

from typing import Protocol

from mesh.statuses import MeshError, Reason

_RETRY = 0.5  # seconds


class SharedCopy(Protocol):
    """The properties of a copy that shares depend on: this worker's calls to the copy and to its pod."""

    @property
    def calls(self) -> int:
        """The worker's calls in flight to this copy."""

    @property
    def in_flight(self) -> int:
        """The worker's calls in flight to the copy's pod."""


def full(copy: SharedCopy, connections: int) -> bool:
    """Returns whether the model has used up its share of the worker's `connections` to the pod. A model without a call
    in flight always gets one."""
    return copy.calls > 0 and copy.calls >= connections - copy.in_flight


def refusal(model: str, pod: str, calls: int) -> MeshError:
    """Returns the error for a call that finds no free connection and may not wait for one. `calls` is the number of
    calls of the model in flight to the pod."""
    text = (
        f"{model} has used up its share of the connections to {pod} ({calls} calls in flight), and no more may wait: "
        "retry later"
    )
    return MeshError(Reason.OVERLOADED, text, retry_after=_RETRY)
