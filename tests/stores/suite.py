"""The tests that every object store must pass. Each store's module runs all of them against its server.

They use the same path as Mesh does: settings in a storage secret, a path from a registration, the provider, sinks.
"""

import asyncio
import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from puller.credentials import Secrets
from puller.errors import PullError, PullErrorKind
from puller.http_client import HttpPolicy
from puller.limits import PullLimits
from puller.objects import ObjectProvider
from puller.provider import Listing, RemoteFile
from puller.sink import Sink
from puller.source import Location, Source, resolve
from puller.tree import lay_out
from tests.support.faults import FaultyProxy
from tests.support.stores import Store
from tests.support.waiting import until

CONTENT = os.urandom(100_000)
LARGE = os.urandom(5 * 2**20 + 7)
MANY = 1500

_buckets = itertools.count(1)


class Reach:
    """One bucket of a store, accessed as the puller does."""

    def __init__(self, store: Store, bucket: str, folder: Path) -> None:
        self.store = store
        self.bucket = bucket
        self._folder = folder
        self._numbers = itertools.count(1)
        # Parts of 1 MiB, so that 5 MiB are a large object.
        self.limits = PullLimits(connections=16, ranges=4, range_bytes=2**20)
        policy = HttpPolicy(allow_private=True, connect_timeout=5, read_timeout=5)
        self.provider = ObjectProvider(policy, self.limits)

    def location(self, path: str, *, port: int = 0, bucket: str = "", secret: str = "", **changed: str) -> Location:
        """Returns the location of a path. Its storage key refers to settings that are written into a storage secret."""
        settings = {**self.store.settings(bucket or self.bucket, port=port, secret=secret), **changed}
        secrets = self._folder / "secrets"
        secrets.mkdir(exist_ok=True)
        (secrets / "mine").write_text(json.dumps(settings))
        return resolve(Source(path, '{"storage_key": "mine"}'), secrets=Secrets(secrets)).model

    def sink(self, location: Location, file: RemoteFile) -> tuple[Path, Sink]:
        path = self._folder / f"file-{next(self._numbers)}"
        return path, Sink(path, shown=location.shown, limits=self.limits, admit=lambda size: None, size=file.size)

    async def read(self, location: Location, file: RemoteFile) -> bytes:
        path, sink = self.sink(location, file)
        try:
            await self.provider.read(location, file, sink)
            sink.finish()
        finally:
            sink.close()
        return path.read_bytes()

    async def listed(self, location: Location) -> tuple[Listing, dict[str, RemoteFile]]:
        listing = await self.provider.listing(location)
        if not listing.is_file:
            lay_out([file.path for file in listing.files], listing.folders, location.shown)
        return listing, {file.path: file for file in listing.files}

    async def fetch(self, path: str, **changed: str) -> dict[str, bytes]:
        """Returns the content of each file at a path, by name."""
        location = self.location(path, **changed)
        _, files = await self.listed(location)
        bodies = await asyncio.gather(*(self.read(location, file) for file in files.values()))
        return dict(zip(files, bodies, strict=True))

    async def put(self, objects: Mapping[str, bytes]) -> None:
        await self.store.put(self.bucket, objects)

    async def refused(self, location: Location, kind: PullErrorKind) -> str:
        async def all_of_it() -> None:
            _, files = await self.listed(location)
            for file in files.values():
                await self.read(location, file)

        with pytest.raises(PullError) as caught:
            await all_of_it()
        assert caught.value.kind is kind, caught.value
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__ or caught.value.__context__ is None
        return caught.value.text


