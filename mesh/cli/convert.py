"""`mesh convert`: converts a model of a Python library to ONNX, and keeps it only if it answers alike."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mesh.cli import options, output
from mesh.cli.exits import CommandError, Exit
from mesh.conversion.errors import CannotConvert

if TYPE_CHECKING:  # numpy takes long to import, and few commands need it
    from mesh.conversion.comparing import OutputDifference
    from mesh.conversion.conversion import Conversion

_ONNX = "onnx"
_TOLERANCE = 1e-4


def add(app: typer.Typer) -> None:
    """Adds this module's command."""
    app.command("convert", rich_help_panel=options.MODELS)(convert)


def convert(
    path: Annotated[Path, typer.Argument(metavar="MODEL", help="File of the model.", show_default=False)],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="Format to convert to; only onnx.")] = _ONNX,
    target: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="File to write. Default: beside the model, with the ending .onnx."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file if it exists.")] = False,
    rows: Annotated[
        Path | None,
        typer.Option(
            "--rows", metavar="FILE", help="Rows to compare answers for, besides made-up ones: a .csv or .npy file."
        ),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(
            "--tolerance", metavar="X", min=0.0, help="Largest difference of two answers, relative to their size."
        ),
    ] = _TOLERANCE,
    missing: Annotated[
        bool,
        typer.Option("--missing/--no-missing", help="Also compare answers for rows with missing values (NaN)."),
    ] = True,
    width: Annotated[
        int | None,
        typer.Option("--width", metavar="N", min=1, help="Number of columns, for a model that does not say it."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Converts a scikit-learn, XGBoost or LightGBM model to ONNX. Pods with the ONNX server serve it, faster than
    MLServer serves the original, and without its author's code.

    Loading a pickle runs the code in it: convert pickles only if you trust their authors.

    The command makes rows up, gives them to both models, and prints how far the answers differ. If they differ by more
    than the tolerance, it writes no file and fails. Give rows of your own with --rows: made-up rows may miss what
    matters in yours.

    Examples:

    - `mesh convert churn.joblib --to onnx`
    - `mesh convert churn.joblib --rows customers.csv`
    """
    if to != _ONNX:
        raise typer.BadParameter(f"{to!r} is no format that models are converted to: use {_ONNX}", param_hint="--to")
    options.guarded(lambda: _convert(path, target, force, rows, tolerance, missing, width, as_json), as_json=as_json)


def _convert(
    path: Path,
    target: Path | None,
    force: bool,
    rows: Path | None,
    tolerance: float,
    missing: bool,
    width: int | None,
    as_json: bool,
) -> None:
    from mesh.conversion import conversion, loading

    target = target or path.with_suffix(f".{_ONNX}")
    if target.exists() and not force:
        raise CommandError(f"{target} exists: overwrite it with --force, or name another file with --output")
    if not target.absolute().parent.is_dir():
        raise CommandError(f"{target} cannot be written: its folder does not exist; create it", code=Exit.USAGE)
    try:
        file, kind = loading.file_of(path)
        if kind is None or kind.code:
            text = f"loading {path} runs the code in it: this is safe only if you trust its author"
            output.remarks().print(f"[dim]{output.plain(text)}[/]", soft_wrap=True)
        loaded = loading.load(file, kind)
        for remark in loaded.remarks:
            output.remarks().print(f"[yellow]{output.plain(remark)}[/]", soft_wrap=True)
        made = conversion.convert(loaded.model, rows=rows, width=width, tolerance=tolerance, missing_values=missing)
    except CannotConvert as error:
        raise CommandError(str(error), reason="NOT_CONVERTED") from error
    if made.exact:
        _write(target, made.content)
    if as_json:
        output.print_json(_described(made, target))
    else:
        _print(made)
    if not made.exact:
        raise CommandError(_failure(made, rows), reason="DIFFERS", answered=True)
    if not as_json:
        typer.echo(f"wrote {target}")


def _write(target: Path, content: bytes) -> None:
    """Writes the file as a whole, or not at all."""
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        aside.write_bytes(content)
        aside.replace(target)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise CommandError(f"{target} cannot be written: {error.strerror}") from error


def _print(made: "Conversion") -> None:
    for name, datatype, columns in made.inputs:
        typer.echo(f"input {name}: {datatype}, shape [rows, {columns}]")
    table = output.table("OUTPUT", "ROWS", ">COUNT", ">DIFFERING", ">LARGEST", ">RELATIVE")
    for one in made.differences:
        numbers = ("", "") if one.classes else (f"{one.absolute:.2g}", f"{one.relative:.2g}")
        table.add_row(one.output, "given" if one.given else "made up", f"{one.rows}", f"{one.differing}", *numbers)
    output.console().print(table)
    for tied in (one for one in made.differences if one.tied):
        text = f"{tied.output}: {tied.tied} more rows have another class, which the model finds as probable"
        output.remarks().print(output.plain(text), soft_wrap=True)
    if made.dropped:
        text = f"outputs without a counterpart in the library are left out: {made.dropped}"
        output.remarks().print(text, soft_wrap=True)


def _failure(made: "Conversion", rows: Path | None) -> str:
    wrong = [one for one in made.differences if one.differing]
    where = dict.fromkeys(one.where for one in wrong)
    kinds = ", ".join(f"{kind}" if kind == "given rows" else f"rows {kind}" for kind in where)
    text = f"the answers differ by more than {made.tolerance:g}, most for {kinds}, so no file was written"
    if all("missing" in kind for kind in where):
        return (
            f"{text}: if callers never send missing values, add --no-missing; otherwise serve the model with MLServer"
        )
    own = "" if rows is not None else ", or see with --rows whether it matters for your rows"
    return f"{text}: serve the model itself with MLServer (docs/mlserver.md){own}, or allow more with --tolerance"


def _described(made: "Conversion", target: Path) -> dict[str, Any]:
    return {
        "output": str(target) if made.exact else "",
        "exact": made.exact,
        "inputs": [{"name": name, "datatype": kind, "columns": columns} for name, kind, columns in made.inputs],
        "differences": [_difference(one) for one in made.differences],
    }


def _difference(one: "OutputDifference") -> dict[str, Any]:
    found: dict[str, Any] = {"output": one.output, "rows": "given" if one.given else "made up", "count": one.rows}
    found |= {"differing": one.differing, "tied": one.tied}
    return found if one.classes else found | {"absolute": _finite(one.absolute), "relative": _finite(one.relative)}


def _finite(number: float) -> float | None:
    """Returns a number that JSON has, or None for infinity."""
    return number if number < float("inf") else None
