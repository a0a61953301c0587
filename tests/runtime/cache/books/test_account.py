"""The account of a pod (base, growth and factor), computed from memory figures that the test sets."""

from mesh.runtime.cache.books.account import Account
from mesh.runtime.cache.books.entries import CacheEntry, EntryState
from mesh.runtime.cache.books.ledger import Ledger
from placement.footprint import Footprint
from tests.runtime.pod_of_fakes import FakeBoard

MIB = 1 << 20


class SeenNow:
    """The memory of a server, as the test sets it."""

    def __init__(self, used: int = 100 * MIB) -> None:
        self.used: int | None = used
        self.lives = 1
        self.why = ""
        self.what = "process 7 and its children"
        self.limit_bytes: int | None = None
        self.newest = 0  # bytes of a process that was started a moment ago

    async def find(self) -> bool:
        return self.used is not None

    def read(self, *, relook: bool = False) -> int | None:
        """Returns the bytes in use. The newest process counts only if the caller asks to look for new processes."""
        return self.used + self.newest * relook if self.used is not None else None


class Pod:
    """A ledger, its account, and a clock."""

    def __init__(self, capacity: int = 1000 * MIB) -> None:
        self.now = 0.0
        self.ledger = Ledger(capacity, FakeBoard(), slots=64)
        self.memory = SeenNow()
        self.account = Account(self.ledger, self.memory, clock=lambda: self.now)

    def add(self, name: str, size: int, *, guessed: bool = False, least: int = 0) -> CacheEntry:
        entry = self.ledger.add(name, 1)
        entry.size, entry.guessed, entry.least_bytes = Footprint(size), guessed, least
        self.ledger.weigh(entry, self.ledger.counted(entry))
        self.ledger.enter(entry, EntryState.LOADED)
        return entry

    def look(self, times: int) -> None:
        for _ in range(times):
            self.now += 1.0
            self.account.look()


async def test_the_books_follow_the_memory_both_ways():
    """If the server takes more memory than the sizes of its copies, they count for more. If it takes less, an estimate
    counts for less, down to its minimum, but a measured size still counts in full."""
    pod = Pod()
    await pod.account.prepare()
    said, guess = pod.add("a", 100 * MIB), pod.add("b", 100 * MIB, guessed=True, least=80 * MIB)
    assert pod.memory.used is not None
    pod.memory.used = 500 * MIB
    pod.look(200)
    assert pod.ledger.committed.host_bytes / MIB > 370
    assert abs(pod.ledger.committed.host_bytes - pod.ledger.factor.value * 200 * MIB) < 0.05 * 400 * MIB
    pod.memory.used = 120 * MIB
    pod.look(400)
    assert (said.footprint.host_bytes, guess.footprint.host_bytes) == (100 * MIB, 80 * MIB)
    assert pod.ledger.accounted_bytes == 200 * MIB
    assert pod.account.statistics().observed_bytes == 20 * MIB


async def test_a_new_server_begins_with_a_base_and_a_factor_of_its_own():
    """The memory that the new server takes without models is its base, and the factor is 1 again. While the server's
    memory is unknown, nothing is observed."""
    pod = Pod()
    await pod.account.prepare()
    pod.ledger.factor.value, pod.ledger.factor.believed = 4.0, False
    pod.memory.lives, pod.memory.used = 2, 300 * MIB
    await pod.account.prepare()
    assert (pod.ledger.factor.value, pod.ledger.factor.believed) == (1.0, True)
    pod.look(1)
    assert pod.account.statistics().observed_bytes == 0
    pod.memory.used = None
    pod.look(1)
    assert pod.account.statistics().observed_bytes == 0
    assert pod.account.begin() is None


async def test_only_a_load_that_runs_alone_is_measured():
    """A load beside another load, or beside an unload, is not alone. A growth also says whether the load is the
    server's first, and whether the server had unloaded nothing before."""
    pod = Pod()
    await pod.account.prepare()
    one, two = pod.account.begin(), pod.account.begin()
    growth = [pod.account.end(one), pod.account.end(two)]
    assert [(one.alone, one.first) for one in growth if one] == [(False, True), (False, False)]
    alone = pod.account.begin()
    pod.memory.used = 130 * MIB
    found = pod.account.end(alone)
    assert found is not None
    assert (found.bytes, found.alone, found.fresh) == (30 * MIB, True, True)
    entry = pod.add("a", MIB)
    beside = pod.account.begin()
    pod.ledger.enter(entry, EntryState.UNLOADING)
    found = pod.account.end(beside)
    assert found is not None
    assert not found.alone
    pod.ledger.remove(entry)
    found = pod.account.end(pod.account.begin())
    assert found is not None
    assert (found.alone, found.fresh) == (True, False)


async def test_a_weighing_ends_with_its_server():
    """A load whose server was replaced in the meantime has no growth."""
    pod = Pod()
    await pod.account.prepare()
    weighing = pod.account.begin()
    pod.memory.lives = 2
    await pod.account.prepare()
    assert pod.account.end(weighing) is None


async def test_the_limit_is_the_least_of_what_there_is():
    """The limit for models and calls is the capacity with its headroom or, if that is less, what the server's own
    memory limit leaves beyond the base."""
    pod = Pod()
    await pod.account.prepare()
    assert pod.account.limit_bytes == 1250 * MIB
    pod.memory.lives, pod.memory.limit_bytes = 2, 800 * MIB
    await pod.account.prepare()
    assert pod.account.limit_bytes == 700 * MIB


async def test_our_own_server_is_left_alone():
    """Without a foreign server, nothing is observed and no factor applies."""
    ledger = Ledger(1000, FakeBoard(), slots=4)
    account = Account(ledger, None)
    await account.prepare()
    assert account.look() == 0
    assert account.begin() is None
    assert not account.observes
    assert ledger.factor.value == 1.0


async def test_the_growth_of_a_load_includes_the_process_of_its_model():
    """Some servers start a process for each model. The growth of a load includes this process, although the list of the
    server's processes does not have it yet."""
    pod = Pod()
    await pod.account.prepare()
    weighing = pod.account.begin()
    pod.memory.newest = 30 * MIB
    growth = pod.account.end(weighing)
    assert growth is not None
    assert growth.bytes == 30 * MIB
