"""`mesh doctor`: checks everything that a mesh depends on, and says how to mend what is wrong.

Facts are gathered in some modules and judged in others. `etcdfacts`, `meshfacts` and `clusterfacts` gather, with time
limits. `etcdchecks`, `meshchecks`, `authchecks`, `clusterchecks`, `secretchecks` and `certificates` judge, in pure
functions. `examination` runs both. This module defines the options, and prints the findings.
"""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mesh.cli import options, output
from mesh.cli.exits import Exit
from mesh.options import checked, groups
from mesh.options import etcd as etcdoptions

if TYPE_CHECKING:  # it imports gRPC, aiohttp and cryptography, for which `mesh --help` should not wait
    from mesh.cli.doctor.examination import Report

AREAS = ("kubernetes", "secrets", "etcd", "mesh", "certificates")
"""Areas, as named in findings and in --only."""


def add(app: typer.Typer) -> None:
    """Adds this package's command."""
    app.command("doctor", rich_help_panel=options.ADMIN)(groups.expanded(doctor))


def doctor(
    *,
    context: typer.Context,
    only: Annotated[
        str,
        typer.Option(
            "--only",
            metavar="AREA,...",
            help=f"Areas to check, separated by commas: {', '.join(AREAS)}. Default: all.",
        ),
    ] = "",
    namespace: Annotated[
        str,
        typer.Option(
            "--namespace", "-n", metavar="NAME", help="Namespace of the mesh, for kubectl. Default: the current one."
        ),
    ] = "",
    base: etcdoptions.Base = etcdoptions.DEFAULT_BASE,
    install_id: etcdoptions.InstallId = "",
    etcd: Annotated[
        str,
        typer.Option(
            envvar="MESH_ETCD",
            help="URLs of etcd's members, separated by commas. If not given, etcd is checked from a router pod, "
            "through kubectl.",
        ),
    ] = "",
    login: etcdoptions.Login,
    quota: Annotated[
        str,
        typer.Option(
            "--quota", metavar="SIZE", help="Size limit of etcd's database, if etcd does not report it. Default: 2GiB."
        ),
    ] = "",
    certificates: Annotated[
        Path | None,
        typer.Option(
            "--certificates",
            envvar="MESH_INTERNAL_TLS",
            metavar="DIR",
            help="Folder of further certificates to check for expiry, such as those of --internal-tls.",
        ),
    ] = None,
    storage_config: Annotated[
        Path | None,
        typer.Option(
            "--storage-config",
            envvar="MESH_STORAGE_CONFIG",
            metavar="DIR",
            help="Folder with the storage secret, to check for the keys that models name. Default: through kubectl.",
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", min=0.1, help="Time limit of one request, in seconds.")
    ] = 10.0,
    reading: Annotated[
        float,
        typer.Option(
            "--reading", metavar="SECONDS", min=0.1, help="Time limit for reading the list of models, in seconds."
        ),
    ] = 30.0,
    endpoint: options.Endpoint = "",
    as_json: options.Json = False,
) -> None:
    """Checks everything that a mesh depends on, and says what is wrong and what to do.

    Through the endpoint, the command checks routers, pods, memory for models, models that cannot be loaded, types
    without pods, certificates, and the issuers of tokens. Through kubectl, if kubectl is on PATH, the command checks
    rights, pods, volumes, Secrets and the certificates in Secrets. In etcd, it checks the credentials, members, alarms,
    quota, latency, and the prefix's owner.

    Each finding begins with ok, warn or FAIL. A line with > below it says what to do. Areas that cannot be checked
    begin with -, and give the reason. The exit code is 1 if there is a FAIL.

    Examples:

    - `mesh doctor`
    - `mesh doctor -n team-a --json`
    - `mesh doctor --only etcd --etcd-config etcd_connection`
    """
    chosen = frozenset(word.strip() for word in only.split(",") if word.strip())
    if unknown := sorted(chosen - set(AREAS)):
        raise typer.BadParameter(f"there is no area {unknown[0]!r}; there are {', '.join(AREAS)}", param_hint="--only")
    if "certificates" in chosen and certificates is None:
        text = "to check certificates, name their folder with --certificates"
        raise typer.BadParameter(text, param_hint="--only")
    quota_bytes = checked.size(quota, "--quota") if quota else 0
    unusable, settings = "", None
    try:
        settings, base = login.reach(etcd, base=base)
    except typer.BadParameter as error:  # a finding like others: the other areas are still checked
        unusable = f"{error.param_hint}: {error.message}"
    from mesh.cli.doctor.examination import Examination, ExaminationPlan

    where = options.guarded(
        lambda: (options.endpoint_of(context, endpoint), options.trust_of(context)), as_json=as_json
    )
    plan = ExaminationPlan(
        areas=chosen or frozenset(AREAS),
        asked=chosen,
        endpoint=where[0],
        trust=where[1],
        etcd=settings if settings is not None and settings.endpoints else None,
        etcd_unusable=unusable,
        base=base,
        install_id=install_id,
        quota=quota_bytes,
        namespace=namespace,
        certificates=certificates,
        storage=storage_config,
        timeout=timeout,
        reading=reading,
    )
    report = options.guarded(lambda: asyncio.run(Examination(plan).run()), as_json=as_json)
    _show(report, as_json=as_json)
    if _failed(report):
        raise typer.Exit(Exit.FAILED)


def _failed(report: "Report") -> bool:
    from mesh.cli.doctor.findings import Level

    return bool(report.count(Level.FAIL))


def _show(report: "Report", *, as_json: bool) -> None:
    from mesh.cli.doctor.findings import Level

    counts = {level: report.count(level) for level in Level}
    if as_json:
        output.print_json(
            {
                "findings": [finding.document() for finding in report.findings],
                "skipped": [{"area": area, "why": why} for area, why in report.skipped],
                **{level.value.lower(): count for level, count in counts.items()},
            }
        )
        return
    screen = output.console()
    styles = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "bold red"}
    for finding in report.findings:
        level = f"[{styles[finding.level]}]{finding.level.value:<4}[/]"
        screen.print(f"{level}  {finding.area:<12}{output.plain(finding.what)}", soft_wrap=True)
        if finding.todo and finding.level is not Level.OK:
            screen.print(f"{'':<18}[bold]>[/] {output.plain(finding.todo)}", soft_wrap=True)
    for area, why in report.skipped:
        screen.print(f"[dim]-     {area:<12}not checked: {output.plain(why)}[/]", soft_wrap=True)
    screen.print(f"{counts[Level.OK]} ok, {counts[Level.WARN]} warn, {counts[Level.FAIL]} FAIL")
