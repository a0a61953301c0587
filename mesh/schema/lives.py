"""Records of pods' lives, and tombstones of models that were unregistered while a pod might still answer for them.

A pod's presence ends with its lease, but a model server that is cut off from etcd may keep answering. So every
incarnation of a pod has a second key, without a lease: its *life*, which exists from the pod's start until its model
server has ended. A life without presence is *open*: the incarnation may still answer calls, and nobody knows for which
models.

A *tombstone* marks an id that was unregistered while a copy existed or a life was open. It prevents the id from being
registered with other attributes as long as a pod may answer from the old registration.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mesh.etcd import Op, count_op, counted
from mesh.etcd.ranges import after_prefix
from mesh.schema.jsonfields import read_object, why
from mesh.schema.keys import Keys
from mesh.schema.records import ModelRecord


def census(keys: Keys) -> list[Op]:
    """Returns operations that count lives and pods, to be added to the caller's transaction. `all_present` reads the
    responses."""
    return [count_op(keys.lives, after_prefix(keys.lives)), count_op(keys.pods, after_prefix(keys.pods))]


def all_present(responses: Sequence[object]) -> bool:
    """Returns whether no life is open. Each published pod has a life, so the counts of lives and of pods are then
    equal. (Fewer lives than pods should never occur. In that case, returns False.)"""
    lives, pods = responses
    return counted(lives) == counted(pods)


@dataclass(frozen=True, slots=True)
class Life:
    """The record of one incarnation of a pod, `lives/<pod>/<incarnation>`."""

    data_address: str  # host:port at which its model server may still answer
    control_address: str  # host:port
    ended_revision: int = 0  # etcd's revision at which the leader saw its presence end; 0: not seen
    open_seconds: int = 0  # time for which it has been open, as counted by leaders; coarse
    token: str = ""  # required by its control port; "": none
    lease: int = 0  # create revision of its presence, so that the two can be compared without values

    @classmethod
    def decode(cls, value: bytes) -> "Life":
        """Decodes the record from JSON. Raises ValueError for anything else."""
        data = read_object(value)
        try:
            return cls(
                data_address=str(data["data"]),
                control_address=str(data["control"]),
                ended_revision=int(data.get("ended", 0)),
                open_seconds=int(data.get("open", 0)),
                token=str(data.get("token", "")),
                lease=int(data.get("lease", 0)),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(why(error)) from error

    def encode(self) -> bytes:
        """Encodes the record as JSON."""
        data: dict[str, Any] = {"data": self.data_address, "control": self.control_address}
        if self.ended_revision:
            data["ended"] = self.ended_revision
        if self.open_seconds:
            data["open"] = self.open_seconds
        if self.token:
            data["token"] = self.token
        if self.lease:
            data["lease"] = self.lease
        return json.dumps(data, separators=(",", ":")).encode()


@dataclass(frozen=True, slots=True)
class Tombstone:
    """The attributes of an id when it was unregistered."""

    type: str
    path: str
    key: str
    sha256: str

    @classmethod
    def of(cls, record: ModelRecord) -> "Tombstone":
        """Returns the tombstone of a registration."""
        return cls(record.type, record.path, record.key, record.sha256)

    def allows(self, record: ModelRecord) -> bool:
        """Returns whether the id may be registered with these attributes while a pod may still answer from the old
        registration. The attributes must be the same, because then it does not matter which registration answers."""
        return (self.type, self.path, self.key, self.sha256) == (record.type, record.path, record.key, record.sha256)

    @classmethod
    def decode(cls, value: bytes) -> "Tombstone":
        """Decodes the record from JSON. Raises ValueError for anything else."""
        data = read_object(value)
        return cls(*(str(data.get(name, "")) for name in ("type", "path", "key", "sha256")))

    def encode(self) -> bytes:
        """Encodes the record as JSON."""
        named = {"type": self.type, "path": self.path, "key": self.key, "sha256": self.sha256}
        return json.dumps({name: value for name, value in named.items() if value}, separators=(",", ":")).encode()


@dataclass(frozen=True, slots=True)
class RouterRecord:
    """The record of a router's presence, at `routers/<name>`. It ends with the router's lease."""

    address: str  # host:port that clients call, as far as the router knows it
    probe_address: str  # host:port of /ready, /live and /metrics
    workers: int
    protocol: tuple[int, int]  # lowest and highest version of the router-agent protocol that it speaks

    @classmethod
    def decode(cls, value: bytes) -> "RouterRecord":
        """Decodes the record from JSON. Raises ValueError for anything else."""
        data = read_object(value)
        try:
            low, high = data["protocol"]
            return cls(str(data["address"]), str(data.get("probe", "")), int(data["workers"]), (int(low), int(high)))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(why(error)) from error

    def encode(self) -> bytes:
        """Encodes the record as JSON."""
        return json.dumps(
            {
                "address": self.address,
                "probe": self.probe_address,
                "workers": self.workers,
                "protocol": list(self.protocol),
            },
            separators=(",", ":"),
        ).encode()
