"""Frozen records for etcd's data and answers. Generated protobuf messages do not leave this package."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from mesh.pb import etcd_pb2 as pb


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One key as it was at some revision."""

    key: bytes
    value: bytes  # empty if only keys were requested, and in deletions
    create_revision: int  # 0 in deletions
    mod_revision: int
    version: int  # writes since it was created; 0 in deletions
    lease: int  # 0: none


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a range, ordered by key."""

    kvs: tuple[KeyValue, ...]
    revision: int  # of the whole store when the page was read; ask for the next page at this revision
    more: bool
    count: int  # keys in the range from the start of this page, this page included


class ChangeKind(enum.Enum):
    """The kind of a change: a write or a deletion."""

    PUT = "put"
    DELETE = "delete"


@dataclass(frozen=True, slots=True)
class Event:
    """One change of one key. In a deletion, `kv` has the key and the revision of the deletion, nothing else."""

    kind: ChangeKind
    kv: KeyValue


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A whole range at one revision, which replaces everything known before."""

    revision: int
    kvs: tuple[KeyValue, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """All changes of the range at one revision, in their order."""

    revision: int
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class TxnResult:
    """The result of a transaction. `responses` has an entry for each operation of the branch taken: a tuple of the keys
    found for a get, None for a put, the number of deleted keys for a deletion, and the number of keys for a count
    (`counted`)."""

    succeeded: bool  # all compares held: the success branch was taken
    responses: tuple["tuple[KeyValue, ...] | int | None", ...]
    revision: int


@dataclass(frozen=True, slots=True)
class Status:
    """The state of a member of the cluster, as the member reports it."""

    endpoint: str
    version: str
    revision: int
    db_bytes: int  # on disk
    db_used_bytes: int  # of them in use
    has_leader: bool
    errors: tuple[str, ...]  # alarms, as texts
    cluster: int = 0  # the cluster's id
    member: int = 0  # this member's
    learner: bool = False  # a learner: it has no vote yet
    quota_bytes: int = 0  # of its database; 0: unknown, as before etcd 3.6


@dataclass(frozen=True, slots=True)
class EtcdMember:
    """One member, as the cluster lists it."""

    id: int
    name: str  # "": it has never started
    client_urls: tuple[str, ...]
    learner: bool


@dataclass(frozen=True, slots=True)
class Alarm:
    """An alarm that a member has raised."""

    member: int
    kind: str  # NOSPACE: no more writes; CORRUPT: members disagree


def key_value(kv: pb.KeyValue) -> KeyValue:
    """Converts a KeyValue message."""
    return KeyValue(kv.key, kv.value, kv.create_revision, kv.mod_revision, kv.version, kv.lease)


def key_values(kvs: Sequence[pb.KeyValue]) -> tuple[KeyValue, ...]:
    """Converts KeyValue messages."""
    return tuple([KeyValue(kv.key, kv.value, kv.create_revision, kv.mod_revision, kv.version, kv.lease) for kv in kvs])
