"""Compares and operations of transactions, as functions that read like sentences.

    await etcd.txn([absent_range(*claims), created(record, "==", revision)], [put_op(claim, value, lease=lease.id)])

etcd limits a transaction to 128 operations and 1.5 MiB.
"""

from typing import Literal

from mesh.etcd.ranges import after_prefix
from mesh.etcd.records import KeyValue
from mesh.pb import etcd_pb2 as pb

MAX_OPERATIONS = 128

Compare = pb.Compare
Op = pb.RequestOp
Sign = Literal["==", "!=", "<", ">"]

_RESULTS = {
    "==": pb.Compare.EQUAL,
    "!=": pb.Compare.NOT_EQUAL,
    "<": pb.Compare.LESS,
    ">": pb.Compare.GREATER,
}


def created(key: bytes, sign: Sign, revision: int) -> Compare:
    """Compares the create revision of the key, which is 0 for a key that does not exist."""
    return pb.Compare(result=_RESULTS[sign], target=pb.Compare.CREATE, key=key, create_revision=revision)


def created_in_range(start: bytes, end: bytes, sign: Sign, revision: int) -> Compare:
    """Compares the create revision of every key in [start, end).

    For an empty range, the compare holds if and only if `0 <sign> revision` holds."""
    return pb.Compare(
        result=_RESULTS[sign], target=pb.Compare.CREATE, key=start, range_end=end, create_revision=revision
    )


def modified(key: bytes, revision: int, sign: Sign = "==") -> Compare:
    """Compares the revision of the key's last write, which is 0 for a key that does not exist."""
    return pb.Compare(result=_RESULTS[sign], target=pb.Compare.MOD, key=key, mod_revision=revision)


def value_is(key: bytes, value: bytes, sign: Sign = "==") -> Compare:
    """Compares the value of the key. Never holds for a key that does not exist."""
    return pb.Compare(result=_RESULTS[sign], target=pb.Compare.VALUE, key=key, value=value)


def leased(key: bytes, lease: int, sign: Sign = "==") -> Compare:
    """Compares the lease of the key, which is 0 for a key without a lease, or for a key that does not exist."""
    return pb.Compare(result=_RESULTS[sign], target=pb.Compare.LEASE, key=key, lease=lease)


def exists(key: bytes) -> Compare:
    """Requires that the key exists."""
    return created(key, ">", 0)


def absent(key: bytes) -> Compare:
    """Requires that the key does not exist."""
    return created(key, "==", 0)


def absent_range(start: bytes, end: bytes) -> Compare:
    """Requires that no key exists in [start, end)."""
    return created_in_range(start, end, "==", 0)


def absent_prefix(prefix: bytes) -> Compare:
    """Requires that no key begins with `prefix`."""
    return absent_range(prefix, after_prefix(prefix))


def put_op(key: bytes, value: bytes, lease: int = 0) -> Op:
    """Writes a key, attached to a lease. With `lease` 0, the key has no lease afterwards."""
    return pb.RequestOp(request_put=pb.PutRequest(key=key, value=value, lease=lease))


def delete_op(key: bytes) -> Op:
    """Deletes a key. Does nothing if the key does not exist."""
    return pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=key))


def delete_range_op(start: bytes, end: bytes) -> Op:
    """Deletes every key in [start, end)."""
    return pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=start, range_end=end))


def get_op(key: bytes) -> Op:
    """Reads a key."""
    return pb.RequestOp(request_range=pb.RangeRequest(key=key))


def get_range_op(start: bytes, end: bytes, *, limit: int = 0, keys_only: bool = False) -> Op:
    """Reads the keys in [start, end), at most `limit` of them (0: all)."""
    return pb.RequestOp(request_range=pb.RangeRequest(key=start, range_end=end, limit=limit, keys_only=keys_only))


def count_op(start: bytes, end: bytes, *, revision: int = 0) -> Op:
    """Counts the keys in [start, end) at `revision` (0: now). `counted` reads its response."""
    return pb.RequestOp(request_range=pb.RangeRequest(key=start, range_end=end, count_only=True, revision=revision))


def counted(response: object) -> int:
    """Returns the number in the response to a `count_op`."""
    return response if isinstance(response, int) else 0


def found(response: object) -> tuple[KeyValue, ...]:
    """Returns the keys in the response to a `get_op` or `get_range_op`."""
    return response if isinstance(response, tuple) else ()
