"""`mesh prefix`: shows, transfers and removes a mesh's prefix in a shared etcd.

A mesh's own etcd is deleted with the mesh, together with all registrations. In a shared etcd the prefix, and everything
registered below it, belongs to the mesh (`mesh.schema.owner`) until an admin transfers or removes it with these
commands. Both commands are for a mesh that no longer runs, and therefore first look for running routers and pods. These
have keys with a lease, which disappear when the processes end.
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

if TYPE_CHECKING:  # it imports gRPC, a quarter of a second that `mesh --help` should not take
    from mesh.etcd import Etcd
    from mesh.schema.keys import Keys

_BATCH = 1000  # keys of one deletion: etcd serves other requests between two
_LOOK = 0.5  # seconds between two checks of what still runs

DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and change nothing.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation. Required without a terminal.")]
Force = Annotated[
    bool, typer.Option("--force", help="Proceed even if routers or runtime pods of the mesh are running.")
]
Wait = Annotated[
    float,
    typer.Option("--wait", metavar="SECONDS", min=0.0, help="Longest wait for routers and pods to end, in seconds."),
]


def add(app: typer.Typer) -> None:
    """Adds this module's commands."""
    group = typer.Typer(
        no_args_is_help=True,
        help="Shows, transfers or removes a mesh's prefix in a shared etcd: the beginning of all its keys.",
    )
    group.command("show")(groups.expanded(show))
    group.command("transfer")(groups.expanded(transfer))
    group.command("remove")(groups.expanded(remove))
    app.add_typer(group, name="prefix", rich_help_panel=options.ADMIN)


@dataclass(frozen=True, slots=True)
class Content:
    """The content of a mesh's prefix: the owner, the records, and the routers and pods that still run."""

    owner: str  # the mesh's id; "": none
    raw: bytes | None  # the owner's record; None: there is none
    schema: int  # of the keys; 0: unknown
    models: int
    vmodels: int
    settings: int
    keys: int  # all of them
    running: tuple[str, ...]  # routers and pods whose keys have a living lease
    open_lives: tuple[str, ...]  # pods without presence that may still answer, as far as etcd knows

    @property
    def registered(self) -> str:
        """The numbers of registered models, vmodels and settings, in words."""
        counted = ((self.models, "model"), (self.vmodels, "vmodel"), (self.settings, "setting"))
        return (
            ", ".join(f"{count} {name}{'s' * (count != 1)}" for count, name in counted if count) or "nothing registered"
        )

    def document(self, base: str) -> dict[str, object]:
        """Returns the document that --json prints."""
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
    """Shows the owner of a prefix in etcd, what is registered below it, and which routers and pods run.

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
            help="Id of the new owner: NAMESPACE/RELEASE on Kubernetes; '' gives the prefix to the mesh that uses it "
            "first.",
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
    """Transfers a prefix to another mesh, with everything that is registered below it.

    Use this command when a mesh has been removed, or is installed again under another name or in another namespace. The
    command fails while routers or runtime pods of the old mesh run, because they would still use the prefix.

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
        who = f"the mesh {to!r}" if to else "the first mesh that uses it"
        _ask(f"Transfer {base} ({content.registered}), owned by {_owner(content)}, to {who}?", yes=yes or dry_run)
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
    """Removes everything that a mesh has in etcd: registrations, settings and the record of the owner.

    Use this command when a mesh has been removed. To keep the registrations, run `mesh backup` first. The command fails
    while routers or runtime pods of the mesh run. If the command is interrupted, run it again: it removes the owner's
    record last.

    Example: `mesh prefix remove --etcd-config etcd_connection --base mm/modelmesh-serving`
    """
    settings, base = login.reach(etcd, base=base)

    async def command(etcd: "Etcd") -> None:
        keys = _keys(base)
        content = await _settled(etcd, keys, base, wait=wait, force=force)
        if not content.keys:
            raise _nothing(base)
        _ask(f"Remove all of {base} from etcd ({content.registered}), owned by {_owner(content)}?", yes=yes or dry_run)
        if not dry_run:
            await _remove(etcd, keys, content, base)
        _done(content, base, "removed", {}, dry_run=dry_run, as_json=as_json)

    direct.run(settings, command, as_json=as_json)


# --- etcd ---


def _keys(base: str) -> "Keys":
    from mesh.schema.keys import Keys

    if not base:  # an empty prefix would mean the whole etcd
        raise CommandError("the prefix is empty: set it with --base", code=Exit.USAGE)
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
    """Returns the content once no router or pod of the mesh runs. Raises CommandError if one still runs after `wait`
    seconds."""
    end = asyncio.get_running_loop().time() + wait
    while True:
        content = await _look(etcd, keys)
        if not content.running or force:
            return content
        if asyncio.get_running_loop().time() >= end:
            shown = ", ".join(content.running[:5]) + (", ..." if len(content.running) > 5 else "")
            raise CommandError(
                f"the mesh at {base} is running ({shown}): stop it first (helm uninstall), or use --force",
                reason="IN_USE",
            )
        await asyncio.sleep(_LOOK)


async def _remove(etcd: "Etcd", keys: "Keys", content: Content, base: str) -> None:
    """Removes all keys, the owner's record last. Raises CommandError if that record changes meanwhile."""
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
    return f"the mesh {content.owner!r}" if content.owner else "no mesh"


def _nothing(base: str) -> CommandError:
    text = (
        f"there are no keys below {base}: check that --base, the connection's root prefix and the etcd are the mesh's"
    )
    return CommandError(text, code=Exit.NOT_FOUND, reason="NOTHING")


def _taken(base: str) -> CommandError:
    return CommandError(f"{base} has another owner now: see `mesh prefix show`", reason="TAKEN")


def _ask(question: str, *, yes: bool) -> None:
    """Asks for confirmation. Raises CommandError if the answer is no, or if there is no terminal to ask."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise CommandError(f"{question} There is no terminal to ask: use --yes or --dry-run", code=Exit.USAGE)
    if not typer.confirm(question, err=True):
        raise CommandError("nothing was changed", reason="REFUSED")


def _tell(base: str, content: Content) -> None:
    screen = output.console()
    screen.print(
        output.plain(f"{base}: owned by {_owner(content)}, {content.registered}, {content.keys} keys"), soft_wrap=True
    )
    for what in content.running:
        screen.print(output.plain(f"  running: {what}"), soft_wrap=True)
    for pod in content.open_lives:
        screen.print(output.plain(f"  may still answer: {pod} (mesh pods)"), soft_wrap=True)


def _done(content: Content, base: str, what: str, more: dict[str, object], *, dry_run: bool, as_json: bool) -> None:
    if as_json:
        output.print_json({"dry_run": dry_run, **content.document(base), **more})
        return
    would = "would be " if dry_run else ""
    output.console().print(
        output.plain(f"{base}, owned by {_owner(content)}, {would}{what}: {content.registered}, {content.keys} keys"),
        soft_wrap=True,
    )
