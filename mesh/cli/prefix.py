"""`mesh prefix`: a mesh's part of an etcd that is not its own: whose it is, handing it over, removing it.

With an etcd of its own a mesh goes together with all that is registered. In an etcd that others use too, nobody removes
what a mesh has left: its prefix belongs to it (`mesh.schema.owner`), with everything that is registered, until somebody
says otherwise here. Both ways are for a mesh that is gone, so what still runs is looked for first: routers and pods
stand in etcd under a lease, and their keys vanish with them.
"""

import asyncio
import contextlib
import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from mesh.cli import direct, options, output
from mesh.cli.exits import CommandError, Exit
from mesh.options import etcd as etcdoptions
from mesh.options import groups

if TYPE_CHECKING:  # it brings gRPC, a quarter of a second that `mesh --help` should not take
    from mesh.etcd import Etcd
    from mesh.schema.keys import Keys

_BATCH = 1000  # keys of one deletion: etcd serves others between two
_LOOK = 0.5  # seconds between two looks for what still runs

DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask. Needed where nobody is at a terminal.")]
Force = Annotated[bool, typer.Option("--force", help="Also while routers or runtime pods of the mesh run.")]
Wait = Annotated[
    float,
    typer.Option(
        "--wait", metavar="SECONDS", min=0.0, help="For routers and pods that have just ended to be forgotten."
    ),
]


def add(app: typer.Typer) -> None:
    """Adds this module's commands."""
    group = typer.Typer(
        no_args_is_help=True, help="A mesh's part of an etcd that others use too: whose, hand over, remove."
    )
    group.command("show")(groups.expanded(show))
    group.command("transfer")(groups.expanded(transfer))
    group.command("remove")(groups.expanded(remove))
    app.add_typer(group, name="prefix", rich_help_panel=options.ADMIN)


@dataclass(frozen=True, slots=True)
class Content:
    """What is below a prefix."""

    owner: str  # the mesh's id; "": nobody's
    raw: bytes | None  # the owner's record as it stands; None: there is none
    schema: int  # of the keys; 0: unknown
    models: int
    vmodels: int
    settings: int
    keys: int  # all of them
    running: tuple[str, ...]  # routers and pods that stand under a lease
    open_lives: tuple[str, ...]  # pods without presence that may still answer, for all that etcd knows

    @property
    def registered(self) -> str:
        """In words."""
        counted = ((self.models, "model"), (self.vmodels, "vmodel"), (self.settings, "setting"))
        return (
            ", ".join(f"{count} {name}{'s' * (count != 1)}" for count, name in counted if count) or "nothing registered"
        )

    def document(self, base: str) -> dict[str, object]:
        """For --json."""
        return {
            "base": base,
            "owner": self.owner or None,
            "schema": self.schema or None,
            "models": self.models,
            "vmodels": self.vmodels,
            "settings": self.settings,
            "keys": self.keys,
            "running": list(self.running),
            "open_lives": list(self.open_lives),
        }


def show(
    *,
    base: etcdoptions.Base = etcdoptions.DEFAULT_BASE,
    etcd: etcdoptions.Urls = etcdoptions.DEFAULT_URLS,
    login: etcdoptions.Login,
    as_json: options.Json = False,
) -> None:
    """Shows whose a prefix in etcd is, what is registered below it, and what of the mesh runs.

    Example: `mesh prefix show --etcd-config etcd_connection --base mm/modelmesh-serving`
    """
    settings, base = login.reach(etcd, base=base)

    async def command(etcd: "Etcd") -> None:
        content = await _look(etcd, _keys(base))
        if as_json:
            output.print_json(content.document(base))
            return
        _tell(base, content)

    direct.run(settings, command, as_json=as_json)


