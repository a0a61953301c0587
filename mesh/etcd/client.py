"""The client for reads, writes and transactions.

Work that needs more than one request is elsewhere: `Lease` keeps a lease alive, `Mirror` follows a range. `connection`
sends requests, retries them, and limits their time.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from mesh.etcd.connection import Connection, EtcdStatistics
from mesh.etcd.errors import EtcdError, EtcdUnavailable
from mesh.etcd.ranges import after_prefix
from mesh.etcd.records import Alarm, EtcdMember, KeyValue, Page, Status, TxnResult, key_value, key_values
from mesh.etcd.txn import Compare, Op, get_op, modified, put_op
from mesh.options.etcdsettings import EtcdSettings
from mesh.pb import etcd_pb2 as pb
from mesh.statuses import Reason

_UPDATE_TIMEOUTS = 3  # an update may take several time-outs: otherwise it could never settle a write of unknown outcome


@dataclass(frozen=True, slots=True)
class Updated:
    """The outcome of `update()`."""

    changed: bool
    before: KeyValue | None  # when the change was decided
    value: bytes | None  # now; None: there is no such key
    mod_revision: int  # of the value; 0: there is no such key


class Etcd:
    """A client of an etcd cluster with one or more members. It connects when first used.

    A `timeout` is in seconds (None: the timeout of the settings, unless the method says otherwise). All methods raise
    EtcdError and its subclasses, and may be cancelled. etcd may still carry out a write that was cancelled. One client
    serves any number of tasks of one event loop.
    """

    def __init__(self, settings: EtcdSettings, *, follow: bool = False) -> None:
        """Makes a client without connecting. With `follow`, the settings' files are read again when they change.

        Raises ValueError for invalid settings."""
        self.connection = Connection(settings, follow=follow)  # used within this package

    @property
    def settings(self) -> EtcdSettings:
        """The settings in use."""
        return self.connection.settings

    async def __aenter__(self) -> "Etcd":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections. Requests and streams in progress end with EtcdClosed."""
        await self.connection.close()

    def statistics(self) -> EtcdStatistics:
        """Returns the client's counters."""
        return self.connection.statistics()

    async def get(self, key: bytes, *, timeout: float | None = None) -> KeyValue | None:
        """Returns the key with its current value (a linearizable read), or None if the key does not exist."""
        reply = await self._read(pb.RangeRequest(key=key), timeout)
        return key_value(reply.kvs[0]) if reply.kvs else None

    async def several(
        self, keys: Sequence[bytes], *, timeout: float | None = None
    ) -> tuple[tuple[KeyValue | None, ...], int]:
        """Returns the keys, of which there may be at most 128, with their current values at one revision, and that
        revision (a linearizable read). In place of a key that does not exist, returns None."""
        request = pb.TxnRequest(success=[get_op(key) for key in keys])
        reply, _ = await self.connection.call("read", lambda m: m.kv.Txn, request, repeatable=True, timeout=timeout)
        found = [part.response_range.kvs for part in reply.responses]
        return tuple([key_value(kvs[0]) if kvs else None for kvs in found]), int(reply.header.revision)

    async def page(
        self,
        start: bytes,
        end: bytes,
        *,
        limit: int,
        revision: int = 0,
        created: int = 0,
        keys_only: bool = False,
        timeout: float | None = None,
    ) -> Page:
        """Reads the first `limit` keys of [start, end) at `revision` (0: now). `created` selects the keys that were
        created at that revision (0: all keys).

        Raises EtcdCompacted if `revision` is no longer kept, and EtcdError(TOO_LARGE) if the keys fill more than 16
        MiB."""
        request = pb.RangeRequest(
            key=start,
            range_end=end,
            limit=limit,
            revision=revision,
            keys_only=keys_only,
            min_create_revision=created,
            max_create_revision=created,
        )
        reply = await self._read(request, timeout)
        return Page(key_values(reply.kvs), revision or reply.header.revision, reply.more, reply.count)

    async def count(self, start: bytes, end: bytes, *, timeout: float | None = None) -> int:
        """Counts the keys in [start, end)."""
        reply = await self._read(pb.RangeRequest(key=start, range_end=end, count_only=True), timeout)
        return int(reply.count)

    async def pages(
        self, start: bytes, end: bytes, *, page_size: int = 1000, keys_only: bool = False, revision: int = 0
    ) -> AsyncIterator[Page]:
        """Yields the keys in [start, end) page by page, all at one `revision` (0: now). Pages get smaller if values are
        large. Each page has the timeout of the settings.

        Raises EtcdCompacted if the revision is compacted meanwhile. The pages already yielded stay valid for that
        revision."""
        while True:
            try:
                page = await self.page(start, end, limit=page_size, revision=revision, keys_only=keys_only)
            except EtcdError as error:
                if error.reason is Reason.TOO_LARGE and page_size > 1:
                    page_size = max(1, page_size // 4)
                    continue
                raise
            revision = page.revision
            yield page
            if not page.more or not page.kvs:
                return
            start = page.kvs[-1].key + b"\0"

    async def scan(
        self, prefix_or_range: bytes | tuple[bytes, bytes], *, page_size: int = 1000, keys_only: bool = False
    ) -> AsyncIterator[KeyValue]:
        """Yields every key with a prefix, or in a range, one by one. Reads them with `pages()`."""
        if isinstance(prefix_or_range, bytes):
            prefix_or_range = (prefix_or_range, after_prefix(prefix_or_range))
        start, end = prefix_or_range
        async for page in self.pages(start, end, page_size=page_size, keys_only=keys_only):
            for kv in page.kvs:
                yield kv

    async def put(self, key: bytes, value: bytes, *, lease: int = 0, timeout: float | None = None) -> int:
        """Writes the key, attached to a lease unless `lease` is 0. Returns the revision of the write."""
        request = pb.PutRequest(key=key, value=value, lease=lease)
        reply = await self._write("put", lambda m: m.kv.Put, request, timeout)
        return int(reply.header.revision)

    async def delete(self, key: bytes, *, timeout: float | None = None) -> bool:
        """Deletes the key. Returns False if the key did not exist."""
        request = pb.DeleteRangeRequest(key=key)
        reply = await self._write("delete", lambda m: m.kv.DeleteRange, request, timeout)
        return bool(reply.deleted)

    async def delete_range(self, start: bytes, end: bytes, *, timeout: float | None = None) -> int:
        """Deletes all keys in [start, end) in one transaction. Returns the number of deleted keys."""
        request = pb.DeleteRangeRequest(key=start, range_end=end)
        reply = await self._write("delete range", lambda m: m.kv.DeleteRange, request, timeout)
        return int(reply.deleted)

    async def txn(
        self,
        compares: Sequence[Compare],
        success: Sequence[Op],
        failure: Sequence[Op] = (),
        *,
        timeout: float | None = None,
    ) -> TxnResult:
        """Performs the operations `success` atomically if all compares hold, or else the operations `failure`.
        `mesh.etcd.txn` makes compares and operations."""
        request = pb.TxnRequest(compare=compares, success=success, failure=failure)
        reply = await self._write("transaction", lambda m: m.kv.Txn, request, timeout)
        return TxnResult(
            bool(reply.succeeded), tuple([_response(part) for part in reply.responses]), int(reply.header.revision)
        )

    async def update(
        self, key: bytes, change: Callable[[KeyValue | None], bytes | None], *, timeout: float | None = None
    ) -> Updated:
        """Replaces a value with the result of `change`, by compare-and-set. Tries again if another writer has changed
        the value meanwhile.

        `change` gets the current key, or None if the key does not exist, and returns the new value. If `change` returns
        None or an equal value, nothing is written. `change` is called again after each conflict, so its result must
        depend only on its argument. Its exceptions pass through.

        After a write whose outcome is unknown, the key is read again. If the key then has the written value, the write
        counts as done. Therefore, if several writers may write equal bytes and each write must count, make the values
        differ. If such a write succeeded, and another writer replaced its value before the next read, the change is
        made twice. All attempts together take at most `timeout` seconds (None: three times the timeout of the
        settings). EtcdUnavailable is ambiguous if the outcome of a write is still unknown.
        """
        loop = asyncio.get_running_loop()
        whole = _UPDATE_TIMEOUTS * self.settings.timeout if timeout is None else timeout
        deadline = loop.time() + whole
        unsettled: EtcdUnavailable | None = None
        tried: tuple[bytes, KeyValue | None] | None = (
            None  # the write of unknown outcome, and the key it was to replace
        )
        while True:
            budget = min(self.settings.timeout, deadline - loop.time())
            if budget <= 0:
                raise unsettled or EtcdUnavailable(
                    f"the key {key.decode(errors='replace')} was not updated within {whole:g} s"
                )
            try:
                before = await self.get(key, timeout=budget)
            except EtcdUnavailable as error:
                raise (unsettled or error) from error
            if tried is not None:
                value, base = tried
                if _revision(before) != _revision(base):
                    if before is not None and before.value == value:
                        return Updated(True, base, value, before.mod_revision)
                    unsettled = tried = None  # the key that it was to replace is gone, so it can no longer be done
            after = change(before)
            if before is None and after is None:
                return Updated(False, None, None, 0)
            if before is not None and (after is None or after == before.value):
                return Updated(False, before, before.value, before.mod_revision)
            assert after is not None
            budget = min(self.settings.timeout, max(deadline - loop.time(), 0.001))
            try:
                result = await self.txn([modified(key, _revision(before))], [put_op(key, after)], timeout=budget)
            except EtcdUnavailable as error:
                if not error.ambiguous:
                    raise (unsettled or error) from error
                # The same base may be tried again: at most one of two compare-and-sets on it succeeds.
                unsettled, tried = error, (after, before)
                continue
            if result.succeeded:
                return Updated(True, before, after, result.revision)

    async def status(self, *, timeout: float | None = None) -> Status:
        """Returns the status of the member in use."""
        reply, member = await self.connection.call(
            "status", lambda m: m.maintenance.Status, pb.StatusRequest(), repeatable=True, timeout=timeout
        )
        return Status(
            endpoint=member.endpoint,
            version=reply.version,
            revision=reply.header.revision,
            db_bytes=reply.dbSize,
            db_used_bytes=reply.dbSizeInUse,
            has_leader=bool(reply.leader),
            errors=tuple(reply.errors),
            cluster=reply.header.cluster_id,
            member=reply.header.member_id,
            learner=bool(reply.isLearner),
            quota_bytes=reply.dbSizeQuota,
        )

    async def members(self, *, timeout: float | None = None) -> tuple[EtcdMember, ...]:
        """Lists the members of the cluster, as the member in use knows them."""
        reply, _ = await self.connection.call(
            "members", lambda m: m.cluster.MemberList, pb.MemberListRequest(), repeatable=True, timeout=timeout
        )
        return tuple(EtcdMember(m.ID, m.name, tuple(m.clientURLs), bool(m.isLearner)) for m in reply.members)

    async def alarms(self, *, timeout: float | None = None) -> tuple[Alarm, ...]:
        """Lists the alarms of the cluster's members."""
        reply, _ = await self.connection.call(
            "alarms", lambda m: m.maintenance.Alarm, pb.AlarmRequest(), repeatable=True, timeout=timeout
        )
        names = {number: name for name, number in pb.AlarmType.items()}
        return tuple(Alarm(a.memberID, names.get(a.alarm, f"{a.alarm}")) for a in reply.alarms)

    async def database(self, *, idle: float) -> AsyncGenerator[tuple[bytes, int], None]:
        """Yields the database of the member in use in parts, each with the number of bytes still to come. The last 32
        bytes are the SHA-256 of all bytes before. Raises EtcdUnavailable if nothing arrives for `idle` seconds."""
        parts = self.connection.receive("snapshot", lambda m: m.maintenance.Snapshot, pb.SnapshotRequest(), idle=idle)
        async with aclosing(parts):
            async for part in parts:
                yield part.blob, part.remaining_bytes

    async def compact(self, revision: int, *, physical: bool = False, timeout: float | None = None) -> None:
        """Compacts the history before `revision`. With `physical`, waits until it is removed from the disk."""
        request = pb.CompactionRequest(revision=revision, physical=physical)
        await self._write("compact", lambda m: m.kv.Compact, request, timeout)

    async def _read(self, request: pb.RangeRequest, timeout: float | None) -> Any:
        reply, _ = await self.connection.call("read", lambda m: m.kv.Range, request, repeatable=True, timeout=timeout)
        return reply

    async def _write(self, what: str, method: Callable[[Any], Any], request: Any, timeout: float | None) -> Any:
        reply, _ = await self.connection.call(what, method, request, repeatable=False, timeout=timeout)
        return reply


def _revision(kv: KeyValue | None) -> int:
    return 0 if kv is None else kv.mod_revision


def _response(part: pb.ResponseOp) -> tuple[KeyValue, ...] | int | None:
    match part.WhichOneof("response"):
        case "response_range":
            found = part.response_range
            return key_values(found.kvs) if found.kvs or not found.count else int(found.count)
        case "response_delete_range":
            return int(part.response_delete_range.deleted)
        case _:
            return None
