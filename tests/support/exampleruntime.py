"""A foreign model server for tests: `python -m tests.support.exampleruntime --listen unix:/tmp/s`.

It behaves like the example runtime that ModelMesh was tested with. It serves the SPI and the service
`mmesh.ExamplePredictor` (`exampleproto`) over real gRPC (`grpc.aio`), and knows nothing of copies, slots and the use
board. The last element of a model's path determines what the model does, and the text of a call what the call does.

| path | the model |
| --- | --- |
| `SIZE_<bytes>_<load ms>_<unload ms>` | has that size, and takes so long to be loaded and unloaded |
| `SIZE_..._..._..._<lie>` | also states a wrong size: `small`, `large`, `zero`, `negative` or `huge` |
| `FAIL_<text>` | fails its first load with INTERNAL and that text, and is loaded by later ones |
| `HANG` | is never loaded: its load does not end |
| `BLOCK` | is never loaded: its load blocks the whole server |
| `CRASH` | kills the server when it is loaded |

| text of a call | the answer |
| --- | --- |
| `fail CODE TEXT` | that status, with details and a trailer |
| `sleep SECONDS` | a prediction after that time; if the call is cancelled, the diary says so |
| `crash` | none: the server ends |
| `drop`, `purge` | a prediction, after which the server has dropped this model, or all |
| anything else | a prediction: that text, under the model's id |

Other methods take and return bytes, for tests of large messages and long streams (`bulk`).

`predict` is unary, and so are `predictModel` and `predictVModel`, which do the same. `predictEach` answers each text
of `texts` with a message, `predictAll` answers a stream of requests with one message, and `converse` answers each
request of a stream before it reads the next.

With `--allocate`, models take their size in memory. With `--v2`, `ModelInfer` of V2 answers with the number that a
model's file contains. It finds the model by the name in the message, not by metadata, as most servers do. With `--lie
FILE`, that file names the lie of all loads.

Each request is noted as a line in the file of `--diary`: `load m`, `unload m`, `status`, `predict m`.
"""

import argparse
import asyncio
import contextlib
import os
import re
import signal
import struct
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import grpc

from mesh.pb import details_pb2, inference_pb2, modelruntime_pb2_grpc
from mesh.pb import modelruntime_pb2 as pb
from tests.support import bulk
from tests.support.exampleproto import SERVICE, PredictRequest, PredictResponse

MODULE = "tests.support.exampleruntime"

CAPACITY = 1 << 30
DEFAULT_SIZE = 50 << 20
SIZE = 64 << 20
"""Bytes of a model whose path says none."""

