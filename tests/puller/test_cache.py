"""The whole files of a pod: each kept once, never one in use removed, nothing half after a crash."""

import itertools
import os
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from puller.cache import Blob, Cache
from puller.disk import Disk
from puller.errors import PullError, PullErrorKind


def opened(folder: Path, budget: int | None = None, **more) -> Cache:
    disk = Disk(folder, reserve_bytes=0)
    disk.sweep()
    cache = Cache(disk, budget_bytes=budget, **more)
    cache.load()
    cache.disk = disk
    return cache


def put(cache: Cache, identity: str | None, content: bytes, sha256: str = "") -> Blob:
    """A file has arrived; it is picked."""
    with_room = cache.room(len(content))
    path = cache.disk.new()
    path.write_bytes(content)
    blob = cache.add(path, size=len(content), identity=identity, sha256=sha256)
    with_room.arrived(len(content))
    with_room.close()
    return blob


def on_disk(cache: Cache) -> set[str]:
    return {entry.name for entry in cache.disk.blobs.iterdir()}


@pytest.fixture
def cache(tmp_path):
    cache = opened(tmp_path / "models", 1000)
    yield cache
    cache.disk.close()


def test_a_file_is_found_by_its_identity_and_its_digest(cache):
    """By either; another size under the same identity is somebody's meddling, and it is fetched anew."""
    blob = put(cache, "s3 x", b"abc")
    digest = cache.digest(blob)
    assert cache.pick("s3 x", size=3) is blob
    assert cache.pick(None, size=None, sha256=digest) is blob
    assert cache.pick("s3 y", size=3) is None
    assert cache.pick("s3 x", size=4) is None
    assert cache.pick("s3 x", size=3) is None


def test_what_is_on_its_way_counts_against_the_budget_until_it_is_a_blob(cache):
    """Bytes that have arrived are on disk and no blob yet; two pulls must not be promised the same room."""
    room = cache.room(600)
    room.arrived(600)
    with pytest.raises(PullError, match="budget"):
        cache.room(600)
    room.close()
    cache.room(600).close()
    cache.room(1000).close()


def test_what_is_safe_on_disk_is_there_after_a_restart(cache, tmp_path):
    """And what was not yet is swept, whole as it may be: nobody knows."""
    safe, unsafe = put(cache, "safe", b"abc"), put(cache, "unsafe", b"xyz")
    cache.secure(safe)
    cache.drop([safe, unsafe])
    cache.disk.close()
    again = opened(tmp_path / "models", 1000)
    try:
        found = again.pick("safe", size=3)
        assert found is not None
        assert found.path is not None
        assert found.path.read_bytes() == b"abc"
        assert again.pick("unsafe", size=3) is None
        assert again.statistics().blobs == 1
    finally:
        again.disk.close()


def test_the_order_of_use_survives_a_restart(tmp_path):
    """The longest unused goes first, also after it."""
    cache = opened(tmp_path / "models", 1000)
    for number in range(3):
        blob = put(cache, f"f{number}", b"x" * 300)
        cache.secure(blob)
        cache.drop([blob])
    for place, number in enumerate((1, 2, 0)):
        found = cache.pick(f"f{number}", size=300)
        assert found is not None
        cache.drop([found])
        assert found.path is not None
        os.utime(found.path, (1000 + place, 1000 + place))
    cache.disk.close()
    again = opened(tmp_path / "models", 1000)
    again.room(500).close()
    assert [number for number in range(3) if again.peek(f"f{number}", size=300) is None] == [1, 2]
    again.disk.close()


def test_what_is_in_use_never_makes_way(cache):
    """A pull that does not fit beside it is refused, with the numbers, and nothing is thrown away for it."""
    used, idle = put(cache, "used", b"x" * 600), put(cache, "idle", b"x" * 300)
    cache.use("model", [used])
    cache.drop([used, idle])
    with pytest.raises(PullError, match="600 are in use") as caught:
        cache.room(500)
    assert caught.value.kind is PullErrorKind.DISK_FULL
    assert cache.peek("idle", size=300) is not None


def test_a_model_is_remembered_until_one_of_its_files_goes(tmp_path):
    """Its folder may be gone meanwhile; whoever listens is told both times."""
    told: list[tuple[str, bool]] = []
    cache = opened(tmp_path / "models", 1000, on_change=lambda into, here: told.append((into, here)))
    one, two = put(cache, "one", b"x" * 400), put(cache, "two", b"x" * 400)
    cache.use("m", [one, two])
    cache.drop([one, two])
    assert cache.remembers("m")
    cache.leave("m")
    assert cache.remembers("m")
    cache.room(300).close()
    assert not cache.remembers("m")
    assert told == [("m", True), ("m", False)]
    cache.disk.close()


class CacheMachine(RuleBasedStateMachine):
    """Pulls, models, removals and restarts in any order, against a plain account of what must be there."""

    names = st.sampled_from([f"file-{number}" for number in range(6)])
    models = st.sampled_from(["a", "b", "c"])
    BUDGET = 1000
    folders = itertools.count()

    @initialize()
    def start(self) -> None:
        import tempfile

        self.folder = Path(tempfile.mkdtemp(prefix="cache-")) / "models"
        self.cache = opened(self.folder, self.BUDGET)
        self.made_of: dict[str, dict[str, bytes]] = {}

    @staticmethod
    def content(name: str) -> bytes:
        return name.encode() * (10 + 7 * int(name[-1]))

    @rule(model=models, names=st.sets(names, min_size=1, max_size=3), safe=st.booleans())
    def pull(self, model: str, names: set[str], safe: bool) -> None:
        picked = []
        try:
            for name in sorted(names):
                content = self.content(name)
                blob = self.cache.pick(name, size=len(content))
                picked.append(blob if blob is not None else put(self.cache, name, content))
        except PullError as error:
            assert error.kind is PullErrorKind.DISK_FULL
            self.cache.drop(picked)
            return
        for blob in picked:
            if safe:
                self.cache.secure(blob)
        self.cache.use(model, picked)
        self.cache.drop(picked)
        self.made_of[model] = {name: self.content(name) for name in names}

    @rule(model=models)
    def leave(self, model: str) -> None:
        self.cache.leave(model)
        self.made_of.pop(model, None)

    @rule()
    def trim(self) -> None:
        self.cache.trim()

    @rule()
    def restart(self) -> None:
        self.cache.disk.close()
        self.cache = opened(self.folder, self.BUDGET)
        self.made_of = {}

    @invariant()
    def holds(self) -> None:
        statistics = self.cache.statistics()
        assert statistics.bytes <= self.BUDGET
        assert statistics.leftovers == 0
        in_use = {name: content for model in self.made_of.values() for name, content in model.items()}
        assert statistics.used_bytes == sum(map(len, in_use.values()))
        for name, content in in_use.items():
            blob = self.cache.peek(name, size=len(content))
            assert blob is not None, "a file in use is gone"
            assert blob.path is not None
            assert blob.path.read_bytes() == content
            self.cache.drop([blob])
        for model in self.made_of:
            assert self.cache.remembers(model)

    def teardown(self) -> None:
        import shutil

        self.cache.disk.close()
        shutil.rmtree(self.folder.parent)


CacheMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestCacheMachine = CacheMachine.TestCase
