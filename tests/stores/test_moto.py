"""S3 as moto's server implements it, and what only S3 has: folder markers and odd keys."""

import asyncio

import pytest

from puller.errors import PullErrorKind
from puller.tree import lay_out
from tests.stores.suite import StoreSuite
from tests.support.stores import Moto


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    server = Moto(tmp_path_factory.mktemp("moto"))
    yield server
    server.stop()


class TestMoto(StoreSuite):
    async def test_folder_markers(self, reach):
        """Objects that consoles create for folders are not files of the model, but an empty folder stays a folder."""
        await reach.put({"t/sub/a": b"x", "t/zero": b""})
        for key in ("t/", "t/sub/", "t/hollow/"):
            await reach.store.mark(reach.bucket, key)
        listing, files = await reach.listed(reach.location("t"))
        assert set(files) == {"sub/a", "zero"}
        assert set(listing.folders) == {"sub", "hollow"}

    async def test_only_markers(self, reach):
        """A folder that contains only folders counts as empty."""
        for key in ("t/", "t/sub/"):
            await reach.store.mark(reach.bucket, key)
        assert "no files" in await reach.refused(reach.location("t"), PullErrorKind.EMPTY)

    @pytest.mark.parametrize("key", ["t/junk//b", "t/../up", "t/./here", "t//", "t/a\\b", "t/._a", "t/sub/.nfs01"])
    async def test_keys_that_no_file_can_have(self, reach, key):
        """Keys that cannot be file names are skipped with the reason. Everything else is fetched, even unusual
        names."""
        files = {"-x": b"1", "a b+%41&<é": b"2", "sub/deep": b"3", "empty": b"", "~": b"4"}
        await reach.put({f"t/{name}": content for name, content in files.items()})
        await asyncio.to_thread(boto(reach.store).put_object, Bucket=reach.bucket, Key=key, Body=b"x")
        listing, _ = await reach.listed(reach.location("t"))
        layout = lay_out([file.path for file in listing.files], listing.folders, "t")
        assert {str(path) for _, path in layout.files} == set(files)
        assert len(listing.skipped + layout.skipped) == 1
        location = reach.location("t")
        for number, path in layout.files:
            assert await reach.read(location, listing.files[number]) == files[str(path)]

    async def test_only_a_key_that_no_file_can_have(self, reach):
        """If a tree's only key cannot be a file name, the error names the key."""
        await asyncio.to_thread(boto(reach.store).put_object, Bucket=reach.bucket, Key="t//b", Body=b"x")
        assert "'/b'" in await reach.refused(reach.location("t"), PullErrorKind.EMPTY)

    @pytest.mark.long
    async def test_a_long_listing_with_such_a_key(self, reach):
        """A listing of several pages is read completely, even if one of its keys cannot be a file name."""
        await reach.put({f"t/{number}": b"x" for number in range(1100)})
        await asyncio.to_thread(boto(reach.store).put_object, Bucket=reach.bucket, Key="t/5//b", Body=b"x")
        _, files = await reach.listed(reach.location("t"))
        assert len(files) == 1100

    async def test_the_whole_bucket(self, reach):
        """A path that names only its bucket means the whole bucket."""
        await reach.put({"a": b"1", "b/c": b"2"})
        assert await reach.fetch(f"s3://{reach.bucket}") == {"a": b"1", "b/c": b"2"}
        assert await reach.fetch("") == {"a": b"1", "b/c": b"2"}


def boto(store: Moto):
    """Returns a boto3 client, which can write keys that obstore refuses."""
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{store.port}",
        region_name="us-east-1",
        aws_access_key_id=store.access,
        aws_secret_access_key=store.secret,
    )
