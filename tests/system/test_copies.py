"""The slow background loops with real processes: copies by traffic, by limits and by type, and pods that leave or are
killed."""

import asyncio
import signal

import grpc
import numpy as np
import pytest

from tests.support import models
from tests.support.localmesh import PAUSE, Client, LocalMesh
from tests.support.waiting import until

ONE = np.ones((1, 1), np.float32)


async def holders(mesh: LocalMesh, model_id: str) -> set[str]:
    copies = (await mesh.status(model_id))["copies"]
    return {copy["pod"] for copy in copies if copy["status"] == "LOADED"}


async def has(mesh: LocalMesh, model_id: str, *counts: int, timeout: float = 40) -> None:
    """Waits until the number of the model's copies is one of `counts`."""

    async def there() -> bool:
        return len(await holders(mesh, model_id)) in counts

    def why() -> str:
        return f"{counts} copies of {model_id}\n{mesh.routers[0].tail()}"

    await until(there, timeout=timeout, interval=0.2, why=why)


class Traffic:
    """Calls of several models by concurrent callers until the block ends. Each answer is checked."""

    def __init__(self, mesh: LocalMesh, values: dict[str, float], *, width: int = 4, pause: float = PAUSE) -> None:
        self.calls = 0
        self.errors: list[str] = []
        self._mesh = mesh
        self._values = list(values.items())
        self._ended = False
        self._width = width
        self._pause = pause

    async def __aenter__(self) -> "Traffic":
        client = Client(self._mesh.channel())
        self._tasks = [asyncio.ensure_future(self._run(client, number)) for number in range(self._width)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._ended = True
        await asyncio.gather(*self._tasks)

    async def _run(self, client: Client, number: int) -> None:
        while not self._ended:
            model_id, value = self._values[number % len(self._values)]
            number += 1
            try:
                (answer,) = await client.infer(model_id, x=ONE)
                if answer.item() != value:
                    self.errors.append(f"{model_id}: {answer.item()} instead of {value}")
            except Exception as error:
                self.errors.append(f"{model_id}: {error!r}")
            self.calls += 1
            await asyncio.sleep(self._pause)


async def test_a_hot_model_gets_another_copy_and_limits_say_how_many(a_mesh):
    """`explain` says why the hot model got another copy. A minimum of copies is kept without traffic, and copies above
    a maximum are evicted."""
    async with a_mesh(pods=3) as mesh:
        await mesh.register("hot", models.constant(1.0))
        await mesh.register("calm", models.constant(2.0))
        async with Traffic(mesh, {"hot": 1.0}, pause=0) as traffic:
            await has(mesh, "hot", 2, 3)
        assert traffic.errors == []
        told = (await mesh.rest("GET", "/mesh/v1/models/hot/explain")).json
        assert any("calls a minute" in str(entry["decision"]) for entry in told["decisions"]), told

        reply = await mesh.rest("PATCH", "/mesh/v1/models/calm", {"min_copies": 3})
        assert reply.status == 200
        await has(mesh, "calm", 3)
        await mesh.rest("PATCH", "/mesh/v1/models/calm", {"min_copies": None, "max_copies": 1})
        await has(mesh, "calm", 1)


async def test_constraints_move_copies_and_forbid_pods(a_mesh):
    """When constraints change in a running mesh, copies move to the pods that are allowed now, and no call fails. If no
    pod is allowed, calls fail with FAILED_PRECONDITION and the missing label."""
    async with a_mesh(pods=2, labels={"pod-1": "red", "pod-2": "blue"}) as mesh:
        for name in ("a", "b", "c"):
            await mesh.register(name, models.constant(1.0), load=True)
        for color, pod in (("red", "pod-1"), ("blue", "pod-2")):
            reply = await mesh.rest("PUT", "/mesh/v1/settings/type_constraints", {"onnx": {"required": [color]}})
            assert reply.status == 200
            async with Traffic(mesh, dict.fromkeys("abc", 1.0), width=1) as traffic:

                async def moved(pod: str = pod) -> bool:
                    return all([await holders(mesh, name) == {pod} for name in "abc"])

                await until(moved, timeout=40, interval=0.2, why=lambda: mesh.routers[0].tail())
            assert traffic.errors == []
        reply = await mesh.rest("PUT", "/mesh/v1/settings/type_constraints", {"onnx": {"required": ["green"]}})
        await mesh.register("d", models.constant(1.0))
        client = Client(mesh.channel())

        async def refused() -> bool:
            try:
                await client.infer("d", x=ONE)
            except grpc.aio.AioRpcError as error:
                return error.code() is grpc.StatusCode.FAILED_PRECONDITION and "green" in (error.details() or "")
            return False

        await until(refused, interval=0.2, why="no pod may hold the model")


@pytest.mark.long
async def test_a_pod_that_leaves_hands_over_and_one_that_is_killed_is_replaced(a_mesh):
    """A pod that ends on SIGTERM under traffic causes no failed call and no cold start. Copies of a killed pod are
    loaded elsewhere before anyone calls them."""
    async with a_mesh(pods=2, runtime_options=["--drain-timeout", "30"]) as mesh:
        values = {f"m{number}": float(number) for number in range(12)}
        for name, value in values.items():
            await mesh.register(name, models.constant(value), load=True)
        async with Traffic(mesh, values) as traffic:
            await until(lambda: traffic.calls > 50)
            before = await mesh.stats()
            mesh.pods[0].signal(signal.SIGTERM)
            await until(lambda: mesh.pods[0].process.poll() is not None, timeout=40, why=mesh.pods[0].tail)
            calls = traffic.calls
            await until(lambda: traffic.calls > calls + 50)
            after = await mesh.stats()
        assert traffic.errors == []
        assert after["cold_starts"] == before["cold_starts"], "no call waited for a load"
        for name in values:
            assert await holders(mesh, name) == {"pod-2"}

        mesh.pods[0].start()
        await mesh.ready()
        pinned = await mesh.rest("PATCH", "/mesh/v1/models/m1", {"pinned": True})
        assert pinned.status == 200
        mesh.pods[1].kill9()

        async def back() -> bool:
            return all([await holders(mesh, name) == {"pod-1"} for name in values])

        await until(back, timeout=60, interval=0.5, why=lambda: f"all are in pod-1\n{mesh.routers[0].tail()}")


@pytest.mark.long
async def test_a_mesh_that_was_stopped_comes_back_warm(a_mesh):
    """A mesh that was stopped, routers first, and comes back with one pod loads the most recently used models without
    being called. These models fill up to seven eighths of the pod."""
    async with a_mesh(pods=2) as mesh:
        client = Client(mesh.channel())
        names = [f"m{number}" for number in range(8)]
        for number, name in enumerate(names):
            await mesh.register(name, models.weights(number, mebibytes=12), load=True)
        for name in names[:4]:
            await client.infer(name, x=ONE)

        async def old() -> bool:
            """Returns whether the models' last uses are longer ago than it takes to ask all pods."""
            told = [(await mesh.rest("GET", f"/mesh/v1/pods/{pod.name}")).json["copies"] for pod in mesh.pods]
            return all(copy["idle_ms"] > 500 for copies in told for copy in copies if copy["model_id"] in names[:4])

        await until(old, interval=0.1, why="the first four models have not been used for a while")
        for name in names[4:]:
            await client.infer(name, x=ONE)
        for program in (*mesh.routers, *mesh.pods):
            await program.stop()
        mesh.pods[0].start()
        mesh.routers[0].start()
        await mesh.ready(pods=1)

        async def warm() -> bool:
            return [await holders(mesh, name) for name in names] == [set()] * 4 + [{"pod-1"}] * 4

        await until(warm, timeout=40, interval=0.2, why=lambda: f"the last four are back\n{mesh.routers[0].tail()}")
        assert (await mesh.stats())["cold_starts"] == 0
        told = (await mesh.rest("GET", "/mesh/v1/models/m7/explain")).json
        assert any("free space" in str(entry) for entry in (*told["decisions"], *told["copies"])), told
