"""Evictions: how they are carried out, counted and explained."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from mesh.runtime.cache.books.entries import EntryState
from placement.room import RoomDecision, RoomVerdict
from tests.runtime.pod_of_fakes import FakePod


@pytest.fixture
async def pod() -> AsyncIterator[FakePod]:
    async with FakePod() as running:
        yield running


def evicting(*victims: str) -> RoomDecision:
    return RoomDecision(RoomVerdict.EVICT, victims, "evicts some, the last used 5 s ago")


async def test_victims_make_way_and_the_reason_is_kept(pod: FakePod) -> None:
    """Evictions are counted, and the eviction of a copy in use adds to the demand."""
    await pod.fill("a", "b", size=400_000)
    pod.called("a")
    pod.cache.eviction.make_way(evicting("a"), "m")
    assert pod.entry("a").state is EntryState.UNLOADING
    await pod.nothing_left("a")
    assert pod.resident == {"b"}
    assert pod.meters.evictions.value == 1
    (told,) = [json.loads(line) for line in pod.decisions.lines("m")]
    assert (told["what"], told["models"], told["why"]) == ("evict", ["a", "m"], evicting("a").why)
    assert pod.cache.demand.working_set().host_bytes >= 400_000


async def test_what_is_no_copy_any_more_is_passed_over(pod: FakePod) -> None:
    """A victim that has been removed for another reason since the decision is skipped."""
    await pod.fill("a", size=400_000)
    held = pod.server.hold("unload", "a")
    withdrawal = asyncio.create_task(pod.loads.withdraw("a", 1, "unregistered"))
    await pod.asked("unload", "a")
    pod.cache.eviction.make_way(evicting("a", "never here"), "m")
    held.set()
    assert await withdrawal
    await pod.nothing_left("a")
    assert pod.meters.evictions.value == 0
    assert not list(pod.decisions.lines("m"))


async def test_victims_are_gone_once_their_files_are(pod: FakePod) -> None:
    await pod.fill("a", size=400_000)
    held = pod.server.hold("unload", "a")
    pod.cache.eviction.make_way(evicting("a"), "m")
    gone = asyncio.create_task(pod.cache.eviction.gone(evicting("a")))
    await pod.asked("unload", "a")
    assert not gone.done()
    held.set()
    await gone
    assert "a" not in pod.files.present
