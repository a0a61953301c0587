"""`mesh infer`: calls a model over gRPC or REST, with inputs from files or generated inputs."""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mesh.cli import options, output
from mesh.cli.client import Client

if TYPE_CHECKING:  # numpy, grpc and protobuf take half a second to import, and no other command needs them
    from mesh.cli.call import InferRequest
    from mesh.cli.tensors import Array

SHOWN = 8
"""Number of values of an output that a table shows."""

GrpcEndpoint = Annotated[
    str,
    typer.Option(
        "--grpc-endpoint",
        envvar="MESH_GRPC_ENDPOINT",
        metavar="HOST:PORT",
        help="Address of the mesh's gRPC interface, if it differs from --endpoint.",
        show_envvar=False,
        rich_help_panel="Mesh",
    ),
]


def add(app: typer.Typer) -> None:
    """Adds this module's command."""
    app.command("infer", rich_help_panel=options.MODELS)(infer)


def infer(
    context: typer.Context,
    model: options.ModelOrAlias,
    file: Annotated[
        str, typer.Option("--file", "-f", metavar="FILE", help="File with a request as JSON; - for standard input.")
    ] = "",
    npy: Annotated[
        list[str] | None, typer.Option("--npy", metavar="NAME=FILE", help="Input from a .npy file; may be repeated.")
    ] = None,
    zeros: Annotated[bool, typer.Option("--zeros", help="Generate zeros instead of random values.")] = False,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Seed of the random values: the same seed gives the same input.")
    ] = 0,
    rows: Annotated[
        int,
        typer.Option(
            "--rows", "-n", min=1, help="Size of the first dimension of generated inputs, if the model leaves it open."
        ),
    ] = 1,
    shape: Annotated[
        list[str] | None,
        typer.Option("--shape", metavar="NAME=1,3,8", help="Shape of a generated input; may be repeated."),
    ] = None,
    rest: Annotated[bool, typer.Option("--rest", help="Call over REST instead of gRPC.")] = False,
    timeout: options.Timeout = 60.0,
    endpoint: options.Endpoint = "",
    grpc_endpoint: GrpcEndpoint = "",
    as_json: options.Json = False,
) -> None:
    """Calls a model and shows its outputs.

    Without --file and --npy, inputs are generated from the model's metadata. A request file has the JSON of the V2
    protocol (Open Inference Protocol), such as
    `{"inputs": [{"name": "X", "datatype": "FP32", "shape": [1, 2], "data": [0.5, 1.5]}]}`.

    Examples:

    - `mesh infer fraud/de`
    - `mesh infer fraud/de --shape X=4,30 --zeros`
    - `mesh infer fraud/de --npy X=rows.npy --json`
    - `mesh infer fraud/de --file request.json --rest`
    """
    if bool(file) + bool(npy) + bool(zeros or shape) > 1:
        raise typer.BadParameter(
            "--file, --npy and generated inputs (--zeros, --shape) exclude each other: use one of them"
        )

    async def command(client: Client) -> None:
        from mesh.cli import call, tensors

        request = _given(model, file, npy or [])
        carrier: call.Carrier
        if rest:
            carrier = call.Rest(client, timeout)
        else:
            carrier = call.Grpc(grpc_endpoint or client.endpoint, timeout, options.trust_of(context))
        try:
            if not request.inputs:
                metadata = await carrier.metadata(model)
                shapes = dict(tensors.parse_shape(text) for text in shape or ())
                inputs = metadata["inputs"]
                request.inputs = tensors.made_up(inputs, rows=rows, shapes=shapes, random=not zeros, seed=seed)
            started = time.monotonic()
            outputs = await carrier.infer(request)
            _show(request, outputs, (time.monotonic() - started) * 1000, as_json=as_json)
        finally:
            await carrier.close()

    options.run(context, command, endpoint=endpoint, as_json=as_json, timeout=timeout)


def _given(model: str, file: str, npy: list[str]) -> "InferRequest":
    """Returns the user's request, without inputs if they are to be generated."""
    from mesh.cli import tensors
    from mesh.cli.call import InferRequest

    if npy:
        return InferRequest(model, inputs=dict(tensors.read_npy(text) for text in npy))
    if not file:
        return InferRequest(model)
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text()
        data = json.loads(text)
        inputs = dict(tensors.from_json(tensor, number) for number, tensor in enumerate(data["inputs"], start=1))
        outputs = tuple(str(tensor["name"]) for tensor in data.get("outputs") or ())
    except OSError as error:
        raise tensors.usage(f"{file} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, KeyError):
            why = f"{error} is missing"
        else:
            why = f"{error}" if isinstance(error, ValueError) else "it must be an object with a list of inputs"
        raise tensors.usage(f"{file} is not a V2 request: {why}") from error
    if not inputs:
        raise tensors.usage(f"{file} is not a V2 request: it has no inputs")
    return InferRequest(model, inputs, outputs, data.get("parameters") or {})


def _show(request: "InferRequest", outputs: "dict[str, Array]", milliseconds: float, *, as_json: bool) -> None:
    if as_json:
        listed = [_as_json(name, array) for name, array in outputs.items()]
        output.print_json({"model_name": request.model, "outputs": listed, "ms": round(milliseconds, 3)})
        return
    from mesh.cli import tensors

    made = output.table("OUTPUT", "TYPE", "SHAPE", "VALUES")
    for name, array in outputs.items():
        made.add_row(
            output.plain(name),
            tensors.datatype(name, array),
            str(list(array.shape)),
            output.plain(_values(tensors.shown(array))),
        )
    output.console().print(made)
    output.remarks().print(f"[dim]{milliseconds:.1f} ms[/]")


def _as_json(name: str, array: "Array") -> dict[str, Any]:
    from mesh.cli import tensors

    values = tensors.shown(array).reshape(-1)
    data = [_text(value) for value in values] if array.dtype.kind == "O" else values.tolist()
    return {"name": name, "datatype": tensors.datatype(name, array), "shape": list(array.shape), "data": data}


def _values(array: "Array") -> str:
    flat = array.reshape(-1)
    shown = [
        _text(v) if isinstance(v, bytes | str) else f"{v:.6g}" if v.dtype.kind == "f" else str(v) for v in flat[:SHOWN]
    ]
    return ", ".join(shown) + (f", ... ({flat.size} in all)" if flat.size > SHOWN else "")


def _text(value: Any) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