class StoreSuite:
    """The base class of each store's tests. The module of a subclass defines the fixture `store`."""

    @pytest.fixture
    async def reach(self, store: Store, tmp_path: Path):
        bucket = f"b{next(_buckets)}-{os.getpid()}"
        await store.make(bucket)
        reach = Reach(store, bucket, tmp_path)
        yield reach
        await reach.provider.close()

    async def test_a_single_file(self, reach):
        """A single file is fetched by URI, or by path and key, without the objects beside it."""
        await reach.put({"models/a.onnx": CONTENT, "models/a.onnx.bak": b"x", "models/a": b"y"})
        for path in ("models/a.onnx", "/models/a.onnx", reach.store.uri(reach.bucket, "models/a.onnx")):
            assert await reach.fetch(path) == {"": CONTENT}
        listing, _ = await reach.listed(reach.location("models/a.onnx"))
        assert listing.is_file
        assert listing.files[0].size == len(CONTENT)

    async def test_a_large_file_comes_in_parts(self, reach):
        """The file is larger than a part, so it is fetched in several ranges."""
        await reach.put({"large": LARGE})
        assert await reach.fetch("large") == {"": LARGE}

    @pytest.mark.long
    async def test_a_tree_of_any_number_of_objects(self, reach):
        """A tree of 1,500 objects, more than a page of any store, is listed completely, without objects of another tree
        whose name begins alike."""
        tree = {f"tree/{number % 7}/{number}.bin": b"%d" % number for number in range(MANY)}
        await reach.put({**tree, "tree-2/other": b"x", "tre": b"y"})
        for path in ("tree", "tree/"):
            _, files = await reach.listed(reach.location(path))
            assert set(files) == {key.removeprefix("tree/") for key in tree}
        location = reach.location("tree")
        some = list(files.values())[::60]
        bodies = await asyncio.gather(*(reach.read(location, file) for file in some))
        assert bodies == [tree["tree/" + file.path] for file in some]

    async def test_empty_files_stay(self, reach):
        """An empty file is fetched, both as part of a model's tree and alone."""
        await reach.put({"t/empty": b"", "t/full": b"x"})
        assert await reach.fetch("t") == {"empty": b"", "full": b"x"}
        assert await reach.fetch("t/empty") == {"": b""}

    @pytest.mark.long
    @pytest.mark.parametrize("key", ["t/junk//b", "t/./here", "t/a/../up"])
    async def test_a_key_that_no_file_can_have(self, reach, key):
        """A key that cannot be a file name is skipped with the reason. All other objects are listed and can be fetched,
        however many they are and even if their names are unusual."""
        if reach.store.scheme == "s3" and reach.store.checks_credentials:
            pytest.skip("versitygw keeps objects as files, so it has no such keys")
        tree = {f"{number}": b"%d" % number for number in range(1100)} | {"a b+%41&<é": b"2", "sub/deep": b"3"}
        await reach.put({f"t/{name}": content for name, content in tree.items()})
        await reach.store.put_odd(reach.bucket, key)
        location = reach.location("t")
        listing, files = await reach.listed(location)
        assert set(files) == set(tree)
        assert len(listing.skipped) == 1
        for name in ("7", "a b+%41&<é", "sub/deep"):
            assert await reach.read(location, files[name]) == tree[name]

    async def test_an_object_before_a_tree_of_its_name(self, reach):
        """A path without a final "/" means the object of that name if it exists, even if there is also a tree below it.
        With "/" it means the tree."""
        if reach.store.scheme != "s3" or not reach.store.checks_credentials:  # versitygw keeps objects as files
            await reach.put({"m": b"file", "m/x": b"below"})
            assert await reach.fetch("m") == {"": b"file"}
            assert await reach.fetch("m/") == {"x": b"below"}

    async def test_nothing_there(self, reach):
        """The error for a missing object or an empty folder names the place."""
        await reach.put({"models/a.onnx": CONTENT})
        for path in ("models/b.onnx", "models/a", "models/a.onnx/b"):
            text = await reach.refused(reach.location(path), PullErrorKind.NOT_FOUND)
            assert reach.store.uri(reach.bucket, path) in text
        text = await reach.refused(reach.location("nothing/"), PullErrorKind.EMPTY)
        assert reach.store.uri(reach.bucket, "nothing/") in text

    async def test_no_such_bucket(self, reach):
        """The error for a missing bucket differs from that for a missing object."""
        location = reach.location("models/a.onnx", bucket="there-is-none")
        if reach.store.scheme == "gs":
            pytest.skip("fake-gcs-server answers 500 for a bucket that is not there; Google 404 and NoSuchBucket")
        assert "bucket" in await reach.refused(location, PullErrorKind.NO_BUCKET)

    async def test_wrong_credentials(self, reach):
        """The error for wrong credentials says so and does not show them."""
        if not reach.store.checks_credentials:
            pytest.skip("this server does not check credentials")
        await reach.put({"a": CONTENT})
        secret = "wrong-secret-0123456789-never-shown"
        for path in ("a", "tree/"):
            text = await reach.refused(reach.location(path, secret=secret), PullErrorKind.CREDENTIALS)
            assert "credentials" in text
            assert secret not in text

    async def test_changed_between_two_loads(self, reach):
        """A file that changed between two loads is fetched again and has a new identity."""
        await reach.put({"a": CONTENT, "b": CONTENT})
        first = (await reach.listed(reach.location("a")))[1][""]
        assert first == (await reach.listed(reach.location("a")))[1][""]
        await reach.put({"a": CONTENT[::-1]})
        location = reach.location("a")
        second = (await reach.listed(location))[1][""]
        assert await reach.read(location, second) == CONTENT[::-1]
        assert first.identity is not None
        assert first.identity != second.identity
        other = (await reach.listed(reach.location("b")))[1][""]
        assert other.identity not in (first.identity, second.identity), (
            "a store's name for a version belongs to one key"
        )

    async def test_changed_between_listing_and_reading(self, reach):
        """If a file changes between listing and reading, the pull fails rather than mixing both contents."""
        await reach.put({"a": LARGE})
        location = reach.location("a")
        listed = (await reach.listed(location))[1][""]
        await reach.put({"a": LARGE[::-1]})
        with pytest.raises(PullError) as caught:
            await reach.read(location, listed)
        assert caught.value.kind is PullErrorKind.CHANGED

    async def test_a_truncated_body_goes_on_where_it_ended(self, reach):
        """A truncated body is an error. The next attempt reads only the missing part, and the file is right."""
        await reach.put({"a": LARGE})
        async with FaultyProxy(reach.store.port, by_name=reach.store.scheme == "gs") as proxy:
            location = reach.location("a", port=proxy.port)
            file = (await reach.listed(location))[1][""]
            path, sink = reach.sink(location, file)
            # Two parts: the first arrives, the second does not.
            reach.limits.ranges = 1
            reach.limits.range_bytes = 3 * 2**20
            proxy.cut_after(4 * 2**20, once=True)
            with pytest.raises(PullError) as caught:
                await reach.provider.read(location, file, sink)
            assert caught.value.kind in (PullErrorKind.INTEGRITY, PullErrorKind.UNREACHABLE), caught.value
            assert proxy.faults == 1
            there = sink.written
            assert there > 2 * 2**20
            before = proxy.passed
            await reach.provider.read(location, file, sink)
            assert proxy.passed - before < len(LARGE) - there + 2**16, "the puller fetched bytes again that it had"
            assert sink.finish() == len(LARGE)
            sink.close()
        assert path.read_bytes() == LARGE

    async def test_a_server_that_dies(self, reach):
        """A server that dies during a transfer, or does not run, is a passing failure. The error names a server that
        does not run."""
        await reach.put({"a": LARGE})
        async with FaultyProxy(reach.store.port, by_name=reach.store.scheme == "gs") as proxy:
            location = reach.location("a", port=proxy.port)
            file = (await reach.listed(location))[1][""]
            proxy.stall_after(600_000)
            _, sink = reach.sink(location, file)
            reading = asyncio.create_task(reach.provider.read(location, file, sink))
            await until(lambda: proxy.faults)
            await proxy.die()
            with pytest.raises(PullError) as caught:
                await reading
            assert caught.value.kind in (PullErrorKind.INTEGRITY, PullErrorKind.UNREACHABLE)
            assert caught.value.kind.retried
            sink.close()
            text = await reach.refused(location, PullErrorKind.UNREACHABLE)
            assert f"127.0.0.1:{proxy.port}" in text

    async def test_a_server_that_stalls(self, reach):
        """If a server stalls, the pull ends with a timeout when the read timeout has passed."""
        await reach.put({"a": LARGE})
        provider = ObjectProvider(HttpPolicy(read_timeout=0.3), reach.limits)
        async with FaultyProxy(reach.store.port, by_name=reach.store.scheme == "gs") as proxy:
            location = reach.location("a", port=proxy.port)
            file = (await reach.listed(location))[1][""]
            proxy.stall_after(600_000)
            _, sink = reach.sink(location, file)
            with pytest.raises(PullError) as caught:
                await provider.read(location, file, sink)
            assert caught.value.kind is PullErrorKind.TIMEOUT
            sink.close()
        await provider.close()

    async def test_a_cancelled_pull_leaves_at_once(self, reach):
        """A cancelled pull closes its connections, even if the server is silent, and they no longer count against the
        limits."""
        await reach.put({"a": LARGE})
        async with FaultyProxy(reach.store.port, by_name=reach.store.scheme == "gs") as proxy:
            location = reach.location("a", port=proxy.port)
            file = (await reach.listed(location))[1][""]
            proxy.stall_after(600_000)
            _, sink = reach.sink(location, file)
            reading = asyncio.create_task(reach.provider.read(location, file, sink))
            await until(lambda: proxy.faults)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            sink.close()
            proxy.heal()
            assert reach.limits.statistics().connections == 0
            await reach.provider.close()
            await proxy.idle()

    async def test_clients_are_kept(self, reach):
        """One client is kept for each set of settings: a rotated secret makes another client, but the same secret does
        not."""
        await reach.put({"a": CONTENT})
        for changed in ({}, {}, {"note": "rotated"}, {}):
            assert await reach.fetch("a", **changed) == {"": CONTENT}
        assert len(reach.provider._clients) == 2
