"""A range that the pod keeps for its workers: the content, the latest changes, and the position of each worker.

Changes are encoded once, and each is linked to the next. A worker's `Cursor` refers to the last change that was sent to
the worker, so changes that no worker waits for are garbage-collected. If the change after a worker's last one is not
kept, or too many bytes wait for the worker, it gets the complete range instead. A worker that does not read thus needs
a bounded amount of memory, and does not delay others.

This module does no I/O. `server` takes from cursors as much as the connection can carry.
"""

import secrets
from collections.abc import Iterable, Iterator

from mesh.etcd import Change, ChangeKind, Snapshot
from router.state.feed.messages import encode, pack
from router.state.feed.ranges import Item

MAX_BEHIND = 64 << 20
"""Bytes of changes waiting for one worker beyond which it gets the complete range instead."""

KEPT = 1 << 20
"""Bytes of changes that are kept for a worker that may reconnect."""

PORTION = 500
"""Maximum number of items in one message."""

PORTION_BYTES = 1 << 20
"""Bytes of keys and values beyond which a message is full. As JSON they may be six times as many, which is below
`messages.MAX_MESSAGE` even with the largest value that etcd accepts."""


def items_of(change: Change) -> list[Item]:
    """Returns the keys and values of a change in the form that readers take."""
    if isinstance(change, Snapshot):
        return [(kv.key, kv.value) for kv in change.kvs]
    return [(event.kv.key, event.kv.value if event.kind is ChangeKind.PUT else None) for event in change.events]


class _Change:
    """One revision's changes, and the link to the next ones."""

    __slots__ = ("data", "next", "revision", "total")

    def __init__(self, revision: int, total: int, data: bytes = b"") -> None:
        self.revision = revision
        self.total = total  # bytes of changes in the epoch up to this one
        self.data = data
        self.next: _Change | None = None


class RangeLog:
    """The log of one range: its content, its latest changes, and the cursors of the workers that read it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.epoch = ""  # "": not read from etcd yet
        self._items: dict[bytes, bytes] = {}
        self._first = self._last = _Change(0, 0)  # of the changes kept
        self._cursors: set[Cursor] = set()

    @property
    def revision(self) -> int:
        """The revision of the content, or 0 if nothing was read yet."""
        return self._last.revision

    def apply(self, change: Change) -> None:
        """Adds a change from etcd, which cursors then return. The caller wakes the code that sends to workers."""
        items = items_of(change)
        if isinstance(change, Snapshot):
            self.epoch = secrets.token_hex(8)
            self._items = {kv.key: kv.value for kv in change.kvs}
            self._first = self._last = _Change(change.revision, 0)
            for cursor in self._cursors:
                cursor.begin()
            return
        for key, value in items:
            if value is None:
                self._items.pop(key, None)
            else:
                self._items[key] = value
        data = encode(["delta", self.name, change.revision, pack(items)])
        if len(data) > PORTION_BYTES:  # rare: for example when the lease of a pod with very many copies ends
            *first, rest = _portions(items)
            data = b"".join(encode(["items", self.name, pack(portion)]) for portion in first)
            data += encode(["delta", self.name, change.revision, pack(rest)])
        last = _Change(change.revision, self._last.total + len(data), data)
        self._last.next = last
        self._last = last
        while self._first.next is not None and last.total - self._first.total > KEPT:
            self._first = self._first.next
        for cursor in self._cursors:
            if cursor.behind > MAX_BEHIND:
                cursor.begin()

    def cursor(self, epoch: str, revision: int) -> "Cursor":
        """Returns a cursor for a worker that has read up to `revision` of `epoch`. The epoch is "" if it has read
        nothing. The caller must `close` the cursor."""
        cursor = Cursor(self, self._after(epoch, revision))
        self._cursors.add(cursor)
        return cursor

    def _after(self, epoch: str, revision: int) -> _Change | None:
        """Returns the last change that a worker has read, or None if not all later changes are kept."""
        if not self.epoch or epoch != self.epoch or not self._first.revision <= revision <= self._last.revision:
            return None
        change = self._first
        while change.next is not None and change.next.revision <= revision:
            change = change.next
        return change

    def _everything(self) -> Iterator[bytes]:
        """Yields the complete range as messages, one at a time, because it may be too large to buffer."""
        items, epoch, revision = list(self._items.items()), self.epoch, self.revision
        yield encode(["begin", self.name])
        for portion in _portions(items):
            yield encode(["items", self.name, pack(portion)])
        yield encode(["snapshot", self.name, epoch, revision])


def _portions(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Splits items into parts that each fit into a message. Yields nothing if there are no items."""
    portion: list[Item] = []
    size = 0
    for key, value in items:
        portion.append((key, value))
        size += len(key) + len(value or b"")
        if len(portion) == PORTION or size > PORTION_BYTES:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


class Cursor:
    """The position of one worker in a range."""

    __slots__ = ("_all", "_have", "_log")

    def __init__(self, log: RangeLog, have: _Change | None) -> None:
        self._log = log
        self._have = have  # the last change sent, alone or within the whole range; None: begin again
        self._all: Iterator[bytes] | None = None  # the rest of the whole range

    @property
    def behind(self) -> int:
        """The bytes of changes that were not sent to the worker yet."""
        return 0 if self._have is None else self._log._last.total - self._have.total

    def begin(self) -> None:
        """Makes `take` return the complete range next, no matter what it has returned so far."""
        self._have = self._all = None

    def take(self) -> bytes | None:
        """Returns the next message, or None if no message is ready."""
        if self._have is None:
            if not self._log.epoch:
                return None
            self._have, self._all = self._log._last, self._log._everything()
        if self._all is not None:
            message = next(self._all, None)
            if message is not None:
                return message
            self._all = None
        if self._have.next is None:
            return None
        self._have = self._have.next
        return self._have.data

    def close(self) -> None:
        """Removes the cursor from its log."""
        self._log._cursors.discard(self)
        self.begin()
