"""`mesh backup` and `mesh restore`: saving registrations to a file and restoring them.

Both commands connect to etcd, not to a router. They are for admins, and need no running router. `file` defines the file
format, `saving` reads a mesh, `restoring` writes to one, and `fromsnapshot` reads a snapshot of etcd. This module
defines the options, and prints the progress and the summary.
"""

import contextlib
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

from mesh.cli import direct, options, output
from mesh.cli.exits import CommandError, Exit
from mesh.options import etcd as etcdoptions
from mesh.options import groups
from mesh.options.etcdsettings import EtcdSettings

if TYPE_CHECKING:  # they import gRPC, a quarter of a second that `mesh --help` should not take
    from mesh.cli.backup.file import Header
    from mesh.cli.backup.restoring import Outcome
    from mesh.etcd import Etcd

SHOWN = 20
"""Number of ids listed for people; --json has all of them."""


def add(app: typer.Typer) -> None:
    """Adds this package's commands."""
    app.command("backup", rich_help_panel=options.ADMIN)(groups.expanded(backup))
    app.command("restore", rich_help_panel=options.ADMIN)(groups.expanded(restore))


def backup(
    *,
    target: Annotated[str, typer.Argument(metavar="FILE", help="File to write; - for standard output.")],
    base: etcdoptions.Base = etcdoptions.DEFAULT_BASE,
    etcd: etcdoptions.Urls = etcdoptions.DEFAULT_URLS,
    login: etcdoptions.Login,
    as_json: options.Json = False,
) -> None:
    """Writes all registrations to a file: models, aliases, settings.

    The command reads etcd at one revision, and the mesh may run meanwhile. The file does not contain pods, copies and
    other state that the mesh recreates. Nor does it contain API keys and grants, because restoring the file would make
    revoked keys valid again. It contains the models' storage keys as they were registered. Only you can read the file;
    do not give others access.

    Examples:

    - `mesh backup registry.backup --etcd-config etcd_connection`
    - `kubectl exec deploy/mesh-router -- mesh backup - > registry.backup`
    """
    if target == "-" and sys.stdout.isatty():
        text = "standard output is a terminal, and a backup is binary: name a file, or redirect it with >"
        options.refuse(CommandError(text, code=Exit.USAGE))
    if target == "-" and as_json:
        raise typer.BadParameter("the backup goes to standard output: name a file instead", param_hint="--json")
    settings, base = login.reach(etcd, base=base)

    async def command(etcd: "Etcd") -> None:
        from mesh.cli.backup import saving
        from mesh.cli.version import installed
        from mesh.schema.keys import Keys

        started = time.monotonic()
        keys = Keys(base)
        header = await saving.header(etcd, keys, by=installed())
        with _writing(target) as stream, _bar("saving", header.total) as progress:
            await saving.save(etcd, keys, header, stream, progress)
        _tell_saved(target, header, time.monotonic() - started, as_json=as_json)

    direct.run(settings, command, as_json=as_json)


