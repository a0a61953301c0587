"""The text that `mesh up` prints once all parts are ready: sample models, the endpoint, three commands to try.

Each command works when pasted into a shell on this machine. If there are sample models, the commands call one.
"""

import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from mesh.cli import tensors
from mesh.cli.client import DEFAULT_ENDPOINT, Client, model_path
from mesh.cli.exits import CommandError, MeshRefusal
from mesh.cli.trust import Trust
from mesh.local.settings import UpSettings
from mesh.options.values import format_bytes
from mesh.statuses import Reason
from mesh.telemetry import logs
from mesh.v2 import SERVICE, datatypes

if TYPE_CHECKING:
    from mesh.demo.fleet import Sample

log = logs.get(__name__)


async def text(settings: UpSettings, *, capacity: int, samples: bool) -> str:
    """Registers the sample models if `samples` is true, and returns the text to print. A failure to make or register
    them is only logged."""
    endpoint = f"http://{settings.rest_address}"
    registered: list[str] = []
    request: dict[str, Any] | None = None
    key = settings.admin_key()
    async with Client(endpoint, trust=Trust(api_key=key)) as client:
        if samples:
            try:
                made = await _samples(settings.samples_dir)
                registered = await register_samples(client, made)
                request = _request(made)
            except CommandError as error:
                log.warning("the sample models are not registered", error=str(error))
    pods = f"{_counted(settings.pods)} with {format_bytes(capacity)} for models{' each' if settings.pods > 1 else ''}"
    for kind in dict.fromkeys(settings.adapted):
        pods += f", {_counted(settings.adapted.count(kind))} with {kind}"
    if others := len(settings.servers):
        pods += f", {_counted(others)} with {'servers' if others > 1 else 'a server'} of other types"
    both = settings.rest_address == settings.grpc_address
    lines = [
        "",
        f"The mesh is up: {endpoint}" + (" (gRPC and REST)" if both else f" (REST), {settings.grpc_address} (gRPC)"),
        pods + (f", {len(registered)} sample models: {', '.join(registered)}" if registered else ""),
        "",
        *(_about_key(settings) if key else ()),
        "Try it from another terminal:",
        *(f"  {line}" for line in lines_to_try(settings, request)),
        "",
        f"Ctrl-C stops it; registrations are kept in {settings.data_dir}.",
        "",
    ]
    return "\n".join(lines)


def _counted(pods: int) -> str:
    """Returns a number of pods in words, such as "1 pod"."""
    return f"{pods} pod{'' if pods == 1 else 's'}"


def _about_key(settings: UpSettings) -> list[str]:
    needs = "Every request needs" if settings.auth == "required" else "Management needs"
    file = shlex.quote(str(settings.admin_key_file))
    return [f"{needs} a key. The admin's is in a file; `mesh` uses it after:", f"  export MESH_API_KEY_FILE={file}", ""]


async def _samples(folder: Path) -> "Sequence[Sample]":
    try:
        from mesh.demo import samples
    except ModuleNotFoundError as error:  # the container image has no demo
        raise CommandError("this installation of Mesh does not include the sample models") from error
    log.info("making the sample models that do not exist yet")
    try:
        return await samples.prepare(folder)
    except samples.NoSamples as error:
        raise CommandError(str(error)) from error


async def register_samples(client: Client, made: "Sequence[Sample]") -> list[str]:
    """Registers the sample models and returns their ids."""
    for sample in made:
        body = {"type": sample.type, "path": str(sample.path), "key": "", "load": False, "sync": False}
        try:
            answer = await client.request("PUT", model_path(sample.id), body=body)
            if answer.get("digest") not in (None, "", sample.sha256):
                # Made by other versions of the libraries: the file differs from the one that the mesh loaded before.
                await client.request("POST", model_path(sample.id, "/reload"))
        except MeshRefusal as error:
            if error.reason != Reason.CONFLICT.name:
                raise
            # The id is a sample's and its file has moved: the data directory was elsewhere before.
            await client.request("DELETE", model_path(sample.id))
            await client.request("PUT", model_path(sample.id), body=body)
    return [sample.id for sample in made]


