"""Requests to management, made from plain arguments."""

from collections.abc import Callable, Sequence

from placement.copies import UNLIMITED, CopyLimits
from router.management.creation import Fate
from router.management.handlers import Management
from router.management.requests import Item, Load, Register
from router.management.status import StatusInfo


class Asked:
    def __init__(self, management: Management) -> None:
        self.handlers = management
        self.explain = management.inspection.explain
        self.page = management.status.page
        self.errors = management.status.errors
        self.status = management.status.of
        self.unregister = management.registration.unregister
        self.unregister_many = management.registration.unregister_many
        self.release = management.registration.release
        self.reload = management.registration.reload

    async def register(
        self,
        model_id: str,
        type: str,
        path: str = "",
        key: str = "",
        *,
        sha256: str = "",
        limits: CopyLimits = UNLIMITED,
        load_now: bool = False,
        sync: bool = False,
        last_used_ms: int = 0,
    ) -> StatusInfo:
        item = Item(model_id, type, path, key, sha256, limits)
        return await self.handlers.registration.register(Register(item, load_now, sync, last_used_ms))

    async def register_many(self, items: Sequence[Item]) -> list[Fate]:
        return await self.handlers.registration.register_many(items)

    async def ensure_loaded(self, model_id: str, *, sync: bool = False, last_used_ms: int = 0) -> StatusInfo:
        return await self.handlers.loading.ensure(Load(model_id, sync, last_used_ms))

    async def set_limits(self, model_id: str, change: Callable[[CopyLimits], CopyLimits]) -> StatusInfo:
        return await self.handlers.registration.set_limits(model_id, change)
