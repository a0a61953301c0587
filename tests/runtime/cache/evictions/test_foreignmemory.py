"""The watch over a foreign server's memory: the observed memory decides about evictions, as long as they help."""

from types import SimpleNamespace

import pytest

from mesh.runtime.cache.books.entries import CacheEntry, EntryState
from mesh.runtime.cache.evictions.foreignmemory import ForeignMemoryWatch
from tests.runtime.cache.books.test_account import MIB, Pod


class Watched(Pod):
    """A pod of eight copies. Each unload frees `frees` bytes in its server."""

    def __init__(self, *, frees: int, size: int = 100 * MIB) -> None:
        super().__init__()
        self.frees = frees
        self.evicted: list[str] = []
        self.later_ns = 0
        self.ledger._clock = lambda: self.later_ns
        self.watch = ForeignMemoryWatch(self.ledger, SimpleNamespace(evict=self._evict), self.account)
        self._size = size

    async def fill(self) -> None:
        await self.account.prepare()
        for number in range(8):
            self.later_ns += 1_000_000_000
            self.add(f"m{number}", self._size)

    def looks(self, times: int) -> None:
        for _ in range(times):
            self.now += 1.0
            self.later_ns += 1_000_000_000
            self.watch.look()

    def _evict(self, entry: CacheEntry, why: str) -> None:
        self.evicted.append(entry.model_id)
        self.ledger.enter(entry, EntryState.UNLOADING)
        self.ledger.remove(entry)
        assert self.memory.used is not None
        self.memory.used -= self.frees


async def test_evictions_follow_the_memory_and_not_the_books():
    """When a server exceeds nine tenths of its limit, its oldest copy is evicted. Above 95 %, loads are refused too.
    Copies of 1 byte each are evicted by their share of the observed memory: one copy, not all of them."""
    for size in (100 * MIB, 1):
        pod = Watched(frees=150 * MIB, size=size)
        await pod.fill()
        pod.memory.used = (100 + 1200) * MIB  # the limit is 1250
        pod.looks(3)
        assert pod.evicted == ["m0"]
        assert pod.watch.refusal == ""
        pod.memory.used = (100 + 1240) * MIB
        pod.looks(1)
        assert "no loads above 95%" in pod.watch.refusal
        assert pod.evicted == ["m0", "m1"]
        pod.looks(2)
        assert pod.watch.refusal == ""


async def test_evictions_end_if_they_do_not_help():
    """If a server keeps the memory of unloaded models, the agent evicts copies three times and then stops. Once the
    server's memory falls, evictions are possible again."""
    pod = Watched(frees=0)
    await pod.fill()
    pod.memory.used = (100 + 1200) * MIB
    pod.looks(60)
    lost = len(pod.evicted)
    assert 3 <= lost <= 6
    pod.memory.used = (100 + 1100) * MIB
    pod.looks(2)
    pod.memory.used, pod.frees = (100 + 1200) * MIB, 150 * MIB
    pod.looks(3)
    assert len(pod.evicted) == lost + 1


@pytest.mark.parametrize("why", ["not visible", ""])
async def test_nothing_is_evicted_without_an_observation(why: str):
    """If the server's memory cannot be observed, nothing is evicted, and no load is refused."""
    pod = Watched(frees=0)
    if not why:
        await pod.fill()
    pod.memory.used, pod.memory.why = None, why
    pod.looks(3)
    assert (pod.evicted, pod.watch.refusal) == ([], "")


async def test_an_unload_that_never_ends_does_not_end_all_evictions():
    """Evictions are judged once their unloads have ended, or at the latest after 45 s."""
    pod = Watched(frees=0)
    await pod.fill()
    stuck = pod.ledger.entries["m7"]
    pod.ledger.enter(stuck, EntryState.UNLOADING)
    pod.memory.used = (100 + 1400) * MIB
    pod.looks(1)
    first = len(pod.evicted)
    assert first
    pod.looks(40)
    assert len(pod.evicted) == first
    pod.looks(10)
    assert len(pod.evicted) > first


async def test_memory_is_looked_at_before_each_load():
    """A server may load many models between two regular readings, so its memory is also read before each load. This
    reading can only refuse the load: it evicts nothing and leaves no lasting refusal."""
    pod = Watched(frees=0)
    await pod.fill()
    pod.looks(1)
    assert pod.watch.full() == ""
    pod.memory.used = (100 + 1240) * MIB  # the limit is 1250
    assert "no loads above 95%" in pod.watch.full()
    assert (pod.watch.refusal, pod.evicted) == ("", [])
    pod.memory.used = (100 + 800) * MIB
    assert pod.watch.full() == ""
    pod.memory.used, pod.memory.why = None, "not visible"
    assert pod.watch.full() == ""
