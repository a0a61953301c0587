"""The conditions for every load in this pod: the pod is published in etcd, its server is up, and memory is free."""

from collections.abc import Sequence

from mesh.runtime.cache.evictions.memory import MemoryWatch
from mesh.runtime.cache.loads.outcomes import Refused
from mesh.runtime.presence.publishing import Presence
from mesh.runtime.servers.relief import Relief
from mesh.runtime.servers.serverprocess import ServerProcess
from mesh.statuses import Reason


class Gate:
    """The check of the conditions, at each request for a load, and before each step that takes a resource."""

    def __init__(
        self, presence: Presence, server: ServerProcess, relief: Relief, watches: Sequence[MemoryWatch]
    ) -> None:
        self._presence = presence
        self._server = server
        self._relief = relief
        self._watches = watches

    def why_refused(self) -> Refused | None:
        """Returns a refusal if loads are refused now, or None if they are accepted."""
        if not self._presence.published:
            if not (away := self._presence.away):
                return Refused(Reason.REGISTRY_AWAY, "this pod is being published in etcd: try again")
            return Refused(Reason.REGISTRY_AWAY, f"this pod is not published in etcd: {away}")
        if not self._server.serves:
            why = self._server.why_down or "the model server is not ready"
            return Refused(Reason.UNAVAILABLE, f"{why}; this pod waits for it to start again")
        if self._relief.refusal:
            return Refused(Reason.UNAVAILABLE, self._relief.refusal)
        for watch in self._watches:
            if watch.refusal:
                return Refused(Reason.NO_ROOM, watch.refusal)
        return None

    def why_full(self) -> Refused | None:
        """Returns a refusal if the model server may not begin a load at this moment for lack of memory, or None."""
        for watch in self._watches:
            if full := watch.full():
                return Refused(Reason.NO_ROOM, full)
        return None
