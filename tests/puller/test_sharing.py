"""Files that several models share, files derived from models, and the leftovers of a crash, tested with a complete
puller."""

import asyncio
import base64
import hashlib
import json
import os
import signal
import sys
import threading

import pytest
from aiohttp import web

from mesh import process
from puller.errors import PullError, PullErrorKind
from puller.http_client import HttpPolicy
from puller.puller import Puller
from puller.source import Source
from puller.threads import Threads
from tests.support.once import ONCE
from tests.support.waiting import until

MIB = 2**20
# A size beyond socket buffers: a body that nobody reads is never sent completely, and so not counted.
CONTENT = os.urandom(8 * MIB)
OTHER = os.urandom(7 * MIB)


class Store:
    """A real HTTP server that counts complete bodies, and sends digests or not."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.bodies: list[str] = []
        self.digest = True
        self.gate = asyncio.Event()
        self.held: set[str] = set()  # names of files whose bodies wait
        self.waiting = 0
        self.port = 0

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.port}/{name}"

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        name = request.path[1:]
        content = self.files.get(name)
        if content is None:
            return web.Response(status=404)
        tag = f'"{hashlib.md5(content + name.encode()).hexdigest()}"'
        if request.headers.get("If-None-Match") == tag:
            return web.Response(status=304)
        response = web.StreamResponse(headers={"ETag": tag})
        if self.digest:
            raw = hashlib.sha256(content).digest()
            response.headers["Repr-Digest"] = f"sha-256=:{base64.b64encode(raw).decode()}:"
        response.content_length = len(content)
        await response.prepare(request)
        await response.write(content[:1000])
        if name in self.held:
            self.waiting += 1
            await self.gate.wait()
        await response.write(content[1000:])
        self.bodies.append(name)
        return response


@pytest.fixture
async def store():
    store = Store()
    runner = web.ServerRunner(web.Server(store.answer))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    store.port = runner.addresses[0][1]
    yield store
    store.gate.set()
    await runner.cleanup()


def make(folder, **more) -> Puller:
    policy = HttpPolicy(allow_private=True, connect_timeout=5, read_timeout=10)
    puller = Puller(directory=folder, http=policy, retries=ONCE, **more)
    puller.sweep()
    return puller


@pytest.fixture
async def puller(tmp_path):
    puller = make(tmp_path / "models", budget_bytes=30 * MIB)
    yield puller
    await puller.close()


async def test_two_models_and_two_revisions_with_equal_files_are_one_download(puller, store):
    """Files that are equal according to the store's digest are downloaded once, and are one file on disk, under each
    model's own name."""
    store.files = {"a.onnx": CONTENT, "v2/b.onnx": CONTENT}
    first = await puller.pull(Source(store.url("a.onnx")), into="a")
    second = await puller.pull(Source(store.url("v2/b.onnx")), into="b")
    third = await puller.pull(Source(store.url("a.onnx")), into="a")
    assert [pulled.path.name for pulled in (first, second, third)] == ["a.onnx", "b.onnx", "a.onnx"]
    assert second.path.read_bytes() == third.path.read_bytes() == CONTENT
    assert store.bodies == ["a.onnx"]
    assert os.stat(second.path).st_ino == os.stat(third.path).st_ino
    assert (second.fetched_bytes, puller.statistics().fetched_bytes) == (0, len(CONTENT))
    assert first.digest == second.digest == third.digest == hashlib.sha256(CONTENT).hexdigest()


async def test_pulls_of_one_file_at_once_are_one_download(puller, store):
    """The later ones of five concurrent pulls of one file wait for the first, and show its progress."""
    store.files = {"a": CONTENT}
    store.held = {"a"}
    pulls = [asyncio.create_task(puller.pull(Source(store.url("a")), into=f"m{number}")) for number in range(5)]
    await until(lambda: store.waiting >= 1 and len(puller.statistics().progress) == 5, why="all have begun")
    progress = puller.progress("m3")
    assert progress is not None
    assert progress.total_bytes == len(CONTENT)
    store.gate.set()
    await asyncio.gather(*pulls)
    assert store.bodies.count("a") == 1
    assert puller.progress("m3") is None


async def test_the_first_of_several_that_leaves_does_not_end_it(puller, store):
    store.files = {"a": CONTENT}
    store.held = {"a"}
    pulls = [asyncio.create_task(puller.pull(Source(store.url("a")), into=f"m{number}")) for number in range(2)]
    await until(lambda: store.waiting >= 1 and len(puller.statistics().progress) == 2, why="both have begun")
    pulls[0].cancel()
    store.gate.set()
    assert (await pulls[1]).path.read_bytes() == CONTENT
    with pytest.raises(asyncio.CancelledError):
        await pulls[0]


