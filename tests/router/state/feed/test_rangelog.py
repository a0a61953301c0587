"""One range and its readers, without a connection. Whatever is lost, cut or slow, each reader ends with the present
state."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mesh.etcd import ChangeKind, Delta, Event, KeyValue, Snapshot
from router.state.feed import rangelog
from router.state.feed.messages import encode, pack, unpack
from router.state.feed.rangelog import RangeLog
from router.state.feed.ranges import Item
from router.state.feed.reading import Reading

State = dict[bytes, bytes]


def kv(key: bytes, value: bytes = b"") -> KeyValue:
    """Returns a key and its value as etcd delivers them."""
    return KeyValue(key, value, 1, 1, 1, 0)


def put(revision: int, *items: tuple[bytes, bytes | None]) -> Delta:
    """Returns the changes of one revision. A value of None means a deletion."""
    return Delta(
        revision,
        tuple(
            Event(ChangeKind.DELETE if value is None else ChangeKind.PUT, kv(key, value or b"")) for key, value in items
        ),
    )


class Copy:
    """A reader that keeps the state that it received and the history of that state."""

    def __init__(self) -> None:
        self.state: State = {}
        self.story: list[tuple[str, int]] = []

    def snapshot(self, revision: int, items: list[Item]) -> None:
        self.state = {key: value for key, value in items if value is not None}
        self.story.append(("snapshot", revision))

    def delta(self, revision: int, items: list[Item]) -> None:
        for key, value in items:
            if value is None:
                self.state.pop(key, None)
            else:
                self.state[key] = value
        self.story.append(("delta", revision))


def decoded(data: bytes) -> list[list[object]]:
    """Returns the messages in the bytes that a cursor has given."""
    found = []
    while data:
        length = int.from_bytes(data[:4], "big")
        found.append(json.loads(data[4 : 4 + length]))
        data = data[4 + length :]
    return found


class Worker:
    """A worker with a connection that carries as many messages as the test says."""

    def __init__(self, log: RangeLog) -> None:
        self.log = log
        self.copy = Copy()
        self.reading = Reading(self.copy)
        self.connect()

    def connect(self) -> None:
        """Reconnects after a break of the connection."""
        self.cursor = self.log.cursor(*self.reading.connect())

    def lose(self) -> None:
        self.cursor.close()

    def take(self, most: int = 1_000_000) -> bool:
        """Takes some messages, and returns whether all have arrived."""
        for _ in range(most):
            data = self.cursor.take()
            if data is None:
                return True
            for what, name, *rest in decoded(data):
                assert name == self.log.name
                self.reading.take(what, rest)
        return False


@pytest.fixture
def log() -> RangeLog:
    """Returns a range with three keys, at revision 5."""
    made = RangeLog("config")
    made.apply(Snapshot(5, (kv(b"a", b"1"), kv(b"b", b"2"), kv(b"c", b"3"))))
    return made


def test_a_worker_is_told_everything_and_then_each_revision_whole(log: RangeLog) -> None:
    """After a snapshot, a worker gets each revision complete, so keys that belong together arrive together."""
    worker = Worker(log)
    assert worker.take()
    log.apply(put(9, (b"a", b"4"), (b"b", None)))
    log.apply(put(12, (b"a", b"5")))
    assert worker.take()
    assert worker.copy.story == [("snapshot", 5), ("delta", 9), ("delta", 12)]
    assert worker.copy.state == {b"a": b"5", b"c": b"3"}


def test_nothing_is_told_before_etcd_was_read() -> None:
    """Once etcd was read, a range without keys is sent as an empty snapshot."""
    log = RangeLog("vmodels")
    worker = Worker(log)
    assert worker.take()
    assert not worker.copy.story
    log.apply(Snapshot(3, ()))
    worker.take()
    assert worker.copy.story == [("snapshot", 3)]


def test_a_worker_that_connects_again_is_told_what_it_missed_alone(log: RangeLog) -> None:
    worker = Worker(log)
    worker.take()
    worker.lose()
    log.apply(put(6, (b"a", b"4")))
    log.apply(put(8, (b"b", b"4")))
    worker.connect()
    worker.take()
    assert worker.copy.story == [("snapshot", 5), ("delta", 6), ("delta", 8)]
    assert worker.copy.state == {b"a": b"4", b"b": b"4", b"c": b"3"}
    worker.lose()
    worker.connect()
    assert worker.take()
    assert len(worker.copy.story) == 3, "the worker has missed nothing"


def test_a_connection_that_breaks_within_a_snapshot_leaves_what_was_known(
    log: RangeLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the connection breaks within a snapshot, the worker keeps its former state and discards the part that
    arrived."""
    monkeypatch.setattr(rangelog, "PORTION", 1)
    worker = Worker(log)
    assert not worker.take(2)
    worker.lose()
    assert not worker.copy.story
    log.apply(put(6, (b"a", None)))
    worker.connect()
    worker.take()
    assert worker.copy.state == {b"b": b"2", b"c": b"3"}


def test_after_a_compaction_every_worker_is_told_everything_again(log: RangeLog) -> None:
    """After a compaction every worker gets a new snapshot, even if it was disconnected."""
    there, away = Worker(log), Worker(log)
    there.take()
    away.take()
    away.lose()
    log.apply(Snapshot(40, (kv(b"a", b"9"),)))
    there.take()
    away.connect()
    away.take()
    assert there.copy.story == away.copy.story == [("snapshot", 5), ("snapshot", 40)]
    assert there.copy.state == away.copy.state == {b"a": b"9"}


