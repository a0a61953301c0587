"""The digest of a pull, which is computed from the bytes and is equal for equal files, however they are fetched."""

import hashlib
import json
import os

import pytest

from puller.pulling import tree_digest
from puller.source import Source

MIB = 2**20


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("size", [0, 1, 1000, 128 * 2**10 + 1, 3 * MIB + 7], ids=str)
async def test_the_digest_of_a_file_is_its_sha256(puller, root, size):
    """A file's digest is its SHA-256, whether it is computed while the file is listed or copied, or when the file is
    already on the pod's disk."""
    content = os.urandom(size)
    (root / "a.onnx").write_bytes(content)
    first = await puller.pull(Source(f"{root}/a.onnx"), into="m")
    again = await puller.pull(Source(f"{root}/a.onnx"), into="n")
    assert first.digest == again.digest == sha256(content)


async def test_the_digest_of_a_folder_is_of_names_sizes_and_contents(puller, root):
    """The digest of a folder covers names, sizes and contents, but not the folder's path or the order of the listing. A
    renamed file and swapped contents change the digest."""
    files = {"b/1": b"one", "a": b"two", "b/0": b""}

    async def digest(place: str, files: dict[str, bytes]) -> str:
        for name, content in files.items():
            (root / place / name).parent.mkdir(parents=True, exist_ok=True)
            (root / place / name).write_bytes(content)
        return (await puller.pull(Source(f"{root / place}"), into=place)).digest

    found = await digest("here", files)
    assert found == tree_digest((name, len(content), sha256(content)) for name, content in files.items())
    assert await digest("there/below", dict(sorted(files.items()))) == found
    assert await digest("renamed", {"b/1": b"one", "A": b"two", "b/0": b""}) != found
    assert await digest("swapped", {"b/1": b"two", "a": b"one", "b/0": b""}) != found
    assert await digest("single", {"a": b"two"}) not in (found, sha256(b"two"))


async def test_a_schema_is_part_of_the_digest(puller, root):
    """The schema is part of the digest, because a copy with another schema gives other answers."""
    (root / "m").write_bytes(b"model")
    digests = []
    for text in (b"{}", b"{} "):
        (root / "s.json").write_bytes(text)
        key = json.dumps({"schema_path": f"file://{root}/s.json"})
        digests.append((await puller.pull(Source(f"{root}/m", key), into="m")).digest)
    assert len({*digests, sha256(b"model")}) == 3


async def test_a_file_that_was_replaced_has_another_digest(puller, root):
    """A replaced file of equal size and name has another digest, because the digest is that of the pulled bytes."""
    (root / "m").write_bytes(b"old")
    old = await puller.pull(Source(f"{root}/m"), into="m")
    (root / "m").write_bytes(b"new")
    new = await puller.pull(Source(f"{root}/m"), into="m")
    assert (old.digest, new.digest) == (sha256(b"old"), sha256(b"new"))
    assert new.path.read_bytes() == b"new"
