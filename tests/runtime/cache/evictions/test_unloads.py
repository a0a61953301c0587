"""Unloads that hang or fail."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from mesh.runtime.cache.books.entries import EntryState
from mesh.runtime.cache.evictions import unloads
from mesh.runtime.sharedmemory.slot import SlotState as SlotState
from mesh.runtime.sharedmemory.slot import Use
from placement.footprint import Footprint
from placement.room import RoomVerdict
from tests.runtime.pod_of_fakes import FakePod
from tests.support.waiting import until


@pytest.fixture
async def pod() -> AsyncIterator[FakePod]:
    async with FakePod() as running:
        yield running


async def test_a_copy_that_cannot_be_freed_stays_on_the_books(pod: FakePod, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy whose call never ends is no longer called, but keeps its memory in the ledger until the board shows that
    it is gone."""
    monkeypatch.setattr(unloads, "_RETRY", 0.01)
    await pod.fill("stuck", size=600_000)
    slot = pod.entry("stuck").slot
    assert slot is not None
    pod.board.uses[slot] = Use(SlotState.UNLOADING, 1, 1, 1, 0, 0, 0, 0)
    assert await pod.loads.withdraw("stuck", 0, "test")
    assert "stuck" not in pod.keys.keys
    await until(lambda: pod.unloaded().count("stuck") >= 2, why="the unload is tried again")
    assert pod.ledger.physical.host_bytes == 600_000
    assert pod.victims.room_for(Footprint(500_000)).verdict is RoomVerdict.FITS
    waiting = asyncio.create_task(pod.load("next", 500_000))
    await until(lambda: pod.ledger.count(EntryState.WAITING), why="waits for the space")
    del pod.board.uses[slot]
    await waiting
    await pod.nothing_left("stuck")
    assert pod.resident == {"next"}


async def test_unload_errors_are_tried_again(pod: FakePod, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unloads, "_RETRY", 0.01)
    await pod.fill("m", size=10)
    answer = type(pod.server).unloadModel
    failures = 2

    async def unload(self: object, request: object, context: grpc.aio.ServicerContext) -> object:
        nonlocal failures
        if failures:
            failures -= 1
            await context.abort(grpc.StatusCode.INTERNAL, "not now")
        return await answer(pod.server, request, context)

    monkeypatch.setattr(type(pod.server), "unloadModel", unload)
    assert pod.server.server is not None
    await pod.server.server.stop(None)
    await pod.server.__aenter__()
    assert await pod.loads.withdraw("m", 0, "test")
    await pod.nothing_left("m")
    assert failures == 0
