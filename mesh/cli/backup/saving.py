"""Creating a backup from all records of a mesh at one revision of etcd, page by page."""

import datetime
from collections.abc import Callable
from typing import BinaryIO

from mesh.cli.backup import file
from mesh.etcd import Etcd
from mesh.etcd.ranges import after_prefix
from mesh.schema import owner
from mesh.schema.keys import Keys

PAGE = 1000
"""Records read at once; the client asks for fewer if values are large."""


def prefixes(keys: Keys) -> dict[str, bytes]:
    """Returns the key prefix of each kind of record."""
    return dict(zip(file.KINDS, (keys.registry, keys.vmodels, keys.config), strict=True))


async def header(etcd: Etcd, keys: Keys, *, by: str) -> file.Header:
    """Counts the records at the current revision, and returns the header of a backup. Raises EtcdError."""
    revision = 0
    counts: dict[str, int] = {}
    for kind, prefix in prefixes(keys).items():
        page = await etcd.page(prefix, after_prefix(prefix), limit=1, revision=revision, keys_only=True)
        revision, counts[kind] = page.revision, page.count
    return file.Header(
        base=keys.base,
        revision=revision,
        cluster=f"{(await etcd.status()).cluster:x}",
        schema=owner.SCHEMA,
        made=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        by=by,
        counts=counts,
    )


async def save(etcd: Etcd, keys: Keys, header: file.Header, stream: BinaryIO, progress: Callable[[int], None]) -> None:
    """Writes all records that the header counts to the stream, calling `progress` with the number written.

    Raises EtcdError, EtcdCompacted if etcd compacts the revision meanwhile, and OSError of the stream.
    """
    writer = file.Writer(stream, header)
    done = 0
    for kind, prefix in prefixes(keys).items():
        async for page in etcd.pages(prefix, after_prefix(prefix), page_size=PAGE, revision=header.revision):
            writer.write(file.BackupEntry(kind, kv.key[len(prefix) :], kv.value) for kv in page.kvs)
            done += len(page.kvs)
            progress(done)
    writer.finish()
