"""Loads that are requested by management, not by a call. `router.loads` carries them out."""

from collections.abc import Callable
from dataclasses import replace

from mesh.schema.modelstatus import ModelStatus
from mesh.schema.records import ModelRecord
from mesh.statuses import MeshError, Reason
from router.loads.coldstart import ColdStart
from router.management.requests import HOUR_MS, Load, check_id
from router.management.status import Reporter, StatusInfo
from router.state.registry import Registration, Registry
from router.state.view import View

# Faults of a model or its pod, as opposed to faults of this router or of the request.
_LOAD_ERRORS = (
    Reason.LOAD_FAILED,
    Reason.NOT_FETCHED,
    Reason.CONTENT_CHANGED,
    Reason.NOWHERE,
    Reason.NO_ROOM,
    Reason.QUARANTINED,
    Reason.UNAVAILABLE,
)


class Loading:
    """The requested loads of one worker. `wall` returns milliseconds since the epoch."""

    def __init__(
        self, *, registry: Registry, view: View, coldstart: ColdStart, status: Reporter, wall: Callable[[], int]
    ) -> None:
        self._registry = registry
        self._view = view
        self._coldstart = coldstart
        self._status = status
        self._wall = wall

    async def ensure(self, request: Load) -> StatusInfo:
        """Loads a model unless it has a copy, and returns its status. If the request is `sync`, waits until the load
        has ended. The error of a failed load is in the status.

        Raises MeshError: BAD_REQUEST, UNKNOWN_MODEL, REGISTRY_AWAY, OVERLOADED.
        """
        check_id(request.model_id)
        now = self._wall()
        used = min(request.last_used_ms, now) if request.last_used_ms > 0 else now
        registration = await self._registry.read(request.model_id, fresh=True)
        if registration is None:
            raise MeshError(Reason.UNKNOWN_MODEL, "model not found")
        await self.touch(registration, used)
        idle_ms = max(0, now - max(used, registration.record.last_used_ms))
        return await self.load(request.model_id, idle_ms=idle_ms, sync=request.sync)

    async def load(self, model_id: str, *, idle_ms: int, sync: bool) -> StatusInfo:
        """Does the same as `ensure` for a model that is known to be registered. `idle_ms` is the time since its last
        use."""
        failure: MeshError | None = None
        if model_id not in self._view.copies:
            try:
                if sync:
                    await self._coldstart.load(model_id, idle_ms=idle_ms)
                else:
                    await self._coldstart.begin(model_id, idle_ms=idle_ms)
            except MeshError as error:
                if error.reason not in (*_LOAD_ERRORS, Reason.NOT_IN_TIME):
                    raise
                failure = error
        status = await self._status.of(model_id)
        if failure is None or status.status is ModelStatus.LOADED:
            return status
        if failure.reason is Reason.NOT_IN_TIME:
            return replace(status, status=ModelStatus.LOADING)
        known = any(failure.text.startswith(text) for text in status.errors)  # without its hint
        errors = status.errors if known else (failure.text, *status.errors)
        return replace(status, status=ModelStatus.LOADING_FAILED, errors=errors)

    async def touch(self, registration: Registration, last_used_ms: int) -> None:
        """Updates the recorded time of last use, in ms since the epoch, if it is more than an hour behind. Raises
        MeshError."""
        if last_used_ms - registration.record.last_used_ms <= HOUR_MS:
            return

        def raised(record: ModelRecord) -> ModelRecord | None:
            newer = last_used_ms - record.last_used_ms > HOUR_MS
            return replace(record, last_used_ms=last_used_ms) if newer else None

        await self._registry.change(registration.model_id, raised)