def transfer(
    *,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="ID",
            help="The mesh that it is for: NAMESPACE/RELEASE on Kubernetes; '' for the first that comes.",
        ),
    ],
    dry_run: DryRun = False,
    yes: Yes = False,
    force: Force = False,
    wait: Wait = 30.0,
    base: etcdoptions.Base = etcdoptions.DEFAULT_BASE,
    etcd: etcdoptions.Urls = etcdoptions.DEFAULT_URLS,
    login: etcdoptions.Login,
    as_json: options.Json = False,
) -> None:
    """Hands a prefix over to another mesh, with all that is registered below it.

    For a mesh that is gone, or that comes back under another name or in another namespace. While routers or runtime
    pods of it run, this is refused, since they would go on using the prefix.

    Example: `mesh prefix transfer --to team-b/mesh --etcd-config etcd_connection --base mm/modelmesh-serving`
    """
    settings, base = login.reach(etcd, base=base)

    async def command(etcd: "Etcd") -> None:
        from mesh.etcd import absent, delete_op, put_op, value_is
        from mesh.schema import owner

        keys = _keys(base)
        content = await _settled(etcd, keys, base, wait=wait, force=force)
        if not content.keys:
            raise _nothing(base)
        who = f"the mesh {to!r}" if to else "whichever mesh comes first"
        _ask(f"Hand {base} ({content.registered}), of {_owner(content)}, over to {who}?", yes=yes or dry_run)
        if not dry_run:
            compare = absent(keys.owner) if content.raw is None else value_is(keys.owner, content.raw)
            change = put_op(keys.owner, owner.record(to, content.schema)) if to else delete_op(keys.owner)
            if not (await etcd.txn([compare], [change])).succeeded:
                raise _taken(base)
        _done(content, base, "handed over", {"to": to or None}, dry_run=dry_run, as_json=as_json)

    direct.run(settings, command, as_json=as_json)


def remove(
    *,
    dry_run: DryRun = False,
    yes: Yes = False,
    force: Force = False,
    wait: Wait = 30.0,
    base: etcdoptions.Base = etcdoptions.DEFAULT_BASE,
    etcd: etcdoptions.Urls = etcdoptions.DEFAULT_URLS,
    login: etcdoptions.Login,
    as_json: options.Json = False,
) -> None:
    """Removes everything that a mesh has in etcd: what is registered, its settings, whose prefix it was.

    For a mesh that is gone; `mesh backup` before it keeps what is registered. While routers or runtime pods of the mesh
    run, this is refused. Where it breaks off, the same command goes on: the owner's record goes last.

    Example: `mesh prefix remove --etcd-config etcd_connection --base mm/modelmesh-serving`
    """
    settings, base = login.reach(etcd, base=base)

    async def command(etcd: "Etcd") -> None:
        keys = _keys(base)
        content = await _settled(etcd, keys, base, wait=wait, force=force)
        if not content.keys:
            raise _nothing(base)
        _ask(f"Remove all of {base} from etcd ({content.registered}), of {_owner(content)}?", yes=yes or dry_run)
        if not dry_run:
            await _remove(etcd, keys, content, base)
        _done(content, base, "removed", {}, dry_run=dry_run, as_json=as_json)

    direct.run(settings, command, as_json=as_json)


# --- etcd ---


def _keys(base: str) -> "Keys":
    from mesh.schema.keys import Keys

    if not base:  # it would be the whole etcd
        raise CommandError("the prefix is empty: name it with --base", code=Exit.USAGE)
    return Keys(base)


def _range(base: str) -> tuple[bytes, bytes]:
    from mesh.etcd.ranges import after_prefix

    prefix = f"{base}/".encode()
    return prefix, after_prefix(prefix)


