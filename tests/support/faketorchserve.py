"""A stand-in for TorchServe in the test's own process: its management API and `Predictions`, as version 0.12 answers.

Like TorchServe, it takes a folder of its model store, does not say why a process did not start, keeps such a model
registered, and answers calls of unknown models with INTERNAL. `make test-servers` tests the adapter with the real
TorchServe, if there is one. In place of Mesh's handler it answers V2 with the request's inputs.
"""

import asyncio
import json
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc

from mesh.pb import inference_pb2 as v2
from mesh.pb import torchserve_inference_pb2 as inference
from mesh.pb import torchserve_inference_pb2_grpc as inference_grpc
from mesh.pb import torchserve_management_pb2 as pb
from mesh.pb import torchserve_management_pb2_grpc as management_grpc

_UNKNOWN = "Model not found: {}\norg.pytorch.serve.archive.model.ModelNotFoundException"


class FakeTorchServe(
    management_grpc.ManagementAPIsServiceServicer,  # type: ignore[misc]
    inference_grpc.InferenceAPIsServiceServicer,  # type: ignore[misc]
):
    """The server: `async with FakeTorchServe(root) as server`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.loaded: dict[str, dict[str, Any]] = {}  # manifests by name
        self.requests: list[pb.RegisterModelRequest] = []
        self.fails = ""  # what the handler leaves as the reason of a failed load
        self.breaks = False  # whether processes end without a reason
        self.hangs = False
        self.answers = b""  # what Predictions answers, if not the inputs
        self.died = False  # whether the process of the next call ends
        self.address = f"unix:{root.parent / 'fake.sock'}"
        self._server = grpc.aio.server()

    async def __aenter__(self) -> "FakeTorchServe":
        management_grpc.add_ManagementAPIsServiceServicer_to_server(self, self._server)
        inference_grpc.add_InferenceAPIsServiceServicer_to_server(self, self._server)
        self._server.add_insecure_port(self.address)
        await self._server.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._server.stop(None)

    async def RegisterModel(self, request: Any, context: Any) -> Any:
        """Loads a folder of the model store."""
        self.requests.append(request)
        folder = self.root / request.url
        if not folder.is_dir():
            text = f"Model not found at: {request.url}\norg.pytorch.serve.archive.model.ModelNotFoundException"
            await context.abort(grpc.StatusCode.NOT_FOUND, text)
        if request.model_name in self.loaded:
            await context.abort(grpc.StatusCode.UNKNOWN, "")
        self.loaded[request.model_name] = json.loads((folder / "MAR-INF" / "MANIFEST.json").read_text())
        if self.hangs:
            await asyncio.Event().wait()
        if self.fails:
            (folder / "failure.txt").write_text(self.fails.format(folder=folder))
        if self.fails or self.breaks:
            text = f"Failed to start workers for model {request.model_name} version: 1.0"
            await context.abort(grpc.StatusCode.INTERNAL, f"{text}\norg.pytorch.serve.http.InternalServerException")
        return pb.ManagementResponse(msg=f'Model "{request.model_name}" Version: 1.0 registered with 1 initial workers')

    async def UnregisterModel(self, request: Any, context: Any) -> Any:
        if self.loaded.pop(request.model_name, None) is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, _UNKNOWN.format(request.model_name))
        return pb.ManagementResponse(msg=f'Model "{request.model_name}" unregistered')

    async def DescribeModel(self, request: Any, context: Any) -> Any:
        if request.model_name not in self.loaded:
            await context.abort(grpc.StatusCode.NOT_FOUND, _UNKNOWN.format(request.model_name))
        return pb.ManagementResponse(msg=json.dumps([{"modelName": request.model_name}]))

    async def ListModels(self, request: Any, context: Any) -> Any:
        """Lists a page of models, which is empty if the limit is 0."""
        names = sorted(self.loaded)
        begin, end = request.next_page_token, request.next_page_token + min(request.limit, 100)
        page: dict[str, Any] = {"models": [{"modelName": name, "modelUrl": "x"} for name in names[begin:end]]}
        if end <= len(names):
            page["nextPageToken"] = str(end)
        return pb.ManagementResponse(msg=json.dumps(page))

    async def Predictions(self, request: Any, context: Any) -> Any:
        """Answers a V2 call with the inputs as outputs, in the form of Mesh's handler."""
        if request.model_name not in self.loaded:
            await context.abort(grpc.StatusCode.INTERNAL, _UNKNOWN.format(request.model_name))
        if self.died:
            self.died = False
            text = "Worker died.\norg.pytorch.serve.http.InternalServerException"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        if self.answers:
            return inference.PredictionResponse(prediction=self.answers)
        given = v2.ModelInferRequest.FromString(request.input["mesh-v2-infer"])
        answer = v2.ModelInferResponse(model_name=given.model_name, id=given.id)
        for tensor in given.inputs:
            answer.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        answer.raw_output_contents.extend(given.raw_input_contents)
        return inference.PredictionResponse(prediction=b"\0" + answer.SerializeToString())
