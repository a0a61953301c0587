"""What stands in etcd about the lives of pods, and about models that were unregistered while one may still answer.

A pod's presence ends with its lease, but its model server may go on answering, cut off from etcd. So every incarnation
of a pod has a second key, without a lease: its *life*, which stands from when the pod takes its place until its model
server has ended. A life without presence is *open*: nobody can tell what it still answers.

A *tombstone* marks an id that was unregistered while a copy stood or a life was open. It keeps the id from being
registered anew with other attributes before everybody who may answer for the former registration is known not to.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mesh.etcd import Op, count_op, counted
from mesh.etcd.ranges import after_prefix
from mesh.schema.keys import Keys
from mesh.schema.records import ModelRecord, read_object


def census(keys: Keys) -> list[Op]:
    """Returns the operations, for a transaction of the caller's, whose responses `all_present` reads."""
    return [count_op(keys.lives, after_prefix(keys.lives)), count_op(keys.pods, after_prefix(keys.pods))]


def all_present(responses: Sequence[object]) -> bool:
    """Returns whether no life is open: each published pod has one, so there are as many of both. Fewer lives than pods,
    which must not happen, prove nothing."""
    lives, pods = responses
    return counted(lives) == counted(pods)


@dataclass(frozen=True, slots=True)
class Life:
    """One incarnation of a pod, as `lives/<pod>/<incarnation>` describes it."""

    data_address: str  # host:port; where its model server may still answer
    control_address: str  # host:port
    ended_revision: int = 0  # etcd's revision at which its presence ended, as the leader saw it; 0: not seen
    open_seconds: int = 0  # for how long it has been open, as leaders have counted it; coarse
    token: str = ""  # that its control port demands; "": it demands none
    lease: int = 0  # that its presence hangs on, so that whoever compares the two needs no values

    @classmethod
    def decode(cls, value: bytes) -> "Life":
        """Decodes its JSON. Raises ValueError where that is not one."""
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
            raise ValueError(f"not a life: {error!r}") from error

    def encode(self) -> bytes:
        """Encodes it as JSON."""
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
    """What an id stood for when it was unregistered."""

    type: str
    path: str
    key: str
    sha256: str

    @classmethod
    def of(cls, record: ModelRecord) -> "Tombstone":
        """Returns the tombstone of a registration."""
        return cls(record.type, record.path, record.key, record.sha256)

    def allows(self, record: ModelRecord) -> bool:
        """Returns whether the id may be registered like this while a pod may answer for it: only as it was, since
        then it makes no difference which of the two answers."""
        return (self.type, self.path, self.key, self.sha256) == (record.type, record.path, record.key, record.sha256)

    @classmethod
    def decode(cls, value: bytes) -> "Tombstone":
        """Decodes its JSON. Raises ValueError where that is not one."""
        data = read_object(value)
        return cls(*(str(data.get(name, "")) for name in ("type", "path", "key", "sha256")))

    def encode(self) -> bytes:
        """Encodes it as JSON."""
        named = {"type": self.type, "path": self.path, "key": self.key, "sha256": self.sha256}
        return json.dumps({name: value for name, value in named.items() if value}, separators=(",", ":")).encode()


@dataclass(frozen=True, slots=True)
class RouterRecord:
    """A router's presence, `routers/<name>`, under its lease."""

    address: str  # host:port that clients call, as far as the router knows it
    probe_address: str  # host:port of /ready, /live and /metrics
    workers: int
    protocol: tuple[int, int]  # lowest and highest version of the router-agent protocol that it speaks

    @classmethod
    def decode(cls, value: bytes) -> "RouterRecord":
        """Decodes its JSON. Raises ValueError where that is not one."""
        data = read_object(value)
        try:
            low, high = data["protocol"]
            return cls(str(data["address"]), str(data.get("probe", "")), int(data["workers"]), (int(low), int(high)))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"not a router's record: {error!r}") from error

    def encode(self) -> bytes:
        """Encodes it as JSON."""
        return json.dumps(
            {
                "address": self.address,
                "probe": self.probe_address,
                "workers": self.workers,
                "protocol": list(self.protocol),
            },
            separators=(",", ":"),
        ).encode()
