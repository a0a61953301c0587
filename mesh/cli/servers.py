"""`mesh servers`: lists the model servers that Mesh can install, installs and removes them."""

import sys
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mesh.cli import options, output
from mesh.cli.exits import CommandError, Exit
from mesh.modelservers import availability, environments, kinds
from mesh.options.values import format_bytes

Name = Annotated[
    str, typer.Argument(metavar="SERVER", help="Name of the server, as `mesh servers` lists it.", show_default=False)
]

_LINES = 10  # a progress line is printed for each tenth of the packages if the output is no terminal


def add(app: typer.Typer) -> None:
    """Adds this module's commands."""
    group = typer.Typer(invoke_without_command=True, subcommand_metavar="[COMMAND] [ARGS]...")
    group.callback()(ls)
    group.command("install")(install)
    group.command("rm")(remove)
    group.command("remove", hidden=True)(remove)  # the name of this command before
    app.add_typer(group, name="servers", rich_help_panel=options.PROCESSES)


def ls(context: typer.Context, as_json: options.Json = False) -> None:
    """Lists, installs and removes the model servers that pods can run.

    Without a command, lists the servers with their model types, and shows whether they are installed.

    Examples:

    - `mesh servers`
    - `mesh servers install mlserver`
    """
    if context.invoked_subcommand is not None:
        return
    found = [_described(kind) for kind in kinds.KINDS.values()]
    if as_json:
        output.print_json({"servers": found, "folder": str(environments.root())})
        return
    rows = [("SERVER", "VERSION", "INSTALLED", "TYPES", "TYPES THAT RUN CODE"), ("onnx", "", "always", "onnx", "")]
    for one in found:
        size = (format_bytes(one["bytes"]) if one["bytes"] else "yes") if one["installed"] else "no"
        rows.append((one["name"], one["version"], size, ",".join(one["types"]), ",".join(one["code_types"])))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for one in found:
        if one["missing"] and not kinds.KINDS[one["name"]].installs:
            output.remarks().print(
                f"[dim]{output.plain(one['name'])}: {output.plain(one['missing'])}[/]", soft_wrap=True
            )
    output.remarks().print(f"[dim]environments: {output.plain(str(environments.root()))}[/]", soft_wrap=True)


def install(name: Name) -> None:
    """Installs a model server into an environment of its own, from a lock file with hashes.

    The environments are in the folder that MESH_SERVERS_DIR names. Default: ~/.local/share/mesh/servers.

    Example: `mesh servers install mlserver`
    """
    kind = _kind(name)
    if (there := environments.installed(kind.name)) is not None:
        typer.echo(f"{kind.name} {environments.version(kind.name)} is installed: {there}")
        return
    folder = options.guarded(lambda: shown(kind))
    typer.echo(f"installed {kind.name} {environments.version(kind.name)}: {folder}")


def remove(name: Name) -> None:
    """Removes the environments of a model server. Pods that run it are not stopped, but cannot start it again.

    Example: `mesh servers rm mlserver`
    """
    kind = _kind(name)
    typer.echo(f"removed {kind.name}" if environments.remove(kind.name) else f"{kind.name} is not installed")


def shown(kind: kinds.ServerKind) -> str:
    """Installs a server, shows the progress on standard error, and returns the server's folder. Raises CommandError."""
    console = output.remarks()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    said = 0
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"installing {kind.name}", total=None)
        text = (
            f"installing {kind.name} {environments.version(kind.name)} into {environments.root()}: this takes minutes"
        )
        console.print(output.plain(text), soft_wrap=True)

        def on_progress(now: environments.InstallProgress) -> None:
            nonlocal said
            progress.update(task, completed=now.done, total=now.total)
            if not console.is_terminal and now.done * _LINES // now.total > said:
                said = now.done * _LINES // now.total
                console.print(f"{now.done} of {now.total} packages fetched")

        try:
            return str(environments.install(kind.name, on_progress))
        except environments.CannotInstall as error:
            raise CommandError(str(error), reason="NOT_INSTALLED") from error


def offer(kind: kinds.ServerKind) -> None:
    """Asks the user whether to install a server now, and does so if the answer is yes. Does nothing without a terminal.
    Raises CommandError if the installation fails."""
    if _interactive():
        question = f"Install {kind.name} {environments.version(kind.name)} now, in {environments.root()}?"
        if typer.confirm(question, default=False, err=True):
            shown(kind)
            output.remarks().print(f"installed {kind.name}")


def _interactive() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()


def _kind(name: str) -> kinds.ServerKind:
    found = kinds.KINDS.get(name)
    if found is not None and not found.installs:
        lacks = availability.missing(name) or f"{name} is there already: pods use it"
        options.refuse(CommandError(f"Mesh does not install {name}. {lacks[0].upper()}{lacks[1:]}", code=Exit.USAGE))
    if found is None:
        known = ", ".join(kind.name for kind in kinds.KINDS.values() if kind.installs)
        options.refuse(CommandError(f"{name!r} is not a server that can be installed: use {known}", code=Exit.USAGE))
    return found


def _described(kind: kinds.ServerKind) -> dict[str, Any]:
    folder = environments.installed(kind.name) if kind.installs else None
    lacks = availability.missing(kind.name)
    data = kind.served(allow_code=False, installed=True)
    return {
        "name": kind.name,
        "what": kind.what,
        "version": environments.version(kind.name) if kind.installs else "",
        "installed": not lacks,
        "missing": lacks,
        "folder": "" if folder is None else str(folder),
        "bytes": 0 if folder is None else environments.size(folder),
        "types": list(data),
        "code_types": [one for one in kind.served(allow_code=True, installed=True) if one not in data],
    }
