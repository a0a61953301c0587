"""`mesh snapshot`: writes etcd's whole database into a folder, and keeps the newest snapshots there.

etcd streams its database, followed by its SHA-256. The digest is checked during the copy. It stays in the file, because
`etcdutl snapshot restore`, which `mesh restore` runs, requires it. A snapshot gets its name only when it is complete
and on disk. Each run locks the file that it writes. A partial file that no run has locked was left by a killed run, and
the next run removes it.
"""

import contextlib
import datetime
import errno
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TransferSpeedColumn

from mesh.cli import direct, options, output
from mesh.cli.exits import CommandError
from mesh.options import etcd as etcdoptions
from mesh.options import groups

if TYPE_CHECKING:  # it imports gRPC, a quarter of a second that `mesh --help` should not take
    from mesh.etcd import Etcd

_DIGEST = 32  # bytes that etcd adds: the SHA-256 of the database
_PAGE = 512  # a database is a multiple of this; etcdutl sees by the remainder that a digest follows

_NAME = re.compile(r"etcd-(?P<cluster>[0-9a-f]{1,16})-(?P<revision>\d+)-(?P<time>\d{8}T\d{6}Z)\.db")
WORK = ".restore-"
"""Prefix of the folders in which `mesh restore` makes an etcd from a snapshot."""

_PART = re.compile(r"\.etcd-.*\.db\.part")
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, slots=True, order=True)
class Kept:
    """A snapshot in the folder. Instances are ordered by time."""

    time: str
    revision: int
    cluster: str
    path: Path


def add(app: typer.Typer) -> None:
    """Adds this module's command."""
    app.command("snapshot", rich_help_panel=options.ADMIN)(groups.expanded(snapshot))


def snapshot(
    *,
    folder: Annotated[Path, typer.Option("--dir", metavar="DIR", help="Folder of the snapshots.", show_default=False)],
    keep: Annotated[
        int, typer.Option("--keep", metavar="N", min=1, help="Number of newest snapshots of this etcd to keep.")
    ] = 8,
    idle: Annotated[
        float,
        typer.Option(
            "--idle",
            metavar="SECONDS",
            min=1.0,
            help=("Time without data from etcd after which the snapshot fails, in seconds."),
        ),
    ] = 60.0,
    etcd: etcdoptions.Urls = etcdoptions.DEFAULT_URLS,
    login: etcdoptions.Login,
    as_json: options.Json = False,
) -> None:
    """Takes a snapshot of etcd's whole database, and keeps the newest snapshots in a folder.

    Take snapshots only of an etcd that no other program uses, because a snapshot contains the whole database. `mesh
    restore` registers the models of a snapshot again; `etcdutl snapshot restore` recreates the etcd. If you need only
    the registrations, use `mesh backup`, whose files are smaller.

    If the folder contains snapshots of another etcd, for example of an earlier installation, the newest of these is
    kept.

    Example: `mesh snapshot --dir /var/backups/etcd --keep 8 --etcd-config etcd_connection`
    """
    settings, _ = login.reach(etcd, base="")

    async def command(etcd: "Etcd") -> None:
        started = time.monotonic()
        made, size, removed = await _run(etcd, folder, keep, idle)
        seconds = time.monotonic() - started
        if as_json:
            document = {"file": str(made.path), "bytes": size, "cluster": made.cluster, "revision": made.revision}
            output.print_json(document | {"removed": [str(old.path) for old in removed], "seconds": round(seconds, 3)})
            return
        text = f"{output.plain(str(made.path))}: {output.size(size)}, in {seconds:.1f} s"
        gone = f"; removed {len(removed)} older" if removed else ""
        output.console().print(f"{text}; {len(snapshots(folder))} are kept{gone}", soft_wrap=True)

    direct.run(settings, command, as_json=as_json)


