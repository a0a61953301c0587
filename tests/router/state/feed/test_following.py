"""The pod's end of the feed, on a real etcd: each range is followed separately, and only if it is read."""

import asyncio
import functools

import pytest

from mesh.etcd import Change, Etcd, Snapshot
from mesh.process.tasks import Tasks
from mesh.schema.keys import Keys
from router.process import duties
from router.state.feed import ranges
from router.state.feed.following import Following
from router.state.feed.ranges import Item, Range
from tests.support.waiting import until


class Told:
    """A reader that only records what it receives."""

    def __init__(self) -> None:
        self.keys: dict[bytes, bytes] = {}
        self.snapshots = 0

    def snapshot(self, revision: int, items: list[Item]) -> None:
        self.keys = {key: value or b"" for key, value in items}
        self.snapshots += 1

    def delta(self, revision: int, items: list[Item]) -> None:
        self.keys.update({key: value or b"" for key, value in items})


class Pod:
    """The follower under test, and the changes that it passes on."""

    def __init__(self, etcd: Etcd, keys: Keys) -> None:
        self.presence, self.config = Told(), Told()
        self.passed: list[tuple[Range, Change]] = []
        self.tasks = Tasks()
        self.following = Following(
            etcd,
            keys,
            readers={ranges.PRESENCE: self.presence, ranges.CONFIG: self.config},
            apply=lambda range, change: self.passed.append((range, change)),
            run=functools.partial(self.tasks.run, duties.FOLLOW_ETCD),
        )

    def followed(self) -> set[str]:
        """Returns the names of the ranges for which changes were passed on."""
        return {range.name for range, _ in self.passed}


@pytest.fixture
async def pod(etcd, keys):
    made = Pod(etcd, keys)
    yield made
    await made.tasks.close()


def holding(keys: Keys, key: bytes) -> list[str]:
    """Returns the ranges that contain the key."""
    bounds = {name: each.bounds(keys) for name, each in ranges.RANGES.items()}
    return [name for name, (start, end) in bounds.items() if start <= key < end]


def test_each_range_of_the_table_holds_the_keys_of_its_name_alone():
    """Each range of the table contains exactly the keys of its name. A key in two ranges would be reported twice, in no
    defined order."""
    keys = Keys("mm/mesh")
    samples = {
        "presence": [keys.pod("p"), keys.copy("m", "p"), keys.life("p", "i"), keys.tombstone("m")],
        "config": [keys.setting("type_limits")],
        "vmodels": [keys.vmodel("v")],
        "auth": [keys.auth + b"keys/k"],
    }
    assert samples.keys() == ranges.RANGES.keys()
    for name, found in samples.items():
        for key in found:
            assert holding(keys, key) == [name]
    assert holding(keys, keys.model("m")) == [], "a million registered models cost a router nothing"


async def test_what_is_read_here_is_followed_and_nothing_else(pod, etcd, keys):
    """Only ranges with readers in this pod are followed, and none before `begin`."""
    await etcd.put(keys.setting("a"), b"1")
    await etcd.put(keys.vmodel("v"), b"1")
    assert not pod.following.read.is_set()
    pod.following.begin()
    await pod.following.read.wait()
    assert pod.config.keys == {keys.setting("a"): b"1"}
    assert pod.followed() == {"presence", "config"}


async def test_a_range_is_followed_once_a_worker_reads_it(pod, etcd, keys):
    """A range is followed when it gets its first reader, and only once. The first reader may come before `begin`, if a
    worker connects before etcd is available."""
    await etcd.put(keys.vmodel("v"), b"1")
    pod.following.want(ranges.VMODELS)
    pod.following.begin()
    await until(lambda: "vmodels" in pod.followed())
    pod.following.want(ranges.VMODELS)
    pod.following.want(ranges.AUTH)
    await etcd.put(keys.auth + b"keys/a", b"1")
    await etcd.put(keys.vmodel("v"), b"2")
    await until(lambda: "auth" in pod.followed())
    await until(lambda: len([1 for range, _ in pod.passed if range is ranges.VMODELS]) == 2)
    snapshots = [range.name for range, change in pod.passed if isinstance(change, Snapshot)]
    assert sorted(snapshots) == ["auth", "config", "presence", "vmodels"]


async def test_each_range_goes_on_by_itself(pod, etcd, keys, monkeypatch):
    """While a reader of one range cannot take a change, the readers of other ranges get theirs."""
    pod.following.begin()
    await pod.following.read.wait()
    stuck = asyncio.Event()
    original = pod.config.delta

    def refuse(revision, items):
        original(revision, items)
        stuck.set()
        raise RuntimeError("no")

    monkeypatch.setattr(pod.config, "delta", refuse)
    await etcd.put(keys.setting("a"), b"1")
    await stuck.wait()
    await etcd.put(keys.pod("p"), b"{}")
    await until(lambda: keys.pod("p") in pod.presence.keys)
