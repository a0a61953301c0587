"""A watch of etcd, on a stream of its own, which begins after a given revision and delivers whole revisions.

Each watch has its own stream. On a shared stream, etcd answers requests for watches in order, so that after a cancelled
request the answers would no longer match the requests. Separate streams are affordable: 500 take 26 MB of etcd's
memory. `Mirror` opens another watch after a failure.
"""

from collections.abc import Iterable
from typing import Any

from mesh.etcd.connection import Connection
from mesh.etcd.errors import EtcdCompacted, EtcdDenied, EtcdUnavailable, says_stale_token
from mesh.etcd.records import ChangeKind, Delta, Event, key_value
from mesh.etcd.stream import Stream
from mesh.pb import etcd_pb2 as pb


class Revisions:
    """A buffer that joins events into whole revisions.

    etcd sends a revision in one response, but may split a large response into fragments at any event. All fragments but
    the last are marked. Whole revisions are returned immediately. The last revision of a fragment is held back until
    the next fragment.
    """

    def __init__(self) -> None:
        self._held: list[Event] = []

    @property
    def holding(self) -> bool:
        """True if a revision has begun and is not complete."""
        return bool(self._held)

    def add(self, events: Iterable[pb.Event], fragment: bool) -> list[Delta]:
        """Adds events, and returns the revisions that are now complete. `fragment` is True if more of the same response
        follows."""
        deltas: list[Delta] = []
        current = self._held
        revision = current[0].kv.mod_revision if current else 0
        for event in events:
            kv = key_value(event.kv)
            if kv.mod_revision != revision and current:
                deltas.append(Delta(revision, tuple(current)))
                current = []
            revision = kv.mod_revision
            current.append(Event(_KINDS[event.type], kv))
        if current and not fragment:
            deltas.append(Delta(revision, tuple(current)))
            current = []
        self._held = current
        return deltas


_KINDS = (ChangeKind.PUT, ChangeKind.DELETE)  # by etcd's numbers


class Watch:
    """An open watch, made by `Watch.open()`."""

    def __init__(self, stream: Stream, header: pb.ResponseHeader, revision: int) -> None:
        self.revision = revision  # no more changes up to it will come
        self.member_revision: int = header.revision  # the member's own, when the watch was opened
        self.cluster_id: int = header.cluster_id
        self._stream = stream
        self._revisions = Revisions()

    @classmethod
    async def open(cls, connection: Connection, start: bytes, end: bytes, revision: int) -> "Watch":
        """Watches [start, end) for the changes after `revision`.

        Raises EtcdError. EtcdCompacted may be raised only later, by `read`."""
        request = pb.WatchRequest(
            create_request=pb.WatchCreateRequest(
                key=start, range_end=end, start_revision=revision + 1, progress_notify=True, fragment=True
            )
        )
        retried = False
        while True:
            stream = await connection.open("watch", lambda m: m.watch.Watch, request, connection.settings.timeout)
            try:
                created = await stream.read(connection.settings.timeout)
                check(created)
                if not created.created:
                    raise EtcdUnavailable("etcd answered a request for a watch with another message")
                return cls(stream, created.header, revision)
            except EtcdDenied:
                stream.cancel()
                # For an expired token, etcd 3.5.1 says "permission denied" too; 3.6 names it.
                if retried or not connection.forget_token(stream.token):
                    raise
                retried = True
            except BaseException:
                stream.cancel()
                raise

    async def read(self) -> list[Delta]:
        """Returns the next complete revisions; the list may be empty. After an EtcdError, the watch has ended."""
        response = await self._stream.read()
        check(response)
        deltas = self._revisions.add(response.events, response.fragment)
        if not response.events and not self._revisions.holding:
            # Progress: nothing more will come up to there. Without it, a quiet range would eventually resume at a
            # compacted revision, and be read again for nothing.
            self.revision = max(self.revision, response.header.revision)
        return deltas

    def cancel(self) -> None:
        """Ends the stream."""
        self._stream.cancel()


def check(response: Any) -> None:
    """Raises the error that a response reports, if any. (etcd cancels a watch by a response, and leaves the stream
    open.)"""
    if not response.canceled:
        return
    if response.compact_revision:
        raise EtcdCompacted(response.compact_revision)
    reason = response.cancel_reason or "no reason given"
    if "permission denied" in reason or says_stale_token(reason):
        raise EtcdDenied(f"watch: {reason}")
    raise EtcdUnavailable(f"etcd cancelled the watch: {reason}")
