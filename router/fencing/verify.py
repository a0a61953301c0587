"""The comparison of a copy with its model's record, for pods that cannot prove themselves that they may answer.

A pod that has lost its connection to etcd, or has just found it again, answers a call only if the router states that
the model's record is unchanged, or that the router could not read the record (`placement.fence`). The router also
verifies a copy before the first attempt if its pod has disappeared from etcd without notice, or if servers have died in
calls of the model.

All calls of a model share a read, and a read that began less than a second ago is recent enough. This is safe because
registering an id again waits for the pods that may still answer from its old registration. A single background probe
finds out whether etcd is available again, so that calls do not have to wait for etcd one by one. The age of the
router's own view does not matter.
"""

import asyncio
from collections.abc import Awaitable, Callable

from mesh.etcd import EtcdError
from mesh.process.tasks import Tasks
from mesh.schema.records import CopyRecord
from mesh.statuses import MeshError, Reason
from mesh.telemetry import logs
from mesh.wire import headers
from mesh.wire.call import Header
from router.state.pods import Copy
from router.state.registry import Registration, Registry
from router.state.view import View

log = logs.get(__name__)

FRESH = 1.0
"""Seconds for which a read of the record counts as recent."""

PATIENCE = 5.0
"""Seconds for which reads of the record are repeated, for a pod that reaches etcd while this router does not: when etcd
becomes available again, not all processes notice this at the same moment."""

_PROBE = 0.5  # seconds between two probes of an unavailable etcd
_AGAIN = 0.1  # seconds between two reads

Said = tuple[Header, ...]
"""A call's statement about its model's record: headers that are sent with the call."""

NOTHING: Said = ()
VERIFIED: Said = ((headers.VERIFIED, b"1"),)
AWAY: Said = ((headers.ETCD_AWAY, b"1"),)


class Verifier:
    """The verifier of one worker. `reach` sends etcd any request and raises EtcdError if it does not answer."""

    def __init__(
        self, registry: Registry, view: View, *, timeout: float, reach: Callable[[float], Awaitable[object]]
    ) -> None:
        """Makes a verifier. `timeout` bounds one read, in seconds. `reach` takes a timeout in seconds."""
        self._registry = registry
        self._view = view
        self._timeout = timeout
        self._reach = reach
        self._away = False
        self._tasks = Tasks()
        self._loop = asyncio.get_running_loop()

    @property
    def away(self) -> bool:
        """True while etcd is unavailable to this router."""
        return self._away

    def known(self, copy: Copy) -> Said:
        """Returns what a call to the copy may state about the record without reading it, or NOTHING if the record must
        be read."""
        if self._away:
            return AWAY
        return VERIFIED if self._loop.time() - copy.verified_at < FRESH else NOTHING

    async def verify(self, copy: Copy, *, insist: bool = False) -> Said:
        """Reads the model's record. Returns VERIFIED if the copy belongs to it, and AWAY if etcd is unavailable. If the
        registration is deleted or another one, or a reload has replaced the copy's content, removes the copy from the
        view and returns NOTHING.

        With `insist`, keeps trying for PATIENCE seconds while etcd is unavailable, because the pod demands a verified
        call. Raises MeshError: QUARANTINED, INTERNAL for a record that cannot be decoded, and with `insist`
        REGISTRY_AWAY.
        """
        deadline = self._loop.time() + PATIENCE
        while insist or not self._away:
            began = self._loop.time()
            try:
                async with asyncio.timeout(self._timeout):
                    registration = await self._registry.read(copy.model, fresh=True)
            except (TimeoutError, MeshError) as error:
                if isinstance(error, MeshError) and error.reason is not Reason.REGISTRY_AWAY:
                    raise
                self._lost()
                if not insist:
                    break
                if self._loop.time() > deadline:
                    text = f"{copy.pod.name} may answer for {copy.model} only after this router has read its record"
                    why = f"{text}, and etcd does not answer: try again"
                    raise MeshError(Reason.REGISTRY_AWAY, why, retry_after=1.0) from error
                await asyncio.sleep(_AGAIN)
                continue
            self._away = False
            if registration is not None and registration.record.quarantined:
                raise MeshError(Reason.QUARANTINED, registration.record.quarantine(copy.model))
            if registration is None or not _current(copy.record, registration):
                self._view.drop(copy)
                return NOTHING
            copy.verified_at = began
            return VERIFIED
        return AWAY

    async def close(self) -> None:
        """Ends the probe."""
        await self._tasks.close()

    def _lost(self) -> None:
        if not self._away:
            self._away = True
            log.warning("etcd is unavailable: copies are called unverified if their pods allow it")
            self._tasks.start(self._probe(), "probe etcd")

    async def _probe(self) -> None:
        try:
            while self._away:
                try:
                    await self._reach(1.0)
                except EtcdError:
                    await asyncio.sleep(_PROBE)
                    continue
                self._away = False
        finally:
            self._away = False  # a probe that fails in another way proves nothing: the next verification finds out
        log.info("etcd is available again: copies are verified if their pods demand it")


def _current(copy: CopyRecord, registration: Registration) -> bool:
    """Returns whether the copy belongs to that registration, and its content is not known to be replaced. The record of
    a reloaded model names a digest once some pod has loaded the new content."""
    record = registration.record
    if registration.created != copy.create_revision:
        return False
    return copy.generation >= record.generation or not record.digest