def restore(
    *,
    source: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="Backup (- for standard input), snapshot of etcd, or folder whose newest snapshot is used.",
        ),
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and change nothing.")] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help=(
                "Replace registrations that have other attributes. A replaced model is unregistered until pods have "
                "unloaded its copies."
            ),
        ),
    ] = False,
    wait: Annotated[
        float,
        typer.Option(
            "--wait", metavar="SECONDS", min=0.0, help="Longest wait for pods to unload replaced models, in seconds."
        ),
    ] = 120.0,
    from_base: Annotated[
        str,
        typer.Option("--from-base", metavar="PREFIX", help="Prefix of the keys in a snapshot. Default: this mesh's."),
    ] = "",
    base: etcdoptions.Base = etcdoptions.DEFAULT_BASE,
    install_id: etcdoptions.InstallId = "",
    etcd: etcdoptions.Urls = etcdoptions.DEFAULT_URLS,
    login: etcdoptions.Login,
    as_json: options.Json = False,
) -> None:
    """Restores the models, aliases and settings of a backup, or of a snapshot of etcd, into this mesh or another. The
    mesh may keep running.

    The command first checks the whole file. Registrations that already exist stay unchanged, so after a failure you can
    run the same command again. Registrations that exist with other attributes are replaced with --overwrite;
    otherwise they are listed and stay unchanged, and the exit code is 1, or 0 with --dry-run. Registrations that are
    not in the backup are never removed.

    To read a snapshot, the command starts a temporary etcd with the snapshot's data. This requires the programs etcd
    and etcdutl, which the container image contains.

    Examples:

    - `mesh restore registry.backup --dry-run`
    - `mesh restore /var/backups/etcd`
    - `kubectl exec -i deploy/mesh-router -- mesh restore - < registry.backup`
    """
    settings, base = login.reach(etcd, base=base)

    async def command(etcd: "Etcd") -> "Outcome":
        from mesh.cli.backup import file, restoring
        from mesh.schema.keys import Keys

        async with _opened(source, settings, from_base.strip("/") or base) as stream:
            try:
                header = file.verify(stream)
                restorer = restoring.Restorer(etcd, Keys(base), overwrite=overwrite, dry_run=dry_run, wait=wait)
                await restorer.check(header, install_id)
                stream.seek(0)
                with _bar("comparing" if dry_run else "restoring", header.total) as progress:
                    outcome = await restorer.run(file.entries(stream), progress)
            except file.BackupError as error:
                raise CommandError(f"the backup {source} cannot be restored: {error}", reason="BAD_BACKUP") from error
        _tell_restored(header, base, outcome, dry_run=dry_run, as_json=as_json)
        return outcome

    outcome = direct.run(settings, command, as_json=as_json)
    if outcome.failed or (outcome.differing and not dry_run):
        raise typer.Exit(Exit.FAILED)


