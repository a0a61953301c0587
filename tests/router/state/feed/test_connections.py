"""The feed between pod and workers: a full snapshot, then each revision complete, whatever bytes the keys contain."""

import asyncio

import pytest

from mesh.etcd import ChangeKind, Delta, Event, KeyValue, Snapshot
from router.state.feed import rangelog
from router.state.feed import server as servers
from router.state.feed.client import FeedClient
from router.state.feed.messages import encode, receive
from router.state.feed.ranges import CONFIG, PRESENCE, RANGES, VMODELS, Range
from router.state.feed.server import FeedServer
from tests.support.waiting import until


def kv(key: bytes, value: bytes = b"") -> KeyValue:
    return KeyValue(key, value, 1, 1, 1, 0)


class Recorder:
    """A reader that only records what it receives."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int, list[tuple[bytes, bytes | None]]]] = []

    def snapshot(self, revision, items):
        self.told.append(("snapshot", revision, sorted(items)))

    def delta(self, revision, items):
        self.told.append(("delta", revision, list(items)))


async def nothing():
    return {"metrics": []}


def client(path, recorder, readers=None, **more):
    options = {"ready": lambda: None, "snapshot": lambda: {"metrics": []}, "on_drain": lambda: None, **more}
    return FeedClient(str(path), "worker0", readers or {PRESENCE: recorder}, **options)


async def test_a_worker_is_told_everything_and_then_each_change(tmp_path):
    server = FeedServer(nothing)
    await server.start(str(tmp_path / "feed"))
    many = tuple(kv(b"k%04d" % number, b"\xff\0v") for number in range(1203))
    server.apply(PRESENCE, Snapshot(5, many))
    recorder = Recorder()
    worker = client(tmp_path / "feed", recorder)
    following = asyncio.create_task(worker.run())
    try:
        await until(lambda: recorder.told)
        assert recorder.told == [("snapshot", 5, [(item.key, item.value) for item in many])]
        await until(lambda: server.ready() == {"worker0": None})
        server.apply(
            PRESENCE, Delta(6, (Event(ChangeKind.PUT, kv(b"a", b"1")), Event(ChangeKind.DELETE, kv(b"k0000"))))
        )
        server.apply(PRESENCE, Delta(7, (Event(ChangeKind.PUT, kv(b"a", b"2")),)))
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
    server = FeedServer(nothing)
    try:
        await server.start(str(tmp_path / "feed"))
        await until(lambda: server.ready() == {"worker0": "nothing seen yet"})
        server.apply(PRESENCE, Snapshot(1, ()))
        await until(lambda: server.ready() == {"worker0": None})
    finally:
        following.cancel()
        await server.close()


async def test_metrics_are_asked_of_all_and_a_silent_worker_does_not_hold_them_up(tmp_path, monkeypatch):
    monkeypatch.setattr("router.state.feed.server.ASK", 0.2)
    server = FeedServer(nothing)
    await server.start(str(tmp_path / "feed"))
    workers = [client(tmp_path / "feed", Recorder(), snapshot=lambda n=n: {"metrics": [n]}) for n in range(3)]
    reader, writer = await asyncio.open_unix_connection(str(tmp_path / "feed"))
    try:
        following = [asyncio.create_task(worker.run()) for worker in workers]
        await until(lambda: len(server.ready()) == 2)  # the silent worker has not said its name
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
    """A snapshot larger than the allowed backlog is sent as fast as it is read, instead of being cut off and requested
    again. Changes that arrive meanwhile follow in order."""
    monkeypatch.setattr(rangelog, "MAX_BEHIND", 20_000)
    server = FeedServer(nothing)
    await server.start(str(tmp_path / "feed"))
    many = tuple(kv(b"k%06d" % number, b"v" * 200) for number in range(10_000))
    server.apply(PRESENCE, Snapshot(5, many))
    recorder = Recorder()
    worker = client(tmp_path / "feed", recorder)
    following = asyncio.create_task(worker.run())
    try:
        await until(lambda: server.ready(), why="the worker has connected")
        server.apply(PRESENCE, Delta(6, (Event(ChangeKind.PUT, kv(b"a", b"1")),)))
        await until(lambda: len(recorder.told) >= 2)
        assert [(kind, revision) for kind, revision, _ in recorder.told] == [("snapshot", 5), ("delta", 6)]
        assert len(recorder.told[0][2]) == len(many)
    finally:
        following.cancel()
        await server.close()


async def test_who_does_not_read_is_kept_as_little_as_who_reads(tmp_path, monkeypatch):
    """A worker that stops reading gets a snapshot when it reads again, not each change that it missed. If too many
    other messages wait for it, the pod disconnects it."""
    monkeypatch.setattr(rangelog, "MAX_BEHIND", 20_000)
    monkeypatch.setattr(servers, "_MAX_WORDS", 20_000)
    server = FeedServer(nothing)
    await server.start(str(tmp_path / "feed"))
    server.apply(PRESENCE, Snapshot(1, ()))
    reader, writer = await asyncio.open_unix_connection(str(tmp_path / "feed"), limit=1024)
    try:
        writer.write(encode(["hello", "slow", {"presence": ["", 0]}]))
        await until(lambda: "slow" in server.ready())
        for revision in range(2, 1000):
            server.apply(PRESENCE, Delta(revision, (Event(ChangeKind.PUT, kv(b"a", b"v" * 1000)),)))
            if revision % 100 == 0:
                await asyncio.sleep(0)
        assert "slow" in server.ready()
        heard = []
        while not heard or heard[-1][:2] != ["snapshot", "presence"] or heard[-1][3] != 999:
            heard.append(await asyncio.wait_for(receive(reader), 5))
        assert len(heard) < 500
        for _ in range(10_000):
            server.drain()
        await until(lambda: not server.ready(), why="the worker is disconnected")
    finally:
        writer.close()
        await server.close()


class Link:
    """A link between pod and worker that can be held, so that it carries nothing, and can be cut."""

    def __init__(self, path, target):
        self.path, self._target = str(path), str(target)
        self.open = asyncio.Event()
        self.open.set()
        self._writers = []

    async def start(self):
        self._server = await asyncio.start_unix_server(self._serve, self.path)

    async def _serve(self, reader, writer):
        upstream, downstream = await asyncio.open_unix_connection(self._target)
        self._writers += [writer, downstream]

        async def pipe(source, sink, gate=None):
            try:
                while data := await source.read(65536):
                    if gate is not None:
                        await gate.wait()
                    sink.write(data)
                    await sink.drain()
            except OSError:
                pass
            finally:
                sink.close()

        await asyncio.gather(pipe(reader, downstream), pipe(upstream, writer, self.open))

    def cut(self):
        for writer in self._writers:
            writer.transport.abort()
        self._writers = []

    def close(self):
        self._server.close()
        self.cut()


async def test_a_worker_that_connects_again_goes_on_with_each_range_where_it_was(tmp_path):
    """A worker that reconnects continues each range where it was. It gets only what it needs, whether a range has
    changed, was read from etcd again, or is unchanged."""
    server = FeedServer(nothing)
    await server.start(str(tmp_path / "feed"))
    link = Link(tmp_path / "link", tmp_path / "feed")
    await link.start()
    readers = {PRESENCE: Recorder(), CONFIG: Recorder(), VMODELS: Recorder()}
    for range in readers:
        server.apply(range, Snapshot(5, (kv(b"a", b"1"),)))
    worker = client(tmp_path / "link", None, readers)
    following = asyncio.create_task(worker.run())
    try:
        await until(lambda: worker.seen)
        link.cut()
        await until(lambda: not server.ready())
        server.apply(PRESENCE, Delta(6, (Event(ChangeKind.PUT, kv(b"b", b"2")),)))
        server.apply(CONFIG, Snapshot(9, (kv(b"c", b"3"),)))
        await until(lambda: server.ready())
        await until(lambda: len(readers[CONFIG].told) == len(readers[PRESENCE].told) == 2)
        server.apply(VMODELS, Delta(7, (Event(ChangeKind.PUT, kv(b"d", b"4")),)))
        await until(lambda: len(readers[VMODELS].told) == 2)
        assert readers[PRESENCE].told[1] == ("delta", 6, [(b"b", b"2")])
        assert readers[CONFIG].told[1] == ("snapshot", 9, [(b"c", b"3")])
        assert readers[VMODELS].told[1] == ("delta", 7, [(b"d", b"4")])
    finally:
        following.cancel()
        link.close()
        await server.close()


async def test_a_large_range_does_not_hold_up_the_others(tmp_path):
    """While a large range is being sent, a change of another range reaches the worker."""
    server = FeedServer(nothing)
    await server.start(str(tmp_path / "feed"))
    server.apply(PRESENCE, Snapshot(5, tuple(kv(b"k%06d" % number, b"v" * 200) for number in range(50_000))))
    server.apply(CONFIG, Snapshot(5, ()))
    heard = []
    reader, writer = await asyncio.open_unix_connection(str(tmp_path / "feed"))
    try:
        writer.write(encode(["hello", "w", {"presence": ["", 0], "config": ["", 0]}]))
        while not heard or heard[-1][:2] != ["snapshot", "config"]:
            heard.append(await receive(reader))
        server.apply(CONFIG, Delta(6, (Event(ChangeKind.PUT, kv(b"a", b"1")),)))
        while heard[-1][0] != "delta":
            heard.append(await receive(reader))
        assert heard[-1] == ["delta", "config", 6, [["a", "1"]]]
        assert not any(what == "snapshot" and name == "presence" for what, name, *_ in heard)
    finally:
        writer.close()
        await server.close()


async def test_a_range_that_only_the_worker_knows_is_left_out_and_the_others_work(tmp_path):
    """If an older pod does not know a range, the worker gets the other ranges, but does not count as having seen all of
    them."""
    server = FeedServer(nothing)
    await server.start(str(tmp_path / "feed"))
    server.apply(PRESENCE, Snapshot(5, ()))
    known, unknown = Recorder(), Recorder()
    later = Range("tenants", lambda keys: (b"t", b"u"))
    worker = client(tmp_path / "feed", None, {PRESENCE: known, later: unknown})
    following = asyncio.create_task(worker.run())
    try:
        await until(lambda: known.told)
        server.apply(PRESENCE, Delta(6, (Event(ChangeKind.PUT, kv(b"a", b"1")),)))
        await until(lambda: len(known.told) == 2)
        assert not unknown.told
        assert not worker.seen
    finally:
        following.cancel()
        await server.close()


async def test_a_range_that_only_the_pod_knows_is_passed_over(tmp_path):
    told = Recorder()

    async def pod(reader, writer):
        await receive(reader)
        for message in (["begin", "tenants"], ["items", "tenants", [["a", "b"]]], ["snapshot", "tenants", "e", 3]):
            writer.write(encode(message))
        writer.write(encode(["begin", "presence"]) + encode(["snapshot", "presence", "e", 4]))

    server = await asyncio.start_unix_server(pod, str(tmp_path / "feed"))
    worker = client(tmp_path / "feed", told)
    following = asyncio.create_task(worker.run())
    try:
        await until(lambda: told.told)
        assert told.told == [("snapshot", 4, [])]
        assert worker.seen
    finally:
        following.cancel()
        server.close()


async def test_the_pod_is_told_which_ranges_are_read(tmp_path):
    """The pod learns which ranges are read, so it need not follow the others."""
    wanted = []
    server = FeedServer(nothing, wanted=wanted.append)
    await server.start(str(tmp_path / "feed"))
    worker = client(tmp_path / "feed", None, {CONFIG: Recorder(), VMODELS: Recorder()})
    following = asyncio.create_task(worker.run())
    try:
        await until(lambda: len(wanted) == 2)
        assert wanted == [CONFIG, VMODELS]
        assert set(RANGES) > {range.name for range in wanted}
    finally:
        following.cancel()
        await server.close()


@pytest.mark.parametrize("nonsense", [b"\xff\xff\xff\xff", b"\0\0\0\x02{}", b"\0\0\0\x03abc", b"\0\0\0\x02[]"])
async def test_nonsense_ends_that_connection_alone(tmp_path, nonsense):
    server = FeedServer(nothing)
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


async def test_a_worker_that_is_written_nothing_more_connects_again(tmp_path, monkeypatch):
    """A worker reconnects if a fault in the pod's sending leaves it without messages. Otherwise it would keep outdated
    knowledge for the rest of its life."""
    server = FeedServer(nothing)
    await server.start(str(tmp_path / "feed"))
    server.apply(PRESENCE, Snapshot(5, (kv(b"a"),)))
    recorder = Recorder()
    following = asyncio.create_task(client(tmp_path / "feed", recorder).run())
    try:
        await until(lambda: recorder.told)
        (peer,) = server._peers

        def fails(self):
            monkeypatch.undo()
            raise ValueError("a bad message")

        monkeypatch.setattr(servers._Peer, "_take", fails)
        server.apply(PRESENCE, Delta(6, (Event(ChangeKind.PUT, kv(b"b")),)))
        await until(lambda: [kind for kind, revision, _ in recorder.told if revision == 6])
        assert peer not in server._peers
    finally:
        following.cancel()
        await server.close()


async def test_a_worker_that_hears_nothing_connects_again(tmp_path, monkeypatch):
    """A worker that receives nothing, not even the pod's heartbeat, reconnects and keeps its knowledge meanwhile."""
    server = FeedServer(nothing)
    await server.start(str(tmp_path / "feed"))
    server.apply(PRESENCE, Snapshot(5, (kv(b"a"),)))
    recorder = Recorder()
    following = asyncio.create_task(client(tmp_path / "feed", recorder).run())
    try:
        await until(lambda: recorder.told)
        first = set(server._peers)
        monkeypatch.setattr("router.state.feed.client._SILENCE", 0.05)
        server.beat()  # the worker waits no longer than this for the next sign of life
        await until(lambda: server._peers and not server._peers & first, why="the worker connects again")
        assert [kind for kind, *_ in recorder.told] == ["snapshot"], "the worker continues without a new snapshot"
    finally:
        following.cancel()
        await server.close()
