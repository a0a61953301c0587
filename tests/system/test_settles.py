"""A mesh with room for a third of its models, under traffic, while pods die, join and leave, and constraints change."""

import asyncio
import random
import signal
from collections import Counter

import grpc
import numpy as np
import pytest

from tests.support import models
from tests.support.localmesh import Client
from tests.support.waiting import until

ONE = np.ones((1, 1), np.float32)
COUNT = 300
PAUSE = 0.05  # seconds between two calls of each of the four callers
CAPACITY = "3MiB"  # of each pod: about 35 models of this kind
ALLOWED = {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE}
"""No room at the moment, or a pod that has just ended: passing failures after which callers may retry."""


class Skewed:
    """Calls of all models, with low numbers called far more often. Each answer is checked."""

    def __init__(self, mesh) -> None:
        self.calls = 0
        self.wrong: list[str] = []
        self.errors: Counter[grpc.StatusCode] = Counter()
        self._mesh = mesh
        self._ended = False
        self._draw = random.Random(1)
        self._weights = [1 / (rank + 1) ** 0.9 for rank in range(COUNT)]

    async def __aenter__(self) -> "Skewed":
        self._tasks = [asyncio.ensure_future(self._run()) for _ in range(4)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._ended = True
        await asyncio.gather(*self._tasks)

    async def _run(self) -> None:
        client = Client(self._mesh.channel())
        while not self._ended:
            (number,) = self._draw.choices(range(COUNT), self._weights)
            try:
                (answer,) = await client.infer(f"m{number}", x=ONE)
                if answer.item() != number:
                    self.wrong.append(f"m{number}: {answer.item()}")
            except grpc.aio.AioRpcError as error:
                self.errors[error.code()] += 1
                if error.code() not in ALLOWED:
                    self.wrong.append(f"m{number}: {error.code()} {error.details()}")
            self.calls += 1
            await asyncio.sleep(PAUSE)  # a third of the calls load a model, and would leave the others no time

    async def some(self, count: int) -> None:
        end = self.calls + count
        await until(lambda: self.calls >= end, timeout=90, why=f"{count} calls")


@pytest.mark.long
@pytest.mark.timeout(240)
async def test_it_settles(a_mesh):
    """After the changes the mesh settles. No answer is wrong, no call fails with an unexpected kind of error, copies
    are only on pods that may hold them, and `explain` says where they are."""
    labels = {"pod-1": "old", "pod-2": "new", "pod-3": "old", "pod-4": "new"}
    options = ["--drain-timeout", "25"]
    async with a_mesh(pods=3, capacity=CAPACITY, labels=labels, runtime_options=options, log_level="info") as mesh:
        lines = []
        for number in range(COUNT):
            path = mesh.write(f"m{number}.onnx", models.constant(float(number)))
            lines.append(f'{{"id": "m{number}", "type": "onnx", "path": "{path.as_uri()}"}}')
        reply = await mesh.rest("POST", "/mesh/v1/models:import", "\n".join(lines).encode())
        assert b'"created": 300' in reply.body

        async with Skewed(mesh) as traffic:
            await traffic.some(300)
            mesh.pods[1].kill9()
            await traffic.some(200)
            mesh.add_pod().start()
            await mesh.ready(pods=3)
            await traffic.some(200)
            mesh.pods[0].signal(signal.SIGTERM)
            await until(lambda: mesh.pods[0].process.poll() is not None, timeout=40, why=mesh.pods[0].tail)
            mesh.pods[1].start()
            await mesh.ready(pods=3)
            reply = await mesh.rest("PUT", "/mesh/v1/settings/type_constraints", {"onnx": {"required": ["new"]}})
            assert reply.status == 200

            state: list[object] = []

            async def settled() -> bool:
                found = (await mesh.rest("GET", "/mesh/v1/pods")).json["pods"]
                left = {pod["pod"]: pod["copies"] for pod in found if not pod["suspect"]}
                held = {pod for model in await resident() for pod in model["pods"]}
                state[:] = [held, left]
                return held == {"pod-2", "pod-4"} and set(left) == {"pod-2", "pod-3", "pod-4"}

            async def resident():
                page = (await mesh.rest("GET", "/mesh/v1/models?limit=1000")).json["models"]
                return [model for model in page if model["resident"]]

            await until(settled, timeout=60, interval=0.5, why=lambda: f"{state}\n{mesh.routers[0].tail(30)}")
            traffic.errors.clear()
            await traffic.some(200)
            late = dict(traffic.errors)
        assert traffic.wrong == []
        assert sum(late.values()) < 20, late

        for model in (await resident())[:5]:
            told = (await mesh.rest("GET", f"/mesh/v1/models/{model['id']}/explain")).json
            (*_, pod) = model["pods"]
            assert any(f"loaded in {pod}" in line for line in told["lines"]), told
            why = {entry["pod"]: entry["why"] for entry in told["ranking"]}
            assert "new" in why["pod-3"], told
            loads = [entry["decision"] for entry in told["decisions"] if entry["pod"] == pod]
            assert any(decision["what"] == "load" for decision in loads), told