LIES = {
    "small": lambda size: max(1, size // 100),
    "large": lambda size: size * 8,
    "zero": lambda size: 0,
    "negative": lambda size: (1 << 64) - size,
    "huge": lambda size: 1 << 62,
}
"""The size that a lying server states, by the kind of lie."""

_INFER = "inference.GRPCInferenceService"
FORMER_NAME = "/com.ibm.watson.tas.internal.proto.ModelServer/"

_FORMS = {
    "plain": (grpc.StatusCode.NOT_FOUND, "model {} is not loaded"),
    "triton": (grpc.StatusCode.UNAVAILABLE, "Request for unknown model: '{}' is not found"),
    "mlserver": (grpc.StatusCode.INVALID_ARGUMENT, "Model {} not found"),
}


class ExampleRuntime(modelruntime_pb2_grpc.ModelRuntimeServicer):
    """The SPI and the predictor of one example runtime."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.models: dict[str, str] = {}  # id -> last element of the path
        self.numbers: dict[str, float] = {}  # id -> the number in its file
        self.memory: dict[str, bytearray] = {}  # id -> the memory that it takes
        self.failed: set[str] = set()
        self.running: dict[str, int] = {}
        self.most: dict[str, int] = {}  # the most concurrent calls, by id
        self.asked_for_status = 0

    def note(self, line: str) -> None:
        if self.options.diary:
            with self.options.diary.open("a") as diary:
                diary.write(line + "\n")

    # --- the SPI

    async def runtimeStatus(self, request: Any, context: Any) -> Any:
        self.asked_for_status += 1
        self.note("status")
        kind = pb.RuntimeStatusResponse
        if self.asked_for_status <= self.options.starting:
            return kind(status=kind.STARTING)
        self._drop(*self.models)
        status = kind(
            status=kind.READY,
            capacityInBytes=self.options.capacity,
            maxLoadingConcurrency=self.options.loading,
            modelLoadingTimeoutMs=self.options.load_timeout_ms,
            defaultModelSizeInBytes=DEFAULT_SIZE,
            runtimeVersion="example 1",
            limitModelConcurrency=bool(self.options.concurrency),
            allowAnyMethod=self.options.allow_any,
        )
        if self.options.device:
            context.set_trailing_metadata((("mesh-device-total", str(self.options.device)), ("mesh-device-used", "0")))
        for method in self.options.method:
            name, _, path = method.partition("=")
            status.methodInfos[name].idInjectionPath.extend(int(number) for number in path.split(".") if number)
        return status

    async def loadModel(self, request: Any, context: Any) -> Any:
        self.note(f"load {request.modelId}")
        what = unquote(Path(request.modelPath).name)
        if what.startswith("FAIL_") and request.modelId not in self.failed:
            self.failed.add(request.modelId)
            await context.abort(grpc.StatusCode.INTERNAL, what.removeprefix("FAIL_"))
        if what == "HANG":
            await asyncio.Event().wait()
        if what == "BLOCK":
            threading.Event().wait()
        if what == "CRASH":
            os.abort()
        await asyncio.sleep(_sizes(what)[1] / 1000)
        if self.options.allocate:
            self.memory[request.modelId] = bytearray(b"1") * _sizes(what)[0]
        if self.options.v2:
            with contextlib.suppress(ValueError):  # a model without a number
                self.numbers[request.modelId] = float(Path(request.modelPath).read_text())
        self.models[request.modelId] = what
        if self.options.device:
            size = str(_sizes(what)[0])
            context.set_trailing_metadata((("mesh-host-bytes", "1000"), ("mesh-device-bytes", size), self._used()))
        return pb.LoadModelResponse(
            sizeInBytes=self._stated(what) if self.options.sizes and not self.options.model_size else 0,
            maxConcurrency=self.options.concurrency,
        )

    async def unloadModel(self, request: Any, context: Any) -> Any:
        self.note(f"unload {request.modelId}")
        what = self._drop(request.modelId)
        if what is None and self.options.strict_unload:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such model")
        await asyncio.sleep(_sizes(what or "")[2] / 1000)
        return pb.UnloadModelResponse()

    async def modelSize(self, request: Any, context: Any) -> Any:
        if not self.options.model_size or not self.options.sizes:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "sizes come with loads")
        if request.modelId not in self.models:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"model {request.modelId} is not loaded")
        if self.options.device:
            context.set_trailing_metadata((self._used(),))
        return pb.ModelSizeResponse(sizeInBytes=self._stated(self.models[request.modelId]))

    async def predictModelSize(self, request: Any, context: Any) -> Any:
        if not self.options.predict:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "not predicted")
        return pb.PredictModelSizeResponse(sizeInBytes=self.options.predict)

    def _used(self) -> tuple[str, str]:
        return "mesh-device-used", str(sum(_sizes(what)[0] for what in self.models.values()))

    def _stated(self, what: str) -> int:
        told = self.options.lie.read_text().strip() if self.options.lie and self.options.lie.exists() else ""
        lie = LIES.get(told) or LIES.get(what.rpartition("_")[2])
        return lie(_sizes(what)[0]) if lie else _sizes(what)[0]

    def _drop(self, *ids: str) -> str | None:
        """Drops models. Returns the last element of the last model's path, or None if the server did not have it."""
        what = None
        for model_id in ids:
            what = self.models.pop(model_id, None)
            self.memory.pop(model_id, None)
            self.numbers.pop(model_id, None)
        return what

    # --- the predictor

    async def infer(self, request: Any, context: Any) -> Any:
        if request.model_name not in self.numbers:
            code, text = _FORMS[self.options.not_found]
            await context.abort(code, text.format(request.model_name))
        response = inference_pb2.ModelInferResponse(model_name=request.model_name, id=request.id)
        response.outputs.add(name="y", datatype="FP32", shape=[1, 1])
        response.raw_output_contents.append(struct.pack("<f", self.numbers[request.model_name]))
        return response

    async def infer_each(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        """Answers Triton's ModelStreamInfer with plain answers of ModelInfer."""
        async for request in requests:
            yield await self.infer(request, context)

    async def predict(self, request: Any, context: Any) -> Any:
        model_id = _model_id(context)
        self.note(f"predict {model_id}")
        self.running[model_id] = self.running.get(model_id, 0) + 1
        self.most[model_id] = max(self.most.get(model_id, 0), self.running[model_id])
        try:
            return await self._answer(model_id, request, context)
        except asyncio.CancelledError:
            self.note(f"cancelled {model_id}")
            raise
        finally:
            self.running[model_id] -= 1

    async def _answer(self, model_id: str, request: Any, context: Any) -> Any:
        if model_id not in self.models:
            code, text = _FORMS[self.options.not_found]
            await context.abort(code, text.format(model_id))
        words = request.text.split(maxsplit=2)
        match words:
            case ["fail", code, *text]:
                failure = details_pb2.Status(code=3, message="details of the example")
                context.set_trailing_metadata(
                    (
                        ("grpc-status-details-bin", failure.SerializeToString()),
                        ("example-trailer", "told"),
                    )
                )
                await context.abort(getattr(grpc.StatusCode, code), " ".join(text))
            case ["sleep", seconds, *_]:
                await asyncio.sleep(float(seconds))
            case ["crash"]:
                os._exit(9)
            case ["drop"]:
                self._drop(model_id)
            case ["purge"]:
                self._drop(*self.models)
        sent = sorted(key for key, _ in context.invocation_metadata())
        await context.send_initial_metadata((("example-header", "of the server"),))
        context.set_trailing_metadata(
            (
                ("example-trailer", "of the server"),
                ("example-names", ",".join(sent)),
                ("example-most", str(self.most[model_id])),
                ("example-bin", bytes(dict(context.invocation_metadata()).get("client-bin", b""))),
            )
        )
        return PredictResponse(
            results={model_id: request.text},
            model_name=request.model_name,
            inner_model_name=request.inner.model_name,
        )

    async def predict_each(self, request: Any, context: Any) -> AsyncIterator[Any]:
        model_id = _model_id(context)
        for text in request.texts:
            if text == "wait":
                await asyncio.Event().wait()
            yield PredictResponse(results={model_id: text}, model_name=request.model_name)

    async def predict_all(self, requests: Any, context: Any) -> Any:
        texts = [request.text async for request in requests]
        return PredictResponse(results={_model_id(context): " ".join(texts)})

    async def converse(self, _: Any, context: Any) -> None:
        model_id = _model_id(context)
        while (request := await context.read()) is not grpc.aio.EOF:
            if model_id not in self.models:
                code, text = _FORMS[self.options.not_found]
                await context.abort(code, text.format(model_id))
            if request.text.startswith("fail"):
                context.set_trailing_metadata((("example-trailer", "told"),))
                await context.abort(grpc.StatusCode.DATA_LOSS, "as wanted")
            await context.write(PredictResponse(results={model_id: request.text}, model_name=request.model_name))
        try:
            await asyncio.sleep(0.05)  # the end of a cancelled stream arrives before its cancellation
        except asyncio.CancelledError:
            self.note(f"cancelled {model_id}")
            raise
        context.set_trailing_metadata((("example-trailer", "of the server"),))


def _model_id(context: Any) -> str:
    raw = dict(context.invocation_metadata()).get("mm-model-id-bin")
    return raw.decode() if raw is not None else ""


def _sizes(what: str) -> tuple[int, float, float]:
    """Returns a model's size in bytes, and the milliseconds of its load and unload."""
    found = re.fullmatch(r"SIZE_(\d+)_(\d+)_(\d+)(?:_\w+)?", what)
    return (int(found[1]), float(found[2]), float(found[3])) if found else (SIZE, 0.0, 0.0)


def argv(listen: str, *options: str) -> list[str]:
    return [sys.executable, "-m", MODULE, "--listen", listen, *options]


def _add_spi(runtime: ExampleRuntime, server: Any, *, former: bool) -> None:
    """Adds the SPI, under the former name of its service if requested."""

    class Renamed(grpc.GenericRpcHandler):
        def __init__(self, handlers: Any) -> None:
            self._handlers = handlers

        def service(self, details: Any) -> Any:
            if not details.method.startswith(FORMER_NAME):
                return None
            name = "/mmesh.ModelRuntime/" + details.method.removeprefix(FORMER_NAME)
            return self._handlers.service(SimpleNamespace(method=name, invocation_metadata=()))

    added = SimpleNamespace(
        add_generic_rpc_handlers=lambda handlers: server.add_generic_rpc_handlers((Renamed(handlers[0]),)),
        add_registered_method_handlers=lambda *_: None,
    )
    modelruntime_pb2_grpc.add_ModelRuntimeServicer_to_server(runtime, added if former else server)


async def serve(options: argparse.Namespace) -> None:
    """Serves until the process is told to end."""
    runtime = ExampleRuntime(options)
    server = grpc.aio.server(options=(("grpc.max_receive_message_length", -1),))
    _add_spi(runtime, server, former=options.former)
    read, write = PredictRequest.FromString, PredictResponse.SerializeToString
    predict = grpc.unary_unary_rpc_method_handler(runtime.predict, read, write)
    handlers = {
        "predict": predict,
        "predictModel": predict,
        "predictVModel": predict,
        "predictEach": grpc.unary_stream_rpc_method_handler(runtime.predict_each, read, write),
        "predictAll": grpc.stream_unary_rpc_method_handler(runtime.predict_all, read, write),
        "converse": grpc.stream_stream_rpc_method_handler(runtime.converse, read, write),
    }
    handlers |= bulk.Bulk().handlers()
    services: list[grpc.GenericRpcHandler] = [grpc.method_handlers_generic_handler(SERVICE, handlers)]
    if options.v2:
        coding = inference_pb2.ModelInferRequest.FromString, inference_pb2.ModelInferResponse.SerializeToString
        inferring = {
            "ModelInfer": grpc.unary_unary_rpc_method_handler(runtime.infer, *coding),
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(runtime.infer_each, *coding),
        }
        services.append(grpc.method_handlers_generic_handler(_INFER, inferring))
    if not options.calls:
        server.add_generic_rpc_handlers(tuple(services))
    if options.listen.startswith("unix:"):
        Path(options.listen.removeprefix("unix:")).unlink(missing_ok=True)
    server.add_insecure_port(options.listen)
    if options.calls:
        calls = grpc.aio.server(options=(("grpc.max_receive_message_length", -1),))
        calls.add_generic_rpc_handlers(tuple(services))
        calls.add_insecure_port(options.calls)
        await calls.start()
    await server.start()
    print(f"example runtime listens on {options.listen}", flush=True)
    await server.wait_for_termination()


def main() -> None:
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--listen", required=True)
    add("--calls", default="", help="Address of the predictor, if it is not the SPI's.")
    add("--capacity", type=int, default=CAPACITY)
    add("--loading", type=int, default=6)
    add("--load-timeout-ms", type=int, default=90_000)
    add("--starting", type=int, default=0, help="Number of status requests to answer with STARTING.")
    add(
        "--method",
        action="append",
        default=[],
        help="Method for the status to list: NAME, or NAME=1.2 with the path of the model id.",
    )
    add("--allow-any", action="store_true")
    add("--concurrency", type=int, default=0)
    add("--not-found", choices=sorted(_FORMS), default="plain")
    add("--no-model-size", dest="model_size", action="store_false")
    add("--no-sizes", dest="sizes", action="store_false", help="State no sizes.")
    add("--predict", type=int, default=0, help="Predicted size of all models, in bytes; 0: no predictions.")
    add("--strict-unload", action="store_true")
    add("--allocate", action="store_true")
    add("--device", type=int, default=0, help="Memory of a device that holds the models, in bytes; 0: no device.")
    add("--v2", action="store_true")
    add("--lie", type=Path, help="File that names the lie of all loads.")
    add("--former", action="store_true", help="Speak the SPI only under the former name of its service.")
    add("--diary", type=Path)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # otherwise ignored by the first process of a container
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
