"""`mesh keys`: creates, lists, rotates and revokes API keys, through a router or, with `--direct`, in etcd itself."""

import re
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from mesh.access import grants as rules
from mesh.access.principals import EVERYONE
from mesh.cli import adminkey, direct, options, output
from mesh.cli.client import Client
from mesh.cli.exits import CommandError, Exit, of_mesh_error
from mesh.options import etcd as etcdoptions
from mesh.options import groups
from mesh.statuses import MeshError, Reason

if TYPE_CHECKING:  # it imports gRPC, a quarter of a second that `mesh --help` should not take
    from mesh.etcd import Etcd
    from mesh.schema.authstore import AuthStore, Made

PATH = "/mesh/v1/keys"

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_SPAN = re.compile(r"([0-9]{1,6})([smhd])")

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the key.", show_default=False)]
Expires = Annotated[
    str,
    typer.Option(
        "--expires", metavar="SPAN", help="Time until the new key expires, such as 90d, 12h or 30m. Default: see above."
    ),
]
Direct = Annotated[
    bool,
    typer.Option("--direct", help="Write to etcd directly, with the options for etcd, instead of through a router."),
]


def add(app: typer.Typer) -> None:
    """Adds this module's commands."""
    group = typer.Typer(no_args_is_help=True, help="Manages the API keys that identify callers.")
    group.command("create")(groups.expanded(create))
    group.command("ls")(ls)
    group.command("rotate")(rotate)
    group.command("revoke")(revoke)
    group.command("admin")(adminkey.admin)
    app.add_typer(group, name="keys", rich_help_panel=options.ADMIN)
    app.command("whoami", rich_help_panel=options.MESH)(whoami)


def create(
    *,
    context: typer.Context,
    name: Name,
    role: Annotated[
        str,
        typer.Option(
            "--role",
            metavar="infer|read|register|admin",
            help="Role to give to the key (see `mesh grants add --help`). Default: none.",
        ),
    ] = "",
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--models", metavar="PATTERN", help="Models and aliases that the role is for; may be repeated. Default: *."
        ),
    ] = None,
    group: Annotated[
        list[str] | None,
        typer.Option(
            "--group", metavar="GROUP", help="Group of the key, which grants name as group:GROUP; may be repeated."
        ),
    ] = None,
    expires: Expires = "",
    through_etcd: Direct = False,
    base: etcdoptions.Base = etcdoptions.DEFAULT_BASE,
    etcd: etcdoptions.Urls = etcdoptions.DEFAULT_URLS,
    login: etcdoptions.Login,
    endpoint: options.Endpoint = "",
    as_json: options.Json = False,
) -> None:
    """Creates a key, and prints it once: the mesh stores only its digest.

    Without --role the key has no rights until `mesh grants add` gives it a role. Without --expires it never expires. To
    create the first key, or if no admin key is left, use --direct: the command then writes to etcd without a router.

    Examples:

    - `mesh keys create ci --role register --models 'fraud/*' --expires 90d`
    - `mesh keys create root --role admin --direct --etcd http://etcd:2379`
    """
    seconds = span(expires, "--expires") if expires else 0
    if models and not role:
        raise typer.BadParameter("--models needs --role", param_hint="--models")
    if through_etcd:
        settings, base = login.reach(etcd, base=base)

        async def offline(client: "Etcd") -> None:
            from mesh.schema import auth

            now = int(time.time() * 1000)
            to = [f"key:{name}"]
            try:
                given = rules.grant(role, models or ["*"], to) if role else None
                in_groups = auth.check_groups(group or [])
            except ValueError as error:
                raise CommandError(str(error), code=Exit.USAGE) from error
            until = now + 1000 * seconds if seconds else 0
            store = _store(client, base)
            made = await translated(lambda: store.create(name, now=now, expires=until, groups=in_groups, given=given))
            _show(_document(made), as_json=as_json)

        direct.run(settings, offline, as_json=as_json)
        return
    body: dict[str, Any] = {"groups": group or []} | ({"expires_in": seconds} if seconds else {})
    body |= {"role": role, "models": models or ["*"]} if role else {}

    async def command(client: Client) -> None:
        _show(await client.request("PUT", path_of(name), body=body), as_json=as_json)

    options.run(context, command, endpoint=endpoint, as_json=as_json)


def ls(context: typer.Context, endpoint: options.Endpoint = "", as_json: options.Json = False) -> None:
    """Lists the keys: names, groups, and the times at which each key was created and expires. The mesh does not store
    the keys themselves.

    Example: `mesh keys ls`
    """

    async def command(client: Client) -> None:
        found = (await client.get(PATH))["keys"]
        if as_json:
            output.print_json({"keys": found})
            return
        if not found:
            output.remarks().print("there are no keys; `mesh keys create NAME` creates one")
            return
        table = output.table("KEY", "GROUPS", "SECRET", "CREATED", "ENDS")
        for one in found:
            for secret in one.get("secrets") or ():
                cells = (
                    str(one.get("name", "")),
                    ", ".join(one.get("groups") or ()),
                    str(secret.get("id", "")),
                    _when(secret.get("created")),
                    _when(secret.get("expires")) or "never",
                )
                table.add_row(*map(output.plain, cells))
        output.console().print(table)

    options.run(context, command, endpoint=endpoint, as_json=as_json)


