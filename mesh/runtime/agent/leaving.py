"""The orderly departure of a pod from the mesh.

The pod first announces its departure, and its copies are loaded in other pods. Then the fence is closed, the copies'
keys are deleted, and calls in flight get time to end. The pod stops answering before it deletes keys, so a copy without
a key never answers. A router with an outdated view gets *not here*, and calls another pod.
"""

import asyncio
import contextlib
import time

from mesh.etcd import Etcd, EtcdError
from mesh.etcd.ranges import after_prefix
from mesh.runtime.cache.assembly import Cache
from mesh.runtime.cache.books.entries import EntryState
from mesh.runtime.presence.fence import Fence
from mesh.runtime.presence.publishing import Presence
from mesh.runtime.sharedmemory.board import Board
from mesh.schema.keys import Keys
from mesh.schema.records import READY, PodRecord
from mesh.telemetry import logs

log = logs.get(__name__)

_QUIET = 0.1  # seconds between two looks at the calls in flight while draining
_LOOK_AGAIN = 1.0  # seconds between two checks that another pod can take the copies
_ASK = 2.0  # seconds for etcd to answer a leaving pod
_KEYS_WAIT = 2.0  # seconds for a leaving pod's keys to be deleted
_WHY = "this pod is leaving"
_HAND_OVER_SHARE = 0.8  # share of the time to leave in which copies are loaded elsewhere


class Leaving:
    """The departure of one pod."""

    def __init__(
        self, etcd: Etcd, keys: Keys, cache: Cache, presence: Presence, fence: Fence, board: Board, *, incarnation: str
    ) -> None:
        self._etcd = etcd
        self._keys = keys
        self._cache = cache
        self._presence = presence
        self._fence = fence
        self._board = board
        self._incarnation = incarnation

    async def leave(self, timeout: float) -> None:
        """Leaves the mesh, in about `timeout` seconds at most. The pod's state must already be `leaving`."""
        end = time.monotonic() + timeout
        log.info("leaving", copies=self._copies, calls=self._board.in_flight)
        self._cache.loads.close(_WHY)
        self._presence.changed()
        await self._hand_over(end)
        await self._cache.loads.settle(max(0.0, end - time.monotonic()))
        await self.fall_silent(max(0.0, end - time.monotonic()))
        quiet = 0
        while quiet < 2 and time.monotonic() < end:
            quiet = 0 if self._board.in_flight else quiet + 1
            await asyncio.sleep(_QUIET)

    async def fall_silent(self, patience: float) -> None:
        """Refuses loads, closes the fence, and has the copies' keys deleted, so that other pods may load these models.
        Waits for the deletion for at most `patience` seconds, and never longer than 2 s."""
        self._cache.loads.close(_WHY)
        self._fence.close()
        held = [entry.model_id for entry in self._cache.ledger.entries.values() if entry.state is EntryState.LOADED]
        for model_id in held:
            self._presence.drop(model_id)
        if not self._presence.published:
            return  # they were deleted with the lease
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(_KEYS_WAIT, patience)):
                for model_id in held:
                    await self._presence.settled(model_id, _KEYS_WAIT)

    @property
    def _copies(self) -> int:
        return self._cache.ledger.count(EntryState.LOADED)

    async def _hand_over(self, end: float) -> None:
        """Waits while the leader has this pod's copies loaded in other pods and then unloaded here, one by one. A copy
        answers calls until it is unloaded. Does not wait if no other pod accepts loads, and always leaves some time for
        calls in flight."""
        copies = self._copies
        if not copies or not await self._successors():
            return
        limit = time.monotonic() + _HAND_OVER_SHARE * max(0.0, end - time.monotonic())
        left, looked = copies, time.monotonic()
        while left and time.monotonic() < limit:
            await asyncio.sleep(_QUIET)
            left = self._copies
            if time.monotonic() - looked > _LOOK_AGAIN:
                looked = time.monotonic()
                if not await self._successors():  # the other pods leave too, as when the whole mesh is stopped
                    break
        log.info("handed over", copies=copies - left, left=left)

    async def _successors(self) -> bool:
        """Returns whether the mesh has a leader, and another pod that accepts loads."""
        try:
            if await self._etcd.get(self._keys.leader, timeout=_ASK) is None:
                return False
            page = await self._etcd.page(self._keys.pods, after_prefix(self._keys.pods), limit=1000, timeout=_ASK)
        except EtcdError as error:
            log.info("handover skipped: etcd is unavailable", error=error.detail)
            return False
        for kv in page.kvs:
            try:
                record = PodRecord.decode(kv.value)
            except ValueError:
                continue
            if record.incarnation != self._incarnation and record.state == READY:
                return True
        return False
