"""Clients of a mesh through one router, over gRPC or REST. Failures raise `Failed`, with gRPC's name of the status."""

import json
from pathlib import Path
from typing import Protocol

import aiohttp
import grpc
import numpy as np

from mesh.pb import modelmesh_pb2, modelmesh_pb2_grpc
from tests.support.arena import Arena

ONE = np.ones((1, 1), np.float32)

CHANGE_TIMEOUT = 25.0  # seconds, more than a router's own limits, so that the router's answer arrives

_OF_HTTP = {
    400: "INVALID_ARGUMENT",
    404: "NOT_FOUND",
    409: "ALREADY_EXISTS",
    412: "FAILED_PRECONDITION",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
_OF_REASON = {"CONFLICT": "ALREADY_EXISTS", "BAD_REQUEST": "INVALID_ARGUMENT"}
"""Reasons for which a line of a bulk registration is refused with nothing done; all other reasons leave that open."""


class Failed(Exception):
    """The failure of a call or a change, with gRPC's name of the status."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{code} {text}")
        self.code = code
        self.text = text


class Way(Protocol):
    """A client of one router. Its methods raise Failed."""

    router: str

    async def infer(self, model: str, timeout: float) -> float:
        """Calls a model, and returns the number in its answer."""

    async def register(self, model: str, path: Path, *, load: bool) -> None: ...

    async def unregister(self, model: str) -> None: ...


class Grpc:
    """A client over gRPC, as ModelMesh's clients and V2 clients use it."""

    def __init__(self, arena: Arena, router: str) -> None:
        self.router = router
        self._client = arena.client(router)
        self._stub = modelmesh_pb2_grpc.ModelMeshStub(arena.channel(router))

    async def infer(self, model: str, timeout: float) -> float:
        try:
            (answer,) = await self._client.infer(model, timeout=timeout, x=ONE)
        except grpc.aio.AioRpcError as error:
            raise _failed(error) from None
        return float(answer.item())

    async def register(self, model: str, path: Path, *, load: bool) -> None:
        info = modelmesh_pb2.ModelInfo(type="onnx", path=path.as_uri())
        request = modelmesh_pb2.RegisterModelRequest(modelId=model, modelInfo=info, loadNow=load)
        try:
            await self._stub.registerModel(request, timeout=CHANGE_TIMEOUT)
        except grpc.aio.AioRpcError as error:
            raise _failed(error) from None

    async def unregister(self, model: str) -> None:
        try:
            await self._stub.unregisterModel(
                modelmesh_pb2.UnregisterModelRequest(modelId=model), timeout=CHANGE_TIMEOUT
            )
        except grpc.aio.AioRpcError as error:
            raise _failed(error) from None


class Rest:
    """A client over REST. With `bulk`, it registers as `mesh import` does."""

    def __init__(self, arena: Arena, router: str, session: aiohttp.ClientSession, *, bulk: bool = False) -> None:
        self.router = router
        self._url = arena.mesh.rest_url(arena.routers.index(router))
        self._session = session
        self._bulk = bulk

    async def infer(self, model: str, timeout: float) -> float:
        body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [1.0]}]}
        answer = json.loads(await self._ask("POST", f"/v2/models/{model}/infer", json.dumps(body), timeout))
        return float(answer["outputs"][0]["data"][0])

    async def register(self, model: str, path: Path, *, load: bool) -> None:
        item = {"type": "onnx", "path": path.as_uri()}
        if not self._bulk:
            await self._ask("PUT", f"/mesh/v1/models/{model}", json.dumps(item | {"load": load}), CHANGE_TIMEOUT)
            return
        told = await self._ask("POST", "/mesh/v1/models:import", json.dumps(item | {"id": model}), CHANGE_TIMEOUT)
        lines = [json.loads(line) for line in told.splitlines()]
        for line in lines:
            if (error := line.get("error")) is not None:
                raise Failed(_OF_REASON.get(error.get("reason", ""), "UNAVAILABLE"), str(error.get("text", error)))
        if not lines or not lines[-1].get("finished"):
            raise Failed("UNAVAILABLE", f"the import was not finished: {told[-200:]!r}")

    async def unregister(self, model: str) -> None:
        await self._ask("DELETE", f"/mesh/v1/models/{model}", None, CHANGE_TIMEOUT)

    async def _ask(self, method: str, path: str, body: str | None, timeout: float) -> str:
        try:
            async with self._session.request(
                method,
                self._url + path,
                data=body,
                headers={"Content-Type": "application/json"},
                timeout=aiohttp.ClientTimeout(timeout),
            ) as reply:
                told = await reply.text()
        except TimeoutError:
            raise Failed("DEADLINE_EXCEEDED", "no answer over REST") from None
        except (aiohttp.ClientError, OSError) as error:
            raise Failed("UNAVAILABLE", f"{type(error).__name__}: {error}") from None
        if reply.status >= 300:
            raise Failed(_OF_HTTP.get(reply.status, f"HTTP {reply.status}"), told[:300])
        return told


def _failed(error: grpc.aio.AioRpcError) -> Failed:
    return Failed(error.code().name, error.details() or "")
