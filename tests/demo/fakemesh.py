"""A fake of a mesh's interfaces in one process: V2 over gRPC and REST, bulk import, statistics.

The fake answers with onnxruntime's results in every form that the protocol allows. On request it misbehaves, to test
whether the demo's checks notice. The real mesh has its own tests.
"""

import json
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
from aiohttp import web

from mesh.demo.fleet.catalogue import Fleet
from mesh.demo.fleet.reference import Reference
from mesh.pb import inference_pb2

NAMES = {"FP32": np.float32, "FP64": np.float64, "INT64": np.int64, "INT32": np.int32}
CONTENTS = {"FP32": "fp32_contents", "FP64": "fp64_contents", "INT64": "int64_contents", "BYTES": "bytes_contents"}

Fault = Callable[[str, int], tuple[int, int, str] | None]
"""A fault of a model and the number of the call: gRPC code, HTTP status and text, or None for an answer."""


def v2_name(array: np.ndarray) -> str:
    return {"float32": "FP32", "float64": "FP64", "int64": "INT64", "int32": "INT32"}.get(str(array.dtype), "BYTES")


def blob(array: np.ndarray) -> bytes:
    if array.dtype != object:
        return array.tobytes()
    items = [item.encode() for item in array.flat]
    return b"".join(len(item).to_bytes(4, "little") + item for item in items)


