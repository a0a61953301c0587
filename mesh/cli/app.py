"""The application: its global options, and the modules that add the commands."""

import os
from pathlib import Path
from typing import Annotated

import typer

from mesh.cli import (
    aliases,
    backup,
    bulk,
    certificates,
    context,
    convert,
    doctor,
    grants,
    infer,
    keys,
    limits,
    options,
    pods,
    prefix,
    processes,
    registry,
    removal,
    replay,
    servers,
    serving,
    simulate,
    snapshot,
    top,
    version,
    versions,
)
from mesh.cli.exits import EXPLAINED
from mesh.cli.trust import Trust

HELP = """
Thousands of models behind one endpoint.

`mesh up` starts a whole mesh on this machine; the other commands talk to a running mesh, here or elsewhere.
"""


_MODULES = (
    *(
        processes,
        servers,
        certificates,
        registry,
        convert,
        removal,
        bulk,
        versions,
        aliases,
        serving,
        limits,
        infer,
        pods,
        top,
    ),
    *(simulate, replay, keys, grants, backup, snapshot, prefix, doctor, context),
)
"""The modules of commands, in the order of the help's panels."""


def build() -> typer.Typer:
    """Builds the application with every command."""
    app = typer.Typer(
        name="mesh",
        help=HELP,
        epilog=EXPLAINED,
        no_args_is_help=True,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["--help", "-h"]},
    )
    app.callback()(_callback)
    for module in _MODULES:
        module.add(app)
    app.command("version", rich_help_panel=options.MESH)(_version)
    return app


def run() -> int:
    """Runs the command line of this process and returns its exit code."""
    try:
        build()(prog_name="mesh")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _show_version(shown: bool) -> None:
    if shown:
        _version()
        raise typer.Exit


def _callback(
    context: typer.Context,
    endpoint: Annotated[
        str,
        typer.Option(
            "--endpoint",
            "-e",
            envvar="MESH_ENDPOINT",
            metavar="URL",
            help=options.ENDPOINT_HELP,
            show_default=False,
            show_envvar=False,
        ),
    ] = "",
    ca: Annotated[
        Path | None,
        typer.Option(
            "--ca", envvar="MESH_CA", metavar="FILE", help="PEM file of the authorities to trust for an https endpoint."
        ),
    ] = None,
    cert: Annotated[
        Path | None,
        typer.Option(
            "--cert",
            envvar="MESH_CERT",
            metavar="FILE",
            help="PEM file of the client certificate, for a mesh that requires one.",
        ),
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option("--key", envvar="MESH_KEY", metavar="FILE", help="PEM file of the private key of --cert."),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-key-file",
            envvar="MESH_API_KEY_FILE",
            metavar="FILE",
            help="File with the API key or token to send, if the mesh requires one; MESH_API_KEY is the key itself.",
        ),
    ] = None,
    named: Annotated[
        str,
        typer.Option(
            "--context",
            envvar="MESH_CONTEXT",
            metavar="NAME",
            help="Context to use instead of the current one (see `mesh context`).",
        ),
    ] = "",
    shown: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version, and exit."),
    ] = False,
) -> None:
    def from_environment(option: str) -> bool:
        source = context.get_parameter_source(option)
        return source is not None and source.name == "ENVIRONMENT"

    if named and not from_environment("named"):
        # --context on the command line takes precedence over the environment.
        endpoint = "" if from_environment("endpoint") else endpoint
        ca = None if from_environment("ca") else ca
        cert = None if from_environment("cert") else cert
        key = None if from_environment("key") else key
        api_key_file = None if from_environment("api_key_file") else api_key_file
    # A file that the command line names takes precedence over the environment.
    given = named or (api_key_file is not None and not from_environment("api_key_file"))
    api_key = "" if given else os.environ.get("MESH_API_KEY", "")
    context.obj = options.Defaults(endpoint, Trust(ca, cert, key, api_key_file, api_key), named)


def _version() -> None:
    """Prints the version of this installation."""
    typer.echo(f"mesh {version.installed()}")