async def _run(etcd: "Etcd", folder: Path, keep: int, idle: float) -> tuple[Kept, int, list[Kept]]:
    """Takes a snapshot, and removes outdated ones. Returns the snapshot, its size in bytes, and the snapshots that were
    removed. Raises EtcdError, CommandError."""
    try:
        clear(folder)
        status = await etcd.status()  # finds a member that answers, which gets the next request too
        now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
        cluster = f"{status.cluster:x}"
        path = folder / f"etcd-{cluster}-{status.revision}-{now}.db"
        with _bar(status.db_bytes) as progress, _whole(path) as file:
            size = await _copy(etcd, file.write, idle, progress)
        removed = outdated(snapshots(folder), cluster, keep)
        for old in removed:
            old.path.unlink(missing_ok=True)
    except OSError as error:
        if error.errno in _FULL:
            text = f"{folder} is full: give it more space, or keep fewer snapshots (--keep)"
            older = len(snapshots(folder))
            raise CommandError(f"{text}. Its {older} older snapshots are unchanged", reason="FULL") from error
        raise CommandError(f"no snapshot can be written to {folder}: {error.strerror or error}") from error
    return Kept(now, status.revision, cluster, path), size, removed


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """Yields a file to write. If the block succeeds, syncs the file to disk and then gives it its name. Otherwise
    removes the file."""
    temporary = path.with_name(f".{path.name}.part")
    # Readable by its owner only: it holds everything in etcd, such as storage keys.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "wb") as file:
            lock(file.fileno())
            yield file
            file.flush()
            os.fsync(file.fileno())
            temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


async def _copy(etcd: "Etcd", write: Callable[[bytes], object], idle: float, progress: Callable[[int], None]) -> int:
    """Copies the database with `write`, and checks it against the digest at its end. Returns the number of bytes.
    Raises CommandError, EtcdError."""
    digest = hashlib.sha256()
    tail = b""  # the last bytes so far: the digest, if no more come
    size = 0
    async with contextlib.aclosing(etcd.database(idle=idle)) as parts:
        async for part, _ in parts:
            write(part)
            size += len(part)
            tail += part
            digest.update(tail[:-_DIGEST])
            tail = tail[-_DIGEST:]
            progress(size)
    if size % _PAGE != _DIGEST or digest.digest() != tail:
        text = (
            f"the database from etcd ({size} bytes) does not match its checksum: try again; `mesh doctor` checks etcd"
        )
        raise CommandError(text, reason="DAMAGED")
    return size


def snapshots(folder: Path) -> list[Kept]:
    """Returns the snapshots in the folder, the newest first."""
    found = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted(
        (Kept(match["time"], int(match["revision"]), match["cluster"], path) for match, path in found if match),
        reverse=True,
    )


def outdated(found: list[Kept], cluster: str, keep: int) -> list[Kept]:
    """Returns the snapshots to remove: all but the newest `keep` of this cluster, and all but the newest of each other
    cluster."""
    seen: dict[str, int] = {}
    removed = []
    for one in found:
        seen[one.cluster] = seen.get(one.cluster, 0) + 1
        if seen[one.cluster] > (keep if one.cluster == cluster else 1):
            removed.append(one)
    return removed


def clear(folder: Path) -> list[Path]:
    """Removes the files that killed runs have left, and returns their paths. Keeps files that other runs have locked.
    Creates the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    removed = []
    for path in folder.iterdir():
        if not _PART.fullmatch(path.name) and not path.name.startswith(WORK):
            continue
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if not lock(descriptor):
                    continue
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()
                removed.append(path)
            finally:
                os.close(descriptor)
    return removed


def lock(descriptor: int) -> bool:
    """Locks a file or folder for this run. Returns False if another run holds the lock. Always succeeds on a file
    system without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Callable[[int], None]]:
    screen = output.remarks()
    columns = (SpinnerColumn(), TextColumn("snapshot"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    shown = Progress(*columns, console=screen)
    with shown if screen.is_terminal else contextlib.nullcontext():
        task = shown.add_task("snapshot", total=total + _DIGEST)
        yield lambda done: shown.update(task, completed=done)