async def _look(etcd: "Etcd", keys: "Keys") -> Content:
    from mesh.etcd.ranges import after_prefix

    async def count(prefix: bytes) -> int:
        return await etcd.count(prefix, after_prefix(prefix))

    record = await etcd.get(keys.owner)
    owner, schema = "", 0
    if record is not None:
        with contextlib.suppress(ValueError, KeyError, TypeError, ArithmeticError):
            found = json.loads(record.value)
            owner, schema = str(found["install"]), int(found["schema"])
        owner = owner or "(unreadable)"
    routers = [f"router {keys.router_of(kv.key)}" async for kv in etcd.scan(keys.routers, keys_only=True)]
    pods = [keys.pod_of(kv.key) async for kv in etcd.scan(keys.pods, keys_only=True)]
    lives = [keys.life_of(kv.key)[0] async for kv in etcd.scan(keys.lives, keys_only=True)]
    return Content(
        owner=owner,
        raw=record.value if record is not None else None,
        schema=schema,
        models=await count(keys.registry),
        vmodels=await count(keys.vmodels),
        settings=await count(keys.config),
        keys=await etcd.count(*_range(keys.base)),
        running=(*routers, *(f"runtime pod {pod}" for pod in pods)),
        open_lives=tuple(sorted(set(lives) - set(pods))),
    )


async def _settled(etcd: "Etcd", keys: "Keys", base: str, *, wait: float, force: bool) -> Content:
    """What is there once nothing of the mesh runs. Raises CommandError where something does."""
    end = asyncio.get_running_loop().time() + wait
    while True:
        content = await _look(etcd, keys)
        if not content.running or force:
            return content
        if asyncio.get_running_loop().time() >= end:
            shown = ", ".join(content.running[:5]) + (", ..." if len(content.running) > 5 else "")
            raise CommandError(
                f"the mesh at {base} runs ({shown}): end it first (helm uninstall), or say --force", reason="IN_USE"
            )
        await asyncio.sleep(_LOOK)


async def _remove(etcd: "Etcd", keys: "Keys", content: Content, base: str) -> None:
    """All keys, the owner's last, as long as it is as it was."""
    from mesh.etcd import absent, delete_op, delete_range_op, value_is

    guard = absent(keys.owner) if content.raw is None else value_is(keys.owner, content.raw)
    start, end = _range(base)
    for begin, until in ((start, keys.owner), (keys.owner + b"\0", end)):
        while True:
            page = await etcd.page(begin, until, limit=_BATCH, keys_only=True)
            if not page.kvs:
                break
            last = page.kvs[-1].key + b"\0"
            if not (await etcd.txn([guard], [delete_range_op(begin, last)])).succeeded:
                raise _taken(base)
    if not (await etcd.txn([guard], [delete_op(keys.owner)])).succeeded:
        raise _taken(base)


# --- words ---


def _owner(content: Content) -> str:
    return f"the mesh {content.owner!r}" if content.owner else "no mesh in particular"


def _nothing(base: str) -> CommandError:
    text = (
        f"there is nothing below {base}: is that the mesh's --base, below the connection's root prefix, and its etcd?"
    )
    return CommandError(text, code=Exit.NOT_FOUND, reason="NOTHING")


def _taken(base: str) -> CommandError:
    return CommandError(f"{base} has another owner by now: look with `mesh prefix show`", reason="TAKEN")


def _ask(question: str, *, yes: bool) -> None:
    """Raises CommandError where the answer is no, or nobody can answer."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise CommandError(f"{question} Nobody is there to answer: say --yes, or --dry-run", code=Exit.USAGE)
    if not typer.confirm(question, err=True):
        raise CommandError("nothing was changed", reason="REFUSED")


def _tell(base: str, content: Content) -> None:
    screen = output.console()
    screen.print(
        output.plain(f"{base}: of {_owner(content)}, {content.registered}, {content.keys} keys"), soft_wrap=True
    )
    for what in content.running:
        screen.print(output.plain(f"  runs: {what}"), soft_wrap=True)
    for pod in content.open_lives:
        screen.print(output.plain(f"  may still answer: {pod} (mesh pods)"), soft_wrap=True)


def _done(content: Content, base: str, what: str, more: dict[str, object], *, dry_run: bool, as_json: bool) -> None:
    if as_json:
        output.print_json({"dry_run": dry_run, **content.document(base), **more})
        return
    would = "would be " if dry_run else ""
    output.console().print(
        output.plain(f"{base}, of {_owner(content)}, {would}{what}: {content.registered}, {content.keys} keys"),
        soft_wrap=True,
    )
