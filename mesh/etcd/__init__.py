"""A thin etcd client on `grpc.aio`.

Mesh has a client of its own because no other is reliable: `etcd3` cannot be imported with current protobuf, and `aetcd`
loses watch events silently, has no TLS and never renews its token. `Etcd` has reads, writes and transactions. A `Lease`
reports its own loss. A `Mirror` follows a range through faults. `mesh.schema.keys` and `mesh.schema.records` define
what the keys and values mean.
"""

from mesh.etcd.client import Etcd, Updated
from mesh.etcd.connection import EtcdStatistics
from mesh.etcd.errors import (
    EtcdClosed,
    EtcdCompacted,
    EtcdDenied,
    EtcdError,
    EtcdLeaseLost,
    EtcdReplaced,
    EtcdUnavailable,
)
from mesh.etcd.lease import Lease, LeaseStatistics
from mesh.etcd.mirror import Change, Mirror, MirrorStatistics
from mesh.etcd.patience import Patience
from mesh.etcd.records import Alarm, ChangeKind, Delta, EtcdMember, Event, KeyValue, Page, Snapshot, Status, TxnResult
from mesh.etcd.txn import (
    MAX_OPERATIONS,
    Compare,
    Op,
    absent,
    absent_prefix,
    absent_range,
    count_op,
    counted,
    created,
    created_in_range,
    delete_op,
    delete_range_op,
    exists,
    found,
    get_op,
    get_range_op,
    leased,
    modified,
    put_op,
    value_is,
)

__all__ = [
    "MAX_OPERATIONS",
    "Alarm",
    "Change",
    "ChangeKind",
    "Compare",
    "Delta",
    "Etcd",
    "EtcdClosed",
    "EtcdCompacted",
    "EtcdDenied",
    "EtcdError",
    "EtcdLeaseLost",
    "EtcdMember",
    "EtcdReplaced",
    "EtcdStatistics",
    "EtcdUnavailable",
    "Event",
    "KeyValue",
    "Lease",
    "LeaseStatistics",
    "Mirror",
    "MirrorStatistics",
    "Op",
    "Page",
    "Patience",
    "Snapshot",
    "Status",
    "TxnResult",
    "Updated",
    "absent",
    "absent_prefix",
    "absent_range",
    "count_op",
    "counted",
    "created",
    "created_in_range",
    "delete_op",
    "delete_range_op",
    "exists",
    "found",
    "get_op",
    "get_range_op",
    "leased",
    "modified",
    "put_op",
    "value_is",
]
