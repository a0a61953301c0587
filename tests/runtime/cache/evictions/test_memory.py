"""Evictions and refused loads when the memory of the server or of its device runs short."""

from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest

from mesh.runtime.cache.books.entries import CacheEntry, EntryState
from mesh.runtime.cache.evictions.memory import MemoryWatch
from placement.footprint import Footprint
from tests.runtime.pod_of_fakes import FakePod


@pytest.fixture
async def pod() -> AsyncIterator[FakePod]:
    async with FakePod() as running:
        yield running


async def test_memory_above_the_limits(pod: FakePod) -> None:
    """Above 90 % of the limit, the oldest idle copies are evicted, as many as should bring the memory below it. Above
    95 %, loads are refused too, until the memory in use falls again."""
    await pod.fill("a", "b", "c", "d", size=100_000)
    pod.busy("a")
    resident, evicted = 0, []

    def evict(entry: CacheEntry, why: str) -> None:
        evicted.append(entry.model_id)
        pod.ledger.enter(entry, EntryState.UNLOADING)

    watch = MemoryWatch(pod.ledger, limit_bytes=1_000_000, used=lambda: resident, eviction=SimpleNamespace(evict=evict))
    resident = 900_000
    watch.look()
    assert (evicted, watch.refusal) == ([], "")
    resident = 949_000
    watch.look()
    assert (evicted, watch.refusal) == (["b"], "")
    watch.look()  # b is still being unloaded
    assert evicted == ["b"]
    pod.ledger.remove(pod.entry("b"))
    resident = 1_050_000
    watch.look()
    assert evicted == ["b", "c", "d"]
    assert "95%" in watch.refusal
    resident = 500_000
    watch.look()
    assert watch.refusal == ""


async def test_one_figure_of_a_device_evicts_once(pod: FakePod) -> None:
    """A device's figure is up to a second old and may not show the freed memory yet, so the check right after an
    eviction evicts nothing."""
    pod.ledger.equip(1 << 30)
    pod.server.on_device = True
    await pod.fill("a", "b", "c", "d", size=100_000)
    taken, evicted = 960_000, []

    def evict(entry: CacheEntry, why: str) -> None:
        evicted.append(entry.model_id)
        pod.ledger.enter(entry, EntryState.UNLOADING)
        pod.ledger.remove(entry)  # the server has freed the memory, which the device's figure does not show yet

    watch = MemoryWatch(
        pod.ledger, limit_bytes=1_000_000, used=lambda: taken, eviction=SimpleNamespace(evict=evict), device=True
    )
    watch.look()
    watch.look()
    assert evicted == ["a"]
    watch.look()  # the next figure still shows no freed memory
    assert evicted == ["a", "b"]
    taken = 985_000
    watch.look()
    assert "98%" in watch.refusal, "the refusal does not wait for another figure"
    watch.look()
    assert evicted == ["a", "b", "c"]
    taken = 940_000
    watch.look()
    watch.look()
    assert (evicted, watch.refusal) == (["a", "b", "c"], "")


async def test_what_is_yet_to_come_is_not_what_goes(pod: FakePod) -> None:
    """Memory reserved for loads under way causes no further evictions."""
    await pod.fill("a", "b", "c", size=100_000)
    pod.ledger.weigh(pod.ledger.add("waiting", 1), Footprint(600_000))
    evicted: list[str] = []
    eviction = SimpleNamespace(evict=lambda entry, why: evicted.append(entry.model_id))
    watch = MemoryWatch(pod.ledger, limit_bytes=1_000_000, used=lambda: 950_000, eviction=eviction)
    watch.look()
    assert evicted == ["a"]
