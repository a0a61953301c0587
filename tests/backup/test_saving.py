"""Backups, which show the registry at one revision, whatever changes while they are made."""

import io

import pytest

from mesh.cli.backup import file, saving
from mesh.etcd import Etcd, EtcdCompacted
from mesh.schema.keys import Keys
from tests.support.etcd import EtcdServer


async def filled(etcd: Etcd, keys: Keys) -> file.Header:
    """Writes three models to etcd, and returns the header of their backup."""
    for name in "abc":
        await etcd.put(keys.model(name), b"before")
    return await saving.header(etcd, keys, by="test")


async def test_what_changes_meanwhile_is_not_in_it(etcd: Etcd, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backup contains no change that was made after the backup began, on any of its pages."""
    monkeypatch.setattr(saving, "PAGE", 1)
    header = await filled(etcd, keys)
    await etcd.put(keys.model("a"), b"after")
    await etcd.delete(keys.model("b"))
    await etcd.put(keys.model("d"), b"after")
    await etcd.put(keys.setting("s"), b"after")
    stream, seen = io.BytesIO(), []
    await saving.save(etcd, keys, header, stream, seen.append)
    assert seen[:3] == [1, 2, 3]
    stream.seek(0)
    assert file.verify(stream) == header
    stream.seek(0)
    assert [(entry.name, entry.value) for entry in file.entries(stream)] == [
        (b"a", b"before"),
        (b"b", b"before"),
        (b"c", b"before"),
    ]


async def test_a_revision_that_etcd_forgets_ends_it(own_etcd: EtcdServer, keys: Keys) -> None:
    """If etcd compacts the revision of a backup, the backup ends with an error instead of mixing two revisions."""
    async with Etcd(own_etcd.settings) as etcd:
        header = await filled(etcd, keys)
        await etcd.put(keys.model("a"), b"after")
        await own_etcd.compact()
        with pytest.raises(EtcdCompacted):
            await saving.save(etcd, keys, header, io.BytesIO(), lambda _: None)