class FakeMesh:
    def __init__(self, fleet: Fleet) -> None:
        self.fleet = {sample.id: sample for sample in fleet.models}
        self.reference = Reference()
        self.registered: dict[str, dict[str, Any]] = {}
        self.calls = 0
        self.fault: Fault = lambda model, number: None
        self.wrong: str = ""  # the id of the model that answers with another's values
        self.raw = True  # whether gRPC answers raw contents
        self.import_error: dict[str, Any] | None = None
        self.digests: dict[str, str] = {}  # by model, the digest of its former load
        self.reloaded: list[str] = []
        self.endpoint = self.grpc_endpoint = ""

    async def start(self) -> None:
        app = web.Application(client_max_size=2**26)
        app.router.add_post("/mesh/v1/models:import", self.import_models)
        app.router.add_get("/mesh/v1/models", self.list_models)
        app.router.add_post("/mesh/v1/models/{model}/reload", self.reload)
        app.router.add_get("/mesh/v1/stats", self.stats)
        app.router.add_get("/mesh/v1/pods", self.pods)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_post("/v2/models/{model}/infer", self.rest_infer)
        self.runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        self.address = f"127.0.0.1:{self.runner.addresses[0][1]}"
        self.endpoint = f"http://{self.address}"
        self.server = grpc.aio.server()
        handler = grpc.unary_unary_rpc_method_handler(
            self.grpc_infer,
            request_deserializer=inference_pb2.ModelInferRequest.FromString,
            response_serializer=inference_pb2.ModelInferResponse.SerializeToString,
        )
        service = grpc.method_handlers_generic_handler("inference.GRPCInferenceService", {"ModelInfer": handler})
        self.server.add_generic_rpc_handlers((service,))
        self.grpc_endpoint = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        await self.server.start()

    async def list_models(self, request: web.Request) -> web.Response:
        """Lists the models, one on each page."""
        ids = sorted(model for model in self.registered if model > request.query["after"])
        models = [{"id": model, "digest": self.digests.get(model, "")} for model in ids[:1]]
        return web.json_response({"models": models, "next": ids[0] if len(ids) > 1 else None})

    async def reload(self, request: web.Request) -> web.Response:
        self.reloaded.append(request.match_info["model"])
        return web.json_response({"id": request.match_info["model"]})

    async def stop(self) -> None:
        await self.server.stop(None)
        await self.runner.cleanup()

    def answer(self, model: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = self.reference.answer(self.fleet[model], inputs)
        if model == self.wrong:
            return {name: array + 1 if array.dtype != object else array[::-1] for name, array in outputs.items()}
        return outputs

    def failing(self, model: str) -> tuple[int, int, str] | None:
        self.calls += 1
        return self.fault(model, self.calls)

    async def import_models(self, request: web.Request) -> web.Response:
        lines = [json.loads(line) for line in (await request.read()).splitlines()]
        if self.import_error is not None:
            return web.Response(text=json.dumps(self.import_error) + "\n")
        existing = sum(line["id"] in self.registered for line in lines)
        self.registered |= {line["id"]: line for line in lines}
        counts = {"created": len(lines) - existing, "existing": existing, "failed": 0}
        return web.Response(text=json.dumps({"finished": True, **counts}) + "\n")

    async def stats(self, _: web.Request) -> web.Response:
        latency = {"p50": 1.0, "p90": 2.0, "p99": 3.0, "count": self.calls}
        answer = {"hits": self.calls, "cold_starts": 0, "loads": 0, "latency_ms": {"hit": latency, "cold": latency}}
        return web.json_response(answer)

    async def pods(self, _: web.Request) -> web.Response:
        return web.json_response({"pods": [{"pod": "pod-1", "capacity": 1000, "probe": self.address}]})

    async def metrics(self, _: web.Request) -> web.Response:
        return web.Response(text=f"# a comment\nmodelmesh_age_at_eviction_milliseconds_count {2 * self.calls}\n")

    async def grpc_infer(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        if failing := self.failing(request.model_name):
            code = next(code for code in grpc.StatusCode if code.value[0] == failing[0])
            await context.abort(code, failing[2])
        inputs = {}
        for index, tensor in enumerate(request.inputs):
            dtype = NAMES[tensor.datatype]
            if request.raw_input_contents:
                values = np.frombuffer(request.raw_input_contents[index], dtype)
            else:
                values = np.array(getattr(tensor.contents, CONTENTS[tensor.datatype]), dtype)
            inputs[tensor.name] = values.reshape(list(tensor.shape))
        reply = inference_pb2.ModelInferResponse(model_name=request.model_name)
        for name, array in self.answer(request.model_name, inputs).items():
            tensor = reply.outputs.add(name=name, datatype=v2_name(array), shape=array.shape)
            if self.raw:
                reply.raw_output_contents.append(blob(array))
            else:
                values = [v.encode() if isinstance(v, str) else v for v in array.ravel().tolist()]
                getattr(tensor.contents, CONTENTS[tensor.datatype]).extend(values)
        return reply

    async def rest_infer(self, request: web.Request) -> web.Response:
        model = request.match_info["model"]
        if failing := self.failing(model):
            code, status, text = failing
            if text == "no JSON":
                return web.Response(status=status, text="upstream connect error")
            return web.json_response({"error": text, "reason": "X", "code": code}, status=status)
        body = await request.read()
        length = int(request.headers.get("Inference-Header-Content-Length", len(body)))
        head, rest = json.loads(body[:length]), body[length:]
        inputs = {}
        for tensor in head["inputs"]:
            size = tensor.get("parameters", {}).get("binary_data_size")
            if size is None:
                values = np.array(tensor["data"], NAMES[tensor["datatype"]])
            else:
                values, rest = np.frombuffer(rest[:size], NAMES[tensor["datatype"]]), rest[size:]
            inputs[tensor["name"]] = values.reshape(tensor["shape"])
        binary = head.get("parameters", {}).get("binary_data_output", False)
        outputs, blobs = [], []
        for name, array in self.answer(model, inputs).items():
            tensor = {"name": name, "datatype": v2_name(array), "shape": array.shape}
            if binary:
                blobs.append(blob(array))
                tensor["parameters"] = {"binary_data_size": len(blobs[-1])}
            else:
                tensor["data"] = array.tolist()  # nested, as the protocol allows
            outputs.append(tensor)
        head_out = json.dumps({"model_name": model, "outputs": outputs}).encode()
        headers = {"Inference-Header-Content-Length": str(len(head_out))} if binary else {}
        return web.Response(body=head_out + b"".join(blobs), headers=headers)
