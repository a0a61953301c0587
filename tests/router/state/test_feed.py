"""The feed between pod and workers: everything, then each revision whole, whatever bytes the keys are made of."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.etcd import Delta, Event, KeyValue, Kind, Snapshot
from router.state import feed
from tests.support.waiting import until
from tests.support.worlds import World


def kv(key: bytes, value: bytes = b"") -> KeyValue:
    return KeyValue(key, value, 1, 1, 1, 0)


class Recorder(World):
    """A view that only writes down what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[str, int, list[tuple[bytes, bytes | None]]]] = []

    def snapshot(self, revision, items):
        self.told.append(("snapshot", revision, sorted(items)))

    def delta(self, revision, items):
        self.told.append(("delta", revision, list(items)))


async def nothing():
    return {"metrics": []}


def client(path, recorder, **more):
    options = {"ready": lambda: None, "snapshot": lambda: {"metrics": []}, "on_drain": lambda: None, **more}
    return feed.FeedClient(str(path), "worker0", recorder, **options)


@given(st.lists(st.tuples(st.binary(), st.none() | st.binary())))
def test_any_bytes_come_through(items):
    message = feed.encode(["delta", 1, feed._pack(items)])
    reader = asyncio.StreamReader(loop=asyncio.new_event_loop())
    try:
        reader.feed_data(message)
        kind, revision, packed = reader._loop.run_until_complete(feed.receive(reader))
        assert (kind, revision) == ("delta", 1)
        assert feed._unpack(packed) == items
    finally:
        reader._loop.close()


async def test_a_worker_is_told_everything_and_then_each_change(tmp_path):
    server = feed.FeedServer(nothing)
    await server.start(str(tmp_path / "feed"))
    many = tuple(kv(b"k%04d" % number, b"\xff\0v") for number in range(1203))
    server.apply(Snapshot(5, many))
    recorder = Recorder()
    worker = client(tmp_path / "feed", recorder)
    following = asyncio.create_task(worker.run())
    try:
        await until(lambda: recorder.told)
        assert recorder.told == [("snapshot", 5, [(item.key, item.value) for item in many])]
        await until(lambda: server.ready() == {"worker0": None})
        server.apply(Delta(6, (Event(Kind.PUT, kv(b"a", b"1")), Event(Kind.DELETE, kv(b"k0000")))))
        server.apply(Delta(7, (Event(Kind.PUT, kv(b"a", b"2")),)))
        await until(lambda: len(recorder.told) == 3)
        assert recorder.told[1:] == [
            ("delta", 6, [(b"a", b"1"), (b"k0000", None)]),
            ("delta", 7, [(b"a", b"2")]),
        ]
        late = Recorder()
        other = client(tmp_path / "feed", late)
        other_following = asyncio.create_task(other.run())
        await until(lambda: late.told)
        (first,) = late.told
        assert first[1] == 7
        assert dict(first[2])[b"a"] == b"2"
        assert b"k0000" not in dict(first[2])
        other_following.cancel()
    finally:
        following.cancel()
        await server.close()


async def test_a_worker_waits_for_the_pod_and_for_its_first_view(tmp_path):
    recorder = Recorder()
    worker = client(tmp_path / "feed", recorder, ready=lambda: None if worker.seen else "nothing seen yet")
    following = asyncio.create_task(worker.run())
    server = feed.FeedServer(nothing)
    try:
        await server.start(str(tmp_path / "feed"))
        await until(lambda: server.ready() == {"worker0": "nothing seen yet"})
        server.apply(Snapshot(1, ()))
        await until(lambda: server.ready() == {"worker0": None})
    finally:
        following.cancel()
        await server.close()


async def test_metrics_are_asked_of_all_and_a_silent_worker_does_not_hold_them_up(tmp_path, monkeypatch):
    monkeypatch.setattr("router.state.feed._ASK", 0.2)
    server = feed.FeedServer(nothing)
    await server.start(str(tmp_path / "feed"))
    workers = [client(tmp_path / "feed", Recorder(), snapshot=lambda n=n: {"metrics": [n]}) for n in range(3)]
    reader, writer = await asyncio.open_unix_connection(str(tmp_path / "feed"))
    try:
        following = [asyncio.create_task(worker.run()) for worker in workers]
        await until(lambda: len(server.ready()) == 2)  # the silent one has not said its name
        await until(lambda: len(server._peers) == 4)
        found = await server.snapshots()
        assert sorted(snapshot["metrics"] for snapshot in found) == [[0], [1], [2]]
    finally:
        writer.close()
        for one in following:
            one.cancel()
        await server.close()
    assert reader is not None


async def test_a_snapshot_larger_than_anybody_may_be_behind_is_sent_as_it_is_read(tmp_path, monkeypatch):
    """It was cut, asked for again, and cut again. Changes that come meanwhile follow it in their order."""
    monkeypatch.setattr("router.state.feed._MAX_BEHIND", 20_000)
    server = feed.FeedServer(nothing)
    await server.start(str(tmp_path / "feed"))
    many = tuple(kv(b"k%06d" % number, b"v" * 200) for number in range(10_000))
    server.apply(Snapshot(5, many))
    recorder = Recorder()
    worker = client(tmp_path / "feed", recorder)
    following = asyncio.create_task(worker.run())
    try:
        await until(lambda: server.ready(), why="it has connected")
        server.apply(Delta(6, (Event(Kind.PUT, kv(b"a", b"1")),)))
        await until(lambda: len(recorder.told) >= 2)
        assert [(kind, revision) for kind, revision, _ in recorder.told] == [("snapshot", 5), ("delta", 6)]
        assert len(recorder.told[0][2]) == len(many)
    finally:
        following.cancel()
        await server.close()


async def test_who_does_not_read_changes_is_let_go(tmp_path, monkeypatch):
    monkeypatch.setattr("router.state.feed._MAX_BEHIND", 20_000)
    server = feed.FeedServer(nothing)
    await server.start(str(tmp_path / "feed"))
    reader, writer = await asyncio.open_unix_connection(str(tmp_path / "feed"), limit=1024)
    try:
        await until(lambda: server._peers)
        for revision in range(1, 1000):
            server.apply(Delta(revision, (Event(Kind.PUT, kv(b"a", b"v" * 1000)),)))
            if revision % 100 == 0:
                await asyncio.sleep(0)
        await until(lambda: not server._peers, why="it is let go")
    finally:
        writer.close()
        await server.close()
    assert reader is not None


@pytest.mark.parametrize("nonsense", [b"\xff\xff\xff\xff", b"\0\0\0\x02{}", b"\0\0\0\x03abc", b"\0\0\0\x02[]"])
async def test_nonsense_ends_that_connection_alone(tmp_path, nonsense):
    server = feed.FeedServer(nothing)
    await server.start(str(tmp_path / "feed"))
    worker = client(tmp_path / "feed", Recorder())
    following = asyncio.create_task(worker.run())
    try:
        await until(lambda: server.ready())
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "feed"))
        writer.write(nonsense)
        assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()
        assert server.ready() == {"worker0": None}
    finally:
        following.cancel()
        await server.close()
