"""The complete files of a pod: each is kept once, no file is removed while it is in use, and no file is incomplete
after a crash."""

import errno
import hashlib
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
from tests.support.examples import examples


def opened(folder: Path, budget: int | None = None, **more) -> Cache:
    disk = Disk(folder, reserve_bytes=0)
    disk.sweep()
    cache = Cache(disk, budget_bytes=budget, **more)
    cache.load()
    cache.disk = disk
    return cache


def put(cache: Cache, identity: str | None, content: bytes) -> Blob:
    """Puts a pulled file into the cache, and marks it as in use."""
    with_room = cache.room(len(content))
    path = cache.disk.new()
    path.write_bytes(content)
    blob = cache.add(path, sha256=sha256(content), identities=[identity] if identity else [])
    with_room.arrived(len(content))
    with_room.close()
    return blob


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def on_disk(cache: Cache) -> set[str]:
    return {entry.name for entry in cache.disk.blobs.iterdir()}


@pytest.fixture
def cache(tmp_path):
    cache = opened(tmp_path / "models", 1000)
    yield cache
    cache.disk.close()


def test_a_file_is_found_by_its_names(cache):
    """A file of the wanted size is found by each of its names, and by no other name."""
    blob = put(cache, "s3 x", b"abc")
    assert put(cache, "http y", b"abc") is blob
    for names in (["s3 x"], ["http y"], ["other", "http y"]):
        assert cache.pick(names, size=3) is blob
        assert cache.pick(names) is blob
    assert cache.pick(["s3 y"], size=3) is None
    assert cache.pick([], size=3) is None
    assert cache.pick(["s3 x"], size=4) is None
    assert cache.pick(["s3 x"], size=3) is blob


def test_a_name_leads_to_what_came_last(cache):
    """A name leads to the file that was added last, even if a store uses one name for two files."""
    old, new = put(cache, "x", b"old"), put(cache, "x", b"new")
    assert cache.pick(["x"]) is new
    assert old is not new


def test_equal_bytes_are_one_file(cache):
    """Equal bytes under different names are one file, which the budget counts once."""
    one = put(cache, "one", b"x" * 400)
    cache.secure(one)
    two = put(cache, "two", b"x" * 400)
    cache.secure(two)
    assert one is two
    assert cache.statistics().bytes == 400
    cache.drop([one, two])
    assert len([name for name in on_disk(cache) if name.startswith("s-")]) == 1
    assert not [entry for entry in cache.disk.directory.iterdir() if entry.name.startswith(".new")]


def test_names_of_one_file_are_bounded(cache):
    """The names of one file are bounded in number, and the oldest is removed first."""
    for number in range(200):
        blob = put(cache, f"n{number}", b"abc")
        cache.secure(blob)
        cache.drop([blob])
    assert len(on_disk(cache)) < 100
    assert cache.look_up(["n0"]) is None
    assert cache.look_up(["n199"]) is blob