async def test_a_changed_file_is_noticed_at_the_next_pull(puller, store):
    """Without a digest from the store, a changed file is noticed by its ETag."""
    store.digest = False
    store.files = {"a": CONTENT}
    assert (await puller.pull(Source(store.url("a")), into="m")).path.read_bytes() == CONTENT
    await puller.remove("m")
    assert puller.remembers("m")
    assert (await puller.pull(Source(store.url("a")), into="m")).fetched_bytes == 0
    store.files = {"a": OTHER}
    assert (await puller.pull(Source(store.url("a")), into="m")).path.read_bytes() == OTHER
    assert store.bodies == ["a", "a"]


async def test_a_registration_names_the_digest(puller, store):
    """A registration with a digest gets the file with that digest, even from the disk, whatever the store calls it. Any
    other file is refused, and the error names both digests."""
    store.digest = False
    store.files = {"a": CONTENT, "b": CONTENT, "c": OTHER}
    right = hashlib.sha256(CONTENT).hexdigest()
    await puller.pull(Source(store.url("a"), sha256=right), into="a")
    await puller.pull(Source(store.url("b"), sha256=right.upper()), into="b")
    assert store.bodies == ["a"]
    with pytest.raises(PullError) as caught:
        await puller.pull(Source(store.url("c"), sha256=right), into="c")
    assert caught.value.kind is PullErrorKind.CHECKSUM
    assert right in caught.value.text
    assert hashlib.sha256(OTHER).hexdigest() in caught.value.text
    for wrong in ("abc", "x" * 64):
        with pytest.raises(PullError, match="64 hexadecimal"):
            await puller.pull(Source(store.url("a"), sha256=wrong), into="d")


async def test_a_full_budget_lets_only_unused_files_go(puller, store):
    """When the budget is used up, only unused files are evicted. A file that does not fit next to the used ones is
    refused."""
    store.files = {"a": CONTENT, "b": OTHER, "c": os.urandom(10 * MIB), "d": os.urandom(10 * MIB)}
    for name in "abc":
        await puller.pull(Source(store.url(name)), into=name)
    with pytest.raises(PullError) as caught:
        await puller.pull(Source(store.url("d")), into="d")
    assert caught.value.kind is PullErrorKind.DISK_FULL
    await puller.remove("a")
    await puller.pull(Source(store.url("d")), into="d")
    assert not puller.remembers("a")
    assert puller.remembers("b")
    assert puller.remembers("c")


async def test_what_was_made_of_a_model_comes_with_equal_files_only(puller, store, tmp_path):
    """A file derived from a model is kept under a tag, as long as the model's folder is that of the same pull. It is
    found only with the same tag and equal model files."""
    store.files = {"a": CONTENT}
    pulled = await puller.pull(Source(store.url("a")), into="m", tag="v1")
    assert pulled.derived is None
    made = puller.directory / "made"
    made.write_bytes(b"quicker")
    assert await puller.keep("m", pulled, "v1", made)
    assert not made.exists()
    again = await puller.pull(Source(store.url("a")), into="other", tag="v1")
    assert again.derived is not None
    assert again.derived.read_bytes() == b"quicker"
    assert again.bytes == len(CONTENT)
    assert (await puller.pull(Source(store.url("a")), into="m", tag="v2")).derived is None
    store.files = {"a": OTHER}
    assert (await puller.pull(Source(store.url("a")), into="m", tag="v1")).derived is None
    made.write_bytes(b"x")
    assert not await puller.keep("m", pulled, "v3", made), "the folder belongs to another pull"
    latest = await puller.pull(Source(store.url("a")), into="m", tag="v3")
    assert puller.current("m", latest)
    await puller.remove("m")
    assert not await puller.keep("m", latest, "v3", made)
    assert made.exists()


async def test_a_file_that_cannot_be_adopted_stays_its_callers(puller, store, monkeypatch):
    store.files = {"a": CONTENT}
    pulled = await puller.pull(Source(store.url("a")), into="m", tag="v1")
    made = puller.directory / "made"
    made.write_bytes(b"quicker")

    def add(path, **_):
        raise OSError("no space left")

    monkeypatch.setattr(puller._cache, "add", add)
    assert not await puller.keep("m", pulled, "v1", made)
    assert made.read_bytes() == b"quicker"