def rotate(
    context: typer.Context,
    name: Name,
    overlap: Annotated[
        str,
        typer.Option(
            "--overlap",
            metavar="SPAN",
            help="Time for which the old key stays valid, such as 24h; 0 ends it immediately.",
        ),
    ] = "24h",
    expires: Expires = "",
    endpoint: options.Endpoint = "",
    as_json: options.Json = False,
) -> None:
    """Replaces a key with a new one of the same name, and prints the new key. During --overlap both keys are valid, so
    that no caller is refused. Without --expires, the new key has the same lifetime as the old one.

    Example: `mesh keys rotate ci --overlap 2h`
    """
    body: dict[str, Any] = {"overlap": 0 if overlap == "0" else span(overlap, "--overlap")}
    body |= {"expires_in": span(expires, "--expires")} if expires else {}

    async def command(client: Client) -> None:
        answer = await client.request("POST", path_of(name, "/rotate"), body=body)
        _show(answer, as_json=as_json)
        if not as_json and answer.get("former_until"):
            output.remarks().print(f"the old key is valid until {_when(answer['former_until'])}")

    options.run(context, command, endpoint=endpoint, as_json=as_json)


def revoke(context: typer.Context, name: Name, endpoint: options.Endpoint = "", as_json: options.Json = False) -> None:
    """Revokes a key. Also removes the grant of the same name if it is for this key alone. Calls in flight end normally.

    Example: `mesh keys revoke ci`
    """

    async def command(client: Client) -> None:
        answer = await client.request("DELETE", path_of(name))
        if as_json:
            output.print_json(answer)
        elif answer.get("existed"):
            output.console().print(f"revoked {output.plain(name)}")
        if not answer.get("existed"):
            text = f"there is no key {name}"
            raise CommandError(text, code=Exit.NOT_FOUND, reason=Reason.UNKNOWN_MODEL.name, answered=True)

    options.run(context, command, endpoint=endpoint, as_json=as_json)


def whoami(context: typer.Context, endpoint: options.Endpoint = "", as_json: options.Json = False) -> None:
    """Shows the name of your key, token or certificate, its groups, and its grants.

    Example: `mesh whoami`
    """

    async def command(client: Client) -> None:
        answer = await client.get("/mesh/v1/whoami")
        if as_json:
            output.print_json(answer)
            return
        screen = output.console()
        name = answer.get("name")
        others = [str(one) for one in answer.get("subjects") or () if one not in (name, EVERYONE)]
        also = f", and also {', '.join(others)}" if others else ""
        screen.print(output.plain(f"you are {name}{also}"), soft_wrap=True)
        if answer.get("everything"):
            screen.print("you may do everything")
            return
        table = output.table("GRANT", "ROLE", "MODELS")
        for name, one in (answer.get("grants") or {}).items():
            table.add_row(*map(output.plain, (name, str(one.get("role")), ", ".join(one.get("models") or ()))))
        screen.print(table)

    options.run(context, command, endpoint=endpoint, as_json=as_json)


def path_of(name: str, rest: str = "") -> str:
    """Returns the path of a key's resource."""
    return f"{PATH}/{quote(name, safe='')}{rest}"


def span(text: str, option: str) -> int:
    """Returns the seconds in a string such as `90d`. Raises BadParameter."""
    found = _SPAN.fullmatch(text)
    if found is None or not int(found[1]):
        raise typer.BadParameter(
            f"{text!r} is not a duration: write one such as 90d, 12h, 30m or 60s", param_hint=option
        )
    return int(found[1]) * _UNITS[found[2]]


async def translated(work: "Callable[[], Awaitable[Made]]") -> "Made":
    """Calls `work`, and returns its result. Converts a MeshError to an error of the command line."""
    from mesh.etcd import EtcdError

    try:
        return await work()
    except EtcdError:
        raise
    except MeshError as error:
        raise of_mesh_error(error) from error


def _store(client: "Etcd", base: str) -> "AuthStore":
    from mesh.schema.authstore import AuthStore
    from mesh.schema.keys import Keys

    return AuthStore(client, Keys(base))


def _document(made: "Made") -> dict[str, Any]:
    return {"name": made.name, "key": made.key, "expires": made.expires or None, "former_until": None}


def _show(answer: dict[str, Any], *, as_json: bool) -> None:
    """Prints a new key. Writes only the key to standard output, so that the output can be redirected to a file."""
    if as_json:
        output.print_json(answer)
        return
    ends = f", valid until {_when(answer['expires'])}" if answer.get("expires") else ""
    output.remarks().print(output.plain(f"the key {answer.get('name')}{ends}; it is shown only once:"), soft_wrap=True)
    typer.echo(str(answer.get("key", "")))


def _when(ms: Any) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(ms / 1000)) if isinstance(ms, int | float) and ms else ""