def test_revisions_of_another_store_are_not_taken_for_this_ones(log: RangeLog) -> None:
    """If etcd has started on other data, a worker gets all of it, even if etcd has passed the revision that the worker
    knows."""
    worker = Worker(log)
    worker.take()
    worker.lose()
    log.apply(Snapshot(2, (kv(b"x", b"1"),)))
    log.apply(put(5, (b"y", b"1")))
    log.apply(put(6, (b"z", b"1")))
    worker.connect()
    worker.take()
    assert worker.copy.state == {b"x": b"1", b"y": b"1", b"z": b"1"}


def test_what_was_missed_is_not_kept_without_limit(log: RangeLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a long absence, a worker gets a snapshot instead of the changes."""
    monkeypatch.setattr(rangelog, "KEPT", 200)
    worker = Worker(log)
    worker.take()
    worker.lose()
    for revision in range(6, 30):
        log.apply(put(revision, (b"a", b"%d" % revision)))
    worker.connect()
    worker.take()
    assert worker.copy.story == [("snapshot", 5), ("snapshot", 29)]


def test_one_that_falls_behind_is_told_everything_instead(log: RangeLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that falls behind gets a snapshot instead of changes, because its backlog is bounded. Workers that read
    still get the changes."""
    monkeypatch.setattr(rangelog, "MAX_BEHIND", 500)
    slow, quick = Worker(log), Worker(log)
    slow.take()
    for revision in range(6, 40):
        log.apply(put(revision, (b"a", b"%d" % revision)))
        quick.take()
        assert slow.cursor.behind <= 500
    slow.take()
    assert slow.copy.story[0] == ("snapshot", 5)
    assert [what for what, _ in slow.copy.story].count("snapshot") == 2
    assert quick.copy.story == [("snapshot", 6), *(("delta", revision) for revision in range(7, 40))]
    assert slow.copy.state == quick.copy.state


def test_a_change_larger_than_a_message_comes_as_one_revision(log: RangeLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a lease may delete the keys of very many copies. A worker gets such a change as one revision, although
    it does not fit into one message."""
    monkeypatch.setattr(rangelog, "PORTION_BYTES", 100)
    worker = Worker(log)
    worker.take()
    log.apply(put(6, *((b"k%d" % number, b"v" * 60) for number in range(10))))
    worker.take()
    assert worker.copy.story == [("snapshot", 5), ("delta", 6)]
    assert len(worker.copy.state) == 13


KEYS = st.sampled_from([b"a", b"b", b"c", b"\xff\0"])
VALUES = st.sampled_from([b"", b"1", b"22"])
CHANGE = st.tuples(st.just("change"), st.lists(st.tuples(KEYS, st.none() | VALUES), min_size=1, max_size=3))
AGAIN = st.tuples(st.just("read again"), st.dictionaries(KEYS, VALUES), st.integers(1, 50))
CARRY = st.tuples(st.just("carry"), st.integers(0, 1), st.integers(1, 5))
BREAK = st.tuples(st.just("break or mend"), st.integers(0, 1))
STEPS = st.lists(CHANGE | CHANGE | CARRY | CARRY | BREAK | AGAIN, max_size=40)


class Story:
    """A range, and two workers whose connections are slow, break and return. The state is noted at each revision."""

    def __init__(self) -> None:
        self.log = RangeLog("vmodels")
        self.state: State = {}
        self.past: dict[tuple[str, int], State] = {}
        self.workers = [Worker(self.log), Worker(self.log)]
        self.connected = [True, True]

    def change(self, items: list[tuple[bytes, bytes | None]]) -> None:
        """Changes keys in one revision. The revisions skipped before it belong to other ranges."""
        if not self.log.epoch:
            return
        for key, value in items:
            if value is None:
                self.state.pop(key, None)
            else:
                self.state[key] = value
        self.log.apply(put(self.log.revision + 2, *items))
        self.note()

    def read_again(self, state: State, revision: int) -> None:
        """Causes the range to be read again, as after a compaction or when etcd started on other data, perhaps at a
        lower revision."""
        self.state = dict(state)
        self.log.apply(Snapshot(revision, tuple(kv(key, value) for key, value in state.items())))
        self.note()

    def note(self) -> None:
        self.past[self.log.epoch, self.log.revision] = dict(self.state)

    def carry(self, which: int, most: int) -> None:
        if self.connected[which]:
            self.workers[which].take(most)

    def break_or_mend(self, which: int) -> None:
        (self.workers[which].lose if self.connected[which] else self.workers[which].connect)()
        self.connected[which] = not self.connected[which]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets bounds so low that a few changes of some 60 bytes each reach them."""
    monkeypatch.setattr(rangelog, "KEPT", 150)
    monkeypatch.setattr(rangelog, "MAX_BEHIND", 300)
    monkeypatch.setattr(rangelog, "PORTION", 1)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STEPS)
def test_whatever_happens_in_whatever_order_each_has_what_was_there_at_its_revision(small: None, steps: list) -> None:
    """In any order of events each worker has exactly the state of its revision, without missing or partial changes. In
    the end all workers are up to date."""
    story = Story()
    for what, *details in steps:
        getattr(story, what.replace(" ", "_"))(*details)
        for worker in story.workers:
            if worker.reading.epoch:
                assert worker.copy.state == story.past[worker.reading.epoch, worker.reading.revision]
    for worker, connected in zip(story.workers, story.connected, strict=True):
        if not connected:
            worker.connect()
        worker.take()
        assert worker.copy.state == (story.state if story.log.epoch else {})
        before = 0
        for what, revision in worker.copy.story:
            assert what == "snapshot" or revision > before
            before = revision


def test_any_bytes_come_through() -> None:
    items = [(bytes(range(256)), bytes(range(255, -1, -1))), (b"\xff", None), (b"", b"")]
    ((kind, packed),) = decoded(encode(["x", pack(items)]))
    assert (kind, unpack(packed)) == ("x", items)