DAMAGE = {
    "overwritten": lambda path: path.write_bytes(b"X" * path.stat().st_size),
    "one byte": lambda path: _poke(path, 5),
    "truncated": lambda path: os.truncate(path, 3),
    "emptied": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "removed": lambda path: path.unlink(),
    "exchanged": lambda path: (path.unlink(), path.write_bytes(b"X" * 400)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a dangling link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}


def _poke(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"!")


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("state", ["idle", "in use", "after a restart"])
def test_a_damaged_file_is_not_found(cache, tmp_path, state, how, caplog):
    """Damage is noticed when the file is looked up, or when its content is checked. The file that is then fetched again
    is kept."""
    content = b"abc" * 100 + b"x" * 100
    blob = put(cache, "x", content)
    cache.secure(blob)
    if state == "in use":
        cache.use("model", [blob])
    cache.drop([blob])
    if state == "after a restart":
        cache.disk.close()
        DAMAGE[how](blob.path)
        cache = opened(tmp_path / "models", 1000)
    else:
        DAMAGE[how](blob.path)
    found = cache.pick(["x"], size=len(content))
    assert found is None or (not found.read and not cache.sound(found))
    if found is not None:
        cache.drop([found])
    if found is not None or state != "after a restart":  # otherwise the file had another size
        assert "damaged" in caplog.text
        assert cache.pick(["x"]) is None
    again = put(cache, "x", content)
    cache.secure(again)
    cache.leave("model")
    cache.drop([again])
    again = cache.pick(["x"])
    assert again is not None
    assert again.path is not None
    assert again.path.read_bytes() == content
    assert cache.sound(again)
    cache.disk.close()


def test_damage_that_hides_its_time_is_seen_by_reading(cache):
    """Damage that keeps size and times is detected by reading the file, which a caller can request."""
    blob = put(cache, "x", b"abc")
    before = os.stat(blob.path)
    blob.path.write_bytes(b"xyz")
    os.utime(blob.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert cache.pick(["x"]) is blob
    assert not cache.sound(blob)
    assert cache.pick(["x"]) is None
    assert cache.statistics().damaged == 1


def test_files_without_links_are_found_again(tmp_path, monkeypatch):
    """On file systems without hard links, a file is found by its names, which are small files that point to it."""
    link = os.link

    def refused(source, target, **more):
        if ".blobs" in str(target):
            raise OSError(errno.EPERM, "no links here")
        link(source, target, **more)

    monkeypatch.setattr(os, "link", refused)
    cache = opened(tmp_path / "models", 1000)
    blob = put(cache, "x", b"abc")
    cache.secure(blob)
    assert put(cache, "y", b"abc") is blob
    cache.disk.close()
    cache = opened(tmp_path / "models", 1000)
    for name in "xy":
        found = cache.pick([name], size=3)
        assert found is not None
        assert cache.sound(found)
    cache.disk.close()


def test_what_is_on_its_way_counts_against_the_budget_until_it_is_a_blob(cache):
    """Bytes that have arrived count against the budget before their file is complete, so two pulls never get the same
    room."""
    room = cache.room(600)
    room.arrived(600)
    with pytest.raises(PullError, match="budget"):
        cache.room(600)
    room.close()
    cache.room(600).close()
    cache.room(1000).close()


@pytest.mark.parametrize(
    ("size", "short", "never"),
    [(600, 100, False), (1000, 500, False), (1001, 0, True)],
    ids=["some-must-go", "all-must-go", "larger-than-the-budget"],
)
def test_how_much_must_go_for_a_pull_is_told(cache, size, short, never):
    """A pull that needs room reports how many bytes must be evicted. It evicts nothing itself, because only the caller
    knows what uses the files."""
    put(cache, "used", b"x" * 500)
    with pytest.raises(PullError) as caught:
        cache.room(size)
    assert (caught.value.short, caught.value.never, caught.value.needs) == (short, never, size)
    assert cache.statistics().bytes == 500


def test_what_is_in_the_way_at_this_moment_is_told_and_what_is_unused_is_not(cache):
    """Files of models and the reservations of other pulls are in the way of a pull; unused files are not."""
    put(cache, "used", b"x" * 500)
    cache.drop([put(cache, "unused", b"y" * 300)])
    room = cache.room(100)
    assert [cache.short(needs) for needs in (400, 401, 900)] == [0, 1, 500]
    room.close()
    assert cache.short(401) == 0


def test_a_file_of_unknown_size_tells_all_that_it_has_asked_for(cache):
    put(cache, "used", b"x" * 500)
    room = cache.room(0)
    room.grow(400)
    with pytest.raises(PullError) as caught:
        room.grow(200)
    assert caught.value.needs == 600
    room.close()
    assert cache.short(caught.value.needs) == 100


def test_what_is_safe_on_disk_is_there_after_a_restart(cache, tmp_path):
    """Files that were synced to disk are found after a restart. Others are removed, even complete ones, because nothing
    proves that they are complete."""
    safe, unsafe = put(cache, "safe", b"abc"), put(cache, "unsafe", b"xyz")
    cache.secure(safe)
    cache.drop([safe, unsafe])
    cache.disk.close()
    again = opened(tmp_path / "models", 1000)
    try:
        found = again.pick(["safe"], size=3)
        assert found is not None
        assert found.path is not None
        assert found.path.read_bytes() == b"abc"
        assert again.pick(["unsafe"], size=3) is None
        assert again.statistics().blobs == 1
    finally:
        again.disk.close()


def test_the_order_of_use_survives_a_restart(tmp_path):
    """After a restart, the least recently used files are still the first to be evicted."""
    cache = opened(tmp_path / "models", 1000)
    for number in range(3):
        blob = put(cache, f"f{number}", b"%d" % number * 300)
        cache.secure(blob)
        cache.drop([blob])
    for place, number in enumerate((1, 2, 0)):
        found = cache.pick([f"f{number}"], size=300)
        assert found is not None
        cache.drop([found])
        assert found.path is not None
        os.utime(found.path, (1000 + place, 1000 + place))
    cache.disk.close()
    again = opened(tmp_path / "models", 1000)
    again.room(500).close()
    assert [number for number in range(3) if again.look_up([f"f{number}"], size=300) is None] == [1, 2]
    again.disk.close()


def test_what_is_in_use_never_makes_way(cache):
    """Files in use are never evicted. A pull that does not fit next to them is refused with the numbers, and nothing is
    evicted for it."""
    used, idle = put(cache, "used", b"x" * 600), put(cache, "idle", b"x" * 300)
    cache.use("model", [used])
    cache.drop([used, idle])
    with pytest.raises(PullError, match="600 are in use") as caught:
        cache.room(500)
    assert caught.value.kind is PullErrorKind.DISK_FULL
    assert cache.look_up(["idle"], size=300) is not None


def test_what_others_make_of_a_model_counts_until_the_model_goes(cache):
    """Files that another program has made of a model's files, such as the content of an archive, count like the model's
    own files: unused files make way for them, and a pull that needs their room says what must go."""
    used, idle = put(cache, "used", b"x" * 300), put(cache, "idle", b"y" * 300)
    cache.use("model", [used])
    cache.drop([used, idle])
    cache.made("model", 200)
    assert not cache.crowded()
    cache.made("model", 600)  # in place of the 200
    assert cache.crowded()
    cache.trim()
    assert cache.look_up(["idle"]) is None
    assert (cache.statistics().bytes, cache.statistics().used_bytes) == (900, 900)
    with pytest.raises(PullError, match="900 are in use") as caught:
        cache.room(200)
    assert (caught.value.short, cache.short(200)) == (100, 100)
    cache.leave("model")
    assert (cache.statistics().bytes, cache.statistics().used_bytes) == (300, 0)


def test_a_model_is_remembered_until_one_of_its_files_goes(tmp_path):
    """A model is remembered even if its folder is gone. The listener is called when the model is added and when it is
    forgotten."""
    told: list[tuple[str, bool]] = []
    cache = opened(tmp_path / "models", 1000, on_change=lambda into, here: told.append((into, here)))
    one, two = put(cache, "one", b"x" * 400), put(cache, "two", b"y" * 400)
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
    """A state machine of pulls, models, removals and restarts in any order, compared with a simple model of what must
    exist."""

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
        self.unpacked: dict[str, int] = {}  # bytes that others have made of a model

    @staticmethod
    def content(name: str) -> bytes:
        return name.encode() * (10 + 7 * int(name[-1]))

    @rule(model=models, names=st.sets(names, min_size=1, max_size=3), safe=st.booleans())
    def pull(self, model: str, names: set[str], safe: bool) -> None:
        picked = []
        try:
            for name in sorted(names):
                content = self.content(name)
                blob = self.cache.pick([name], size=len(content))
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
        self.cache.trim()
        self.made_of.pop(model, None)
        self.unpacked.pop(model, None)

    @rule(model=models, size=st.integers(0, 400))
    def unpack(self, model: str, size: int) -> None:
        self.cache.made(model, size)
        self.cache.trim()
        self.unpacked[model] = size

    @rule()
    def trim(self) -> None:
        self.cache.trim()

    @rule()
    def restart(self) -> None:
        self.cache.disk.close()
        self.cache = opened(self.folder, self.BUDGET)
        self.made_of, self.unpacked = {}, {}

    @invariant()
    def holds(self) -> None:
        statistics = self.cache.statistics()
        in_use = {name: content for model in self.made_of.values() for name, content in model.items()}
        used_bytes = sum(map(len, in_use.values())) + sum(self.unpacked.values())
        assert statistics.used_bytes == used_bytes
        assert statistics.bytes <= max(self.BUDGET, used_bytes)
        assert statistics.leftovers == 0
        for name, content in in_use.items():
            blob = self.cache.look_up([name], size=len(content))
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


CacheMachine.TestCase.settings = settings(max_examples=examples(40), stateful_step_count=25, deadline=None)
TestCacheMachine = CacheMachine.TestCase
