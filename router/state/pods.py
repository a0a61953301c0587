"""Pods and the copies in them, as far as one process of the router knows them.

A pod is known from the record that it published, or only from its copies. A copy is known from its key, or from its
agent's answer, which is newer. The code that sends calls updates the counts that the choice of a copy needs. `view`
keeps pods and copies up to date.
"""

import enum
import math
from typing import Protocol

from mesh.schema import idset, records
from mesh.wire import headers
from mesh.wire.client import Pool


class Waiter(Protocol):
    """A call that waits for a connection to a copy's pod."""

    def resume(self) -> None:
        """Continues, because the call may be sent now."""


class News(enum.Enum):
    """News about a pod, for a listener."""

    PUBLISHED = "published"
    SUSPECT = "suspect"
    GONE = "gone"


class Pod:
    """One pod. `in_flight` and `load`, by which a copy is chosen, count all of its models."""

    __slots__ = (
        "agent_failed_at",
        "born",
        "copies",
        "disk",
        "failed_at",
        "in_flight",
        "load",
        "losses",
        "lost_at",
        "name",
        "pool",
        "record",
        "suspect",
        "unsettled",
        "unsettled_since",
        "waited_for",
        "wary",
    )

    def __init__(self, name: str) -> None:
        self.name = name
        self.record: records.PodRecord | None = None  # None: only its copies have been seen so far
        self.born = math.inf  # when it started, on the router's clock, if known
        self.pool: Pool | None = None
        self.copies: dict[str, Copy] = {}
        self.disk = idset.EMPTY  # the models whose files it has on disk
        self.in_flight = 0  # our calls in it
        self.waited_for: dict[Copy, None] = {}  # its copies that calls wait for, and perhaps some without waiting calls
        self.load = 0  # calls in flight in it, by its last reply
        self.suspect = False  # disappeared without notice
        self.wary = False  # it has just demanded verification of its copies
        self.unsettled = False  # was suspect; some of its copies may still be so
        self.unsettled_since = 0.0
        self.failed_at = 0.0  # when its data port could not be reached; 0: it could, or was not tried
        self.agent_failed_at = 0.0  # the same for its agent
        self.losses = 0  # times that connections broke in the middle of calls; breaks at one moment count once
        self.lost_at = 0.0  # when the last one broke

    @property
    def leaving(self) -> bool:
        """True once the pod has announced that it is draining."""
        return self.record is not None and self.record.state == records.LEAVING


class Copy:
    """A model in a pod."""

    __slots__ = ("answered", "calls", "headers", "model", "pod", "record", "suspect", "token", "verified_at", "waiting")

    def __init__(self, model: str, pod: Pod, record: records.CopyRecord) -> None:
        self.model = model
        self.pod = pod
        self.record = record
        self.token = record.token
        self.headers = headers.addressed(model, record.token)  # made once, sent with every call
        self.calls = 0  # this process's calls in flight to it
        self.waiting: dict[Waiter, None] = {}  # calls that wait for a connection in the model's share, in order
        self.suspect = False
        self.verified_at = -math.inf  # the start of the last read that found its record unchanged
        self.answered = False  # known from the agent's answer; the event from etcd has not arrived yet

    @property
    def in_flight(self) -> int:
        """This process's calls in flight in the copy's pod."""
        return self.pod.in_flight

    @property
    def load(self) -> int:
        """The calls in flight in the copy's pod, by the pod's last report."""
        return self.pod.load

    @property
    def loaded(self) -> bool:
        """True if the copy is known to be loaded."""
        return self.record.state == records.LOADED

    @property
    def callable(self) -> bool:
        """True if the copy is loaded and belongs to the incarnation that its pod has published."""
        record = self.pod.record
        return self.loaded and record is not None and record.incarnation == self.record.incarnation