@contextlib.contextmanager
def _writing(target: str) -> Iterator[BinaryIO]:
    """Yields the stream to write a backup to. A file gets its name only once it is complete."""
    if target == "-":
        try:
            yield sys.stdout.buffer
            sys.stdout.buffer.flush()
        except BrokenPipeError as error:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - otherwise Python complains at exit that it cannot flush
            raise CommandError("the reader of standard output closed it: the backup is incomplete") from error
        return
    path = Path(target)
    temporary: Path | None = None
    try:
        if path.exists() and not stat.S_ISREG(path.stat().st_mode):
            raise CommandError(f"{path} is not a regular file; use - for standard output", code=Exit.USAGE)
        # Readable by its owner only: registrations may contain credentials.
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        temporary = Path(name)
        with open(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        temporary = None
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _reading(source: str) -> Iterator[BinaryIO]:
    """Yields a stream that can be read twice: the file itself, or a copy of standard input on disk."""
    try:
        if source != "-":
            with open(source, "rb") as stream:
                yield stream
            return
        if sys.stdin.isatty():
            raise CommandError("standard input is a terminal: name a file, or redirect one with <", code=Exit.USAGE)
        with tempfile.TemporaryFile() as kept:
            shutil.copyfileobj(sys.stdin.buffer, kept)
            kept.seek(0)
            yield kept
    except OSError as error:
        raise CommandError(f"{source} cannot be read: {error.strerror or error}", code=Exit.USAGE) from error


@contextlib.asynccontextmanager
async def _opened(source: str, settings: EtcdSettings, base: str) -> AsyncIterator[BinaryIO]:
    """Yields a stream with the backup, which can be read twice. The source is a backup file, standard input, or a
    snapshot."""
    from mesh.cli.backup import fromsnapshot
    from mesh.cli.version import installed

    try:
        snapshot = fromsnapshot.find(source) if source != "-" else None
    except OSError as error:
        raise CommandError(f"{source} cannot be read: {error.strerror or error}", code=Exit.USAGE) from error
    if snapshot is None:
        with _reading(source) as stream:
            yield stream
        return
    with tempfile.TemporaryFile() as kept:
        await fromsnapshot.save(snapshot, settings, base, kept, by=installed())
        kept.seek(0)
        yield kept


@contextlib.contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    screen = output.remarks()
    shown = Progress(SpinnerColumn(), TextColumn(what), BarColumn(), MofNCompleteColumn(), console=screen)
    with shown if screen.is_terminal else contextlib.nullcontext():
        task = shown.add_task(what, total=total)
        yield lambda done: shown.update(task, completed=done)


def _tell_saved(target: str, header: "Header", seconds: float, *, as_json: bool) -> None:
    size = 0 if target == "-" else Path(target).stat().st_size
    if as_json:
        output.print_json(
            {
                "file": target,
                "bytes": size,
                "base": header.base,
                "revision": header.revision,
                "counts": dict(header.counts),
                "seconds": round(seconds, 3),
            }
        )
        return
    screen = output.remarks() if target == "-" else output.console()
    where = "" if target == "-" else f" to {output.plain(target)} ({output.size(size)})"
    screen.print(
        f"saved {_counted(header.counts)} of {output.plain(header.base)}{where}, at revision {header.revision}, "
        f"in {seconds:.1f} s",
        soft_wrap=True,
    )
    if not header.total:
        text = f"there are no records below {output.plain(header.base)}: check that --base and the etcd are the mesh's"
        output.remarks().print(f"[yellow]warning:[/] {text}", soft_wrap=True)


_NAMES = {"registry": ("model", "models"), "vmodels": ("vmodel", "vmodels"), "config": ("setting", "settings")}


def _counted(counts: Any) -> str:
    """Returns counts in words, such as `3 models, 1 setting` or `nothing`."""
    words = [f"{counts[kind]} {names[counts[kind] != 1]}" for kind, names in _NAMES.items() if counts.get(kind)]
    return ", ".join(words) or "nothing"


def _tell_restored(header: "Header", base: str, outcome: "Outcome", *, dry_run: bool, as_json: bool) -> None:
    if as_json:
        output.print_json(
            {
                "dry_run": dry_run,
                "from": header.base,
                "made": header.made,
                "to": base,
                "created": dict(outcome.created),
                "existing": dict(outcome.existing),
                "overwritten": dict(outcome.overwritten),
                "differing": [{"kind": kind, "id": name} for kind, name in outcome.differing],
                "failed": [{"kind": kind, "id": name, "why": why} for kind, name, why in outcome.failed],
                "recounted": outcome.recounted,
                "dangling": outcome.dangling,
            }
        )
        return
    screen = output.console()
    screen.print(f"backup of {output.plain(header.base)}, made {output.plain(header.made)}", soft_wrap=True)
    would = "would be " if dry_run else ""
    for counts, text in (
        (outcome.created, f"{would}created"),
        (outcome.overwritten, f"{would}overwritten"),
        (outcome.existing, "already registered"),
    ):
        if counts.total():
            screen.print(f"{text}: {_counted(counts)}")
    if outcome.recounted:
        screen.print(f"references of vmodels corrected: {outcome.recounted} models")
    remarks = output.remarks()
    if outcome.differing:
        hint = "--overwrite replaces them" if not dry_run else "unchanged without --overwrite"
        remarks.print(f"[yellow]{len(outcome.differing)} differ from what is registered[/] ({hint}):", soft_wrap=True)
        _list(f"{_NAMES[kind][0]} {name}" for kind, name in outcome.differing)
    if outcome.dangling:
        remarks.print("[yellow]these vmodels name models that are not registered here:[/]", soft_wrap=True)
        _list(outcome.dangling)
    if outcome.failed:
        remarks.print(f"[red]{len(outcome.failed)} were not restored:[/]", soft_wrap=True)
        _list(f"{_NAMES[kind][0]} {name}: {why}" for kind, name, why in outcome.failed)


def _list(lines: Any) -> None:
    lines = list(lines)
    for line in lines[:SHOWN]:
        output.remarks().print(f"  {output.plain(line)}", soft_wrap=True)
    if len(lines) > SHOWN:
        output.remarks().print(f"  and {len(lines) - SHOWN} more (--json lists them all)")