async def test_a_removal_that_comes_late_hits_no_later_pull(puller, store, monkeypatch):
    """A slow removal does not affect a later pull, because the folder is renamed at once and removed later."""
    store.files = {"a": CONTENT}
    await puller.pull(Source(store.url("a")), into="m")
    busy = threading.Event()
    blocked = [puller._threads.begin(busy.wait, 10) for _ in range(8)]
    monkeypatch.setattr("puller.puller._REMOVE_WAIT", 0.0)
    await puller.remove("m")
    pulled = await puller.pull(Source(store.url("a")), into="m")
    busy.set()
    await asyncio.gather(*blocked)
    await puller._threads.run(lambda: None)
    assert pulled.path.read_bytes() == CONTENT
    assert puller.statistics().cache.used_bytes == len(CONTENT)


async def test_room_that_nobody_takes_is_given_back():
    """Reserved room is released if its pull is cancelled while a thread evicts files for it."""
    threads = Threads(1, "test")
    begun, go_on, undone = threading.Event(), threading.Event(), []

    def work() -> str:
        begun.set()
        go_on.wait(10)
        return "room"

    task = asyncio.ensure_future(threads.run(work, undo=undone.append))
    await until(begun.is_set)
    task.cancel()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert undone == ["room"]
    threads.close()


async def test_files_may_be_called_anything(puller, store):
    """Files may have any name, even one that the puller itself could use."""
    store.files = {"_derived": CONTENT, "_schema.json": OTHER, "s/_schema.json": CONTENT}
    pulled = await puller.pull(Source(store.url("_derived")), into="m", tag="v1")
    made = puller.directory / "made"
    made.write_bytes(b"quicker")
    assert await puller.keep("m", pulled, "v1", made)
    again = await puller.pull(Source(store.url("_derived")), into="m", tag="v1")
    assert (again.path.read_bytes(), again.derived.read_bytes()) == (CONTENT, b"quicker")
    key = json.dumps({"schema_path": store.url("s/_schema.json")})
    both = await puller.pull(Source(store.url("_schema.json"), key), into="n")
    assert (both.path.read_bytes(), both.schema.read_bytes()) == (OTHER, CONTENT)


async def test_hosts_that_cannot_be(puller):
    """An invalid host is refused as a bad request or as an unknown name."""
    for url in ("http://a..b/x", f"http://{'a' * 70}.example/x"):
        with pytest.raises(PullError) as caught:
            await puller.pull(Source(url), into="m")
        assert caught.value.kind in (PullErrorKind.BAD_REQUEST, PullErrorKind.DNS)


_CHILD = """
import asyncio, sys
from pathlib import Path
from puller.http_client import HttpPolicy
from puller.puller import Puller
from puller.source import Source

async def main():
    puller = Puller(directory=Path(sys.argv[1]), http=HttpPolicy(allow_private=True))
    puller.sweep()
    await puller.pull(Source(sys.argv[2]), into="whole")
    await puller.close()  # which waits until it is safe on disk
    puller = Puller(directory=Path(sys.argv[1]), http=HttpPolicy(allow_private=True))
    puller.sweep()
    await puller.pull(Source(sys.argv[2]), into="whole")
    print("whole", flush=True)
    await puller.pull(Source(sys.argv[3]), into="half")

asyncio.run(main())
"""


async def test_a_kill_in_the_middle_leaves_nothing_half(tmp_path, store):
    """When a pull is killed midway, the next process reuses complete files, removes incomplete ones, and leaves no
    folder of the pull."""
    store.files = {"whole": CONTENT, "half": OTHER}
    store.held = {"half"}
    lines: list[str] = []
    child = await process.spawn(
        [sys.executable, "-c", _CHILD, str(tmp_path / "models"), store.url("whole"), store.url("half")],
        name="puller",
        on_line=lines.append,
    )
    await until(lambda: "whole" in lines, timeout=30, why=lambda: f"the first is there: {lines}")
    await until(lambda: store.waiting == 1, timeout=30, why="the second file has arrived by half")
    child.send_signal(signal.SIGKILL)
    await child.wait(10)
    store.gate.set()
    puller = make(tmp_path / "models")
    try:
        left = {entry.name for entry in puller.directory.iterdir()}
        assert left == {".lock", ".blobs"}
        before = store.bodies.count("whole")
        assert (await puller.pull(Source(store.url("whole")), into="m")).path.read_bytes() == CONTENT
        assert (await puller.pull(Source(store.url("half")), into="n")).path.read_bytes() == OTHER
        assert store.bodies.count("whole") == before
    finally:
        await puller.close()
