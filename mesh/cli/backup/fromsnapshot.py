"""Restoring from a snapshot of etcd's database, by converting its registrations to a backup.

Only etcd can read a snapshot. So `etcdutl` restores the snapshot to a folder next to it, where there is probably enough
space. A temporary etcd on loopback serves the folder. Both are removed afterwards. Leases, pods and other keys that
mean nothing in another etcd are not copied.
"""

import asyncio
import contextlib
import os
import struct
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from mesh import process
from mesh.cli.backup import file, saving
from mesh.cli.exits import CommandError, Exit
from mesh.cli.snapshot import WORK, lock, snapshots
from mesh.etcd import Etcd, EtcdError
from mesh.etcdserver.single import etcd_argv
from mesh.options.etcdsettings import EtcdSettings
from mesh.schema.keys import Keys

_MAGIC_AT, _MAGIC = 16, struct.pack("<I", 0xED0CDAED)  # of bbolt, after the first page's header
_MAKING = 600.0  # seconds for etcdutl: it copies the file
_STARTING = 120.0  # seconds
_LOOK = 0.05
_NAME = "mesh"


def find(source: str) -> Path | None:
    """Returns the snapshot at a path: the file itself, or the newest snapshot in a folder. Returns None if the file is
    not a snapshot. Raises OSError, and CommandError for a folder without snapshots."""
    path = Path(source)
    if path.is_dir():
        found = snapshots(path)
        if not found:
            raise CommandError(
                f"{path} cannot be read: it is a folder without snapshots; name another", code=Exit.USAGE
            )
        return found[0].path
    with path.open("rb") as stream:
        head = stream.read(_MAGIC_AT + len(_MAGIC))
    return path if head[_MAGIC_AT:] == _MAGIC else None


async def save(snapshot: Path, settings: EtcdSettings, base: str, stream: BinaryIO, *, by: str) -> None:
    """Writes the registrations below `base` in the snapshot to the stream, as a backup.

    The temporary etcd requires the user and password of `settings`, because a snapshot includes the users of its etcd.
    Raises CommandError, EtcdError."""
    with _folder(snapshot.parent) as folder:
        async with _etcd(snapshot, folder) as url, Etcd(_reaching(settings, url)) as etcd:
            keys = Keys(base)
            header = await saving.header(etcd, keys, by=by)
            if not header.total:
                text = f"{snapshot} has no registrations below {base}"
                raise CommandError(f"{text}: set --from-base to the prefix of its mesh", code=Exit.USAGE)
            await saving.save(etcd, keys, _dated(header, snapshot), stream, lambda done: None)


def _dated(header: file.Header, snapshot: Path) -> file.Header:
    known = next((one for one in snapshots(snapshot.parent) if one.path == snapshot), None)
    return replace(header, made=f"{known.time} (a snapshot)" if known else f"at an unknown time ({snapshot.name})")


def _reaching(settings: EtcdSettings, url: str) -> EtcdSettings:
    return EtcdSettings(endpoints=(url,), user=settings.user, password=settings.password)


@contextlib.contextmanager
def _folder(parent: Path) -> Iterator[Path]:
    """Yields a temporary folder that this process locks. If the process is killed, the next run finds the folder
    unlocked, and removes it."""
    if not os.access(parent, os.W_OK):
        parent = Path(tempfile.gettempdir())
    with tempfile.TemporaryDirectory(prefix=WORK, dir=parent, ignore_cleanup_errors=True) as name:
        descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY)
        try:
            lock(descriptor)
            yield Path(name)
        finally:
            os.close(descriptor)


@contextlib.asynccontextmanager
async def _etcd(snapshot: Path, folder: Path) -> AsyncIterator[str]:
    """Runs an etcd with the snapshot's data, and yields its URL."""
    try:
        tool, program = process.find_binary("etcdutl"), process.find_binary("etcd")
    except FileNotFoundError as error:
        raise CommandError(f"reading a snapshot needs etcd's own programs: {error}") from error
    client, peer, data = process.free_port(), process.free_port(), folder / "data"
    url = f"http://127.0.0.1:{peer}"
    argv = [tool, "snapshot", "restore", str(snapshot), f"--data-dir={data}", f"--name={_NAME}"]
    argv += [f"--initial-cluster={_NAME}={url}", f"--initial-advertise-peer-urls={url}"]
    making = await process.spawn(argv, name="etcdutl")
    try:
        if await making.wait(_MAKING):
            text = f"{snapshot} cannot be restored: {_last(making)}"
            raise CommandError(text, reason="BAD_SNAPSHOT")
    finally:
        making.kill()
    serving = await process.spawn(etcd_argv(program, data, client, peer, _NAME), name="etcd of the snapshot")
    try:
        await _answers(serving, f"http://127.0.0.1:{client}", snapshot)
        yield f"http://127.0.0.1:{client}"
    finally:
        serving.kill()  # its data is thrown away
        await serving.wait(10.0)


async def _answers(serving: process.Process, url: str, snapshot: Path) -> None:
    try:
        async with asyncio.timeout(_STARTING), Etcd(EtcdSettings(endpoints=(url,))) as etcd:
            while True:
                if serving.returncode is not None:
                    raise CommandError(
                        f"no etcd can be started from {snapshot}: {_last(serving)}", reason="BAD_SNAPSHOT"
                    )
                try:
                    if (await etcd.status(timeout=1.0)).has_leader:
                        return
                except EtcdError:
                    pass  # it is starting
                await asyncio.sleep(_LOOK)
    except TimeoutError as error:
        raise CommandError(f"the etcd of {snapshot} does not answer: {_last(serving)}") from error


def _last(child: process.Process) -> str:
    return "; ".join(line.strip() for line in child.tail[-3:]) or "it printed nothing"