def _request(made: "Sequence[Sample]") -> dict[str, Any] | None:
    """Returns a V2 request that is short enough to print, for the model with the shortest input."""
    if not made:
        return None

    def made_up(sample: "Sample") -> dict[str, tensors.Array]:
        return tensors.made_up([asdict(tensor) for tensor in sample.inputs], rows=1, shapes={}, random=True, seed=1)

    chosen = min(made, key=lambda sample: sum(array.size for array in made_up(sample).values()))
    return {"model": chosen.id, "inputs": [_short(tensors.to_json(k, v)) for k, v in made_up(chosen).items()]}


def _short(tensor: dict[str, Any]) -> dict[str, Any]:
    """Rounds the numbers of a tensor, because the request is only an example."""
    return {**tensor, "data": [round(v, 1) if isinstance(v, float) else v for v in tensor["data"]]}


def lines_to_try(settings: UpSettings, request: dict[str, Any] | None) -> list[str]:
    """Returns commands to try, over REST, gRPC and the command line. They call a sample model, or else ask the mesh
    itself."""
    endpoint = f"http://{settings.rest_address}"
    here = [] if endpoint == DEFAULT_ENDPOINT else ["--endpoint", endpoint]
    if settings.rest_address != settings.grpc_address and request is not None:
        here += ["--grpc-endpoint", settings.grpc_address]
    if request is None:
        return [f"curl -s {endpoint}/v2", shlex.join([*_mesh(), "pods", *here]), _python_ready(settings.grpc_address)]
    body = json.dumps({"inputs": request["inputs"]})
    model = quote(request["model"], safe="")
    return [
        f"curl -s {endpoint}/v2/models/{model}/infer -d {shlex.quote(body)}",
        _grpcurl(settings.grpc_address, request) or _python_infer(settings.grpc_address, request),
        shlex.join([*_mesh(), "infer", request["model"], *here]),
    ]


def _mesh() -> list[str]:
    """Returns the beginning of a command line that runs `mesh` from the current folder."""
    script = Path(sys.executable).parent / "mesh"
    found = shutil.which("mesh")
    if found and Path(found).exists() and script.exists() and Path(found).samefile(script):
        return ["mesh"]
    return [_shortest(script)] if script.exists() else [_shortest(Path(sys.executable)), "-P", "-m", "mesh"]


def _shortest(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _grpcurl(address: str, request: dict[str, Any]) -> str:
    """Returns a call with grpcurl, which uses reflection, or "" if grpcurl is not installed."""
    if shutil.which("grpcurl") is None:
        return ""
    message = {"model_name": request["model"], "inputs": [_typed(tensor) for tensor in request["inputs"]]}
    quoted = shlex.quote(json.dumps(message))
    return f"grpcurl -plaintext -d {quoted} {address} {SERVICE}/ModelInfer"


def _python_infer(address: str, request: dict[str, Any]) -> str:
    inputs = ", ".join(
        f"dict(name={json.dumps(t['name'])}, datatype={json.dumps(t['datatype'])}, shape={t['shape']}, "
        f"contents=dict({key}={_literals(t['data'])}))"
        for t in request["inputs"]
        for key in [datatypes.OF_NAME[t["datatype"]].field]
    )
    call = f"ModelInfer(v2.ModelInferRequest(model_name={json.dumps(request['model'])}, inputs=[{inputs}]))"
    return _python(address, call)


def _literals(values: list[Any]) -> str:
    """Formats a list as Python does, but with double quotes, so that a shell command can put it in single quotes."""
    return "[" + ", ".join(json.dumps(v) if isinstance(v, str) else repr(v) for v in values) + "]"


def _python_ready(address: str) -> str:
    return _python(address, "ServerReady(v2.ServerReadyRequest())")


def _python(address: str, call: str) -> str:
    code = (
        "import grpc; from mesh.pb import inference_pb2 as v2, inference_pb2_grpc as service; "
        f"print(service.GRPCInferenceServiceStub(grpc.insecure_channel({json.dumps(address)})).{call})"
    )
    return shlex.join([_shortest(Path(sys.executable)), "-P", "-c", code])


def _typed(tensor: dict[str, Any]) -> dict[str, Any]:
    contents = {datatypes.OF_NAME[tensor["datatype"]].field: tensor["data"]}
    return {"name": tensor["name"], "datatype": tensor["datatype"], "shape": tensor["shape"], "contents": contents}
