"""MLServer as a neighbour that others start, like a container beside the agent's: late, killed, emptied and frozen.

The server's command and variables are those of the chart's preset `mlserver`, with other ports and another folder.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from mesh.modelservers import environments
from mesh.pb import inference_pb2 as v2
from mesh.pb import inference_pb2_grpc, modelmesh_pb2
from mesh.process import free_port
from mesh.runtime.relay.adapters.repository import Repository
from mesh.runtime.servers import adapted
from tests.servers.neighbours import neighbour
from tests.servers.trained_app import INPUT, ROWS
from tests.support.localmesh import LocalMesh, Program, children
from tests.support.waiting import until

pytestmark = [pytest.mark.timeout(900), pytest.mark.asyncio(loop_scope="module")]

NAMES = ("xgboost-json", "xgboost-ranker", "lightgbm", "catboost", "catboost-regressor")
"""Models that are only data, so that both pods take them."""


class Beside:
    """A mesh of two pods that take the same types: pod-1 beside the neighbour, and pod-2 with a child."""

    def __init__(self, mesh: LocalMesh, server: Program, address: str, trained: dict[str, Any]) -> None:
        self.mesh = mesh
        self.server = server
        self.address = address
        self.trained = trained
        self.errors: list[str] = []
        self.calls = 0
        self._v2 = inference_pb2_grpc.GRPCInferenceServiceStub(mesh.channel())

    async def register(self, name: str, model_id: str) -> Any:
        model = self.trained[name]
        path = Path(model["path"])
        return await self.mesh._register(model_id, model["type"], path, load=True, sync=True, router=0)

    async def ask(self, name: str, model_id: str) -> None:
        """Calls a model, and compares the answer with the library's own."""
        request = v2.ModelInferRequest(model_name=model_id)
        tensor = request.inputs.add(name=INPUT, datatype="FP64", shape=ROWS.shape)
        tensor.contents.fp64_contents.extend(ROWS.ravel())
        response = await self._v2.ModelInfer(request, timeout=120)
        (output,) = response.outputs
        found = output.contents
        values = [*found.int64_contents, *found.int_contents, *found.fp32_contents, *found.fp64_contents]
        assert values == pytest.approx(self.trained[name]["answer"], rel=1e-5), (name, model_id)

    async def pod(self) -> dict[str, Any]:
        """Returns the state of pod-1."""
        pods = (await self.mesh.rest("GET", "/mesh/v1/pods")).json["pods"]
        return next((pod for pod in pods if pod["pod"] == "pod-1"), {"state": "gone"})

    async def ready(self) -> bool:
        """Returns whether pod-1 is ready, according to the router."""
        return (await self.pod())["state"] == "ready"

    async def holders(self, model_id: str) -> set[str]:
        return {copy["pod"] for copy in (await self.mesh.status(model_id))["copies"]}

    async def in_both(self, group: str) -> None:
        """Registers NAMES under ids of a group, and waits until both pods are ready and have a copy of each model.

        Each test that kills the server uses a separate group. A call during which two servers were lost is not
        repeated, in case its model is the cause.
        """
        await until(self.ready, timeout=120, interval=0.1, why="the pod is ready")
        for name in NAMES:
            status = await self.register(name, f"{group}/{name}")
            assert status.status == modelmesh_pb2.ModelStatusInfo.LOADED, status.errors
            reply = await self.mesh.rest("PATCH", f"/mesh/v1/models/{group}%2F{name}", {"min_copies": 2})
            assert reply.status == 200, reply.body
        for name in NAMES:

            async def there(name: str = name) -> bool:
                return await self.holders(f"{group}/{name}") == {"pod-1", "pod-2"}

            await until(there, timeout=90, interval=0.1, why=f"both pods have {name}")

    @contextlib.asynccontextmanager
    async def traffic(self, group: str) -> AsyncIterator[None]:
        """Calls the models of a group while the block is open, and collects errors."""
        done = asyncio.Event()

        async def call(name: str) -> None:
            while not done.is_set():
                try:
                    await self.ask(name, f"{group}/{name}")
                except (grpc.aio.AioRpcError, AssertionError) as error:
                    self.errors.append(f"{name}: {error}")
                self.calls += 1

        callers = [asyncio.create_task(call(name)) for name in NAMES]
        try:
            yield
        finally:
            done.set()
            await asyncio.gather(*callers)

    async def more(self, calls: int = 40) -> None:
        """Waits for further calls of the traffic."""
        goal = self.calls + calls
        await until(lambda: self.calls >= goal, timeout=120, why="calls are answered")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def beside(trained, environment, etcd_server, tmp_path_factory) -> AsyncIterator[Beside]:
    """Runs the mesh for all tests of this module. The neighbour starts only when its pod is already waiting for it."""
    folder = tmp_path_factory.mktemp("beside")
    shared, port = folder / "shared", free_port()
    shared.mkdir()
    address = f"127.0.0.1:{port}"
    root = str(Path(trained["joblib"]["path"]).parent)
    both = ["--adapter", "mlserver", "--file-root", root, "--hang-timeout", "3"]
    there = ["--server", address, "--server-models", str(shared), "--capacity", "auto", "--server-memory-limit", "2GiB"]
    options = {"pod-1": [*both, *there, "--allow-code"], "pod-2": [*both, "--capacity", "1GiB"]}
    server = neighbour(environment, shared, folder, port)
    mesh = LocalMesh(folder, etcd_server, pods=2, options_of=options)
    entered = asyncio.create_task(mesh.__aenter__())
    try:
        pod = mesh.pods[0]
        await until(lambda: pod.log.exists() and "relay ready" in pod.tail(1000), timeout=90, why="the relay runs")
        assert not entered.done()
        assert (shared / "models").is_dir(), "servers such as Triton do not start without their folder"
        server.start()
        await entered
        yield Beside(mesh, server, address, trained)
    finally:
        if not entered.done():
            entered.cancel()
        with contextlib.suppress(BaseException):
            await entered
            await mesh.__aexit__(None, None, None)
        server.kill9()  # MLServer's own end is not tested here, and may take longer than `stop` waits
        print(f"--- neighbour\n{server.tail(60)}")


async def test_the_launcher_in_the_common_folder_needs_no_variables_but_ports(
    environment: Path, tmp_path: Path
) -> None:
    """The command of docs/mlserver.md starts an MLServer that keeps its models in its own process, as Mesh's own does.
    By default, MLServer starts a second process, in which the launcher does not complete the runtimes."""
    adapted.share("mlserver", tmp_path, types=("lightgbm",))
    port = free_port()
    ports = {"GRPC": port, "HTTP": free_port(), "METRICS": free_port()}
    variables = [f"MLSERVER_{name}_PORT={number}" for name, number in ports.items()]
    launcher = tmp_path / environments.launcher_of("mlserver").name
    command = [str(environments.python_of(environment)), "-I", str(launcher), str(launcher.with_suffix(".json"))]
    server = Program("launched", ["env", "-i", f"HOME={tmp_path}", *variables, *command], tmp_path)
    server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:

            async def live() -> bool:
                try:
                    return await Repository(channel).live(timeout=10)
                except grpc.aio.AioRpcError:
                    return False

            await until(live, timeout=120, why=lambda: f"the server is live:\n{server.tail()}")
            assert children(server.pid) == []
    finally:
        server.kill9()


async def test_a_pod_waits_for_a_neighbour_that_starts_late(beside: Beside) -> None:
    """A pod that has started before its neighbour waits, and becomes ready once the neighbour runs. Its capacity
    follows from the memory that the neighbour may take, and it observes the neighbour's memory."""
    pod = await beside.pod()
    assert pod["state"] == "ready"
    assert 800 << 20 < pod["capacity"] < 2 << 30
    status = await beside.register("joblib", "n/joblib")
    assert status.status == modelmesh_pb2.ModelStatusInfo.LOADED, status.errors
    assert await beside.holders("n/joblib") == {"pod-1"}, "only this pod allows code"
    await beside.ask("joblib", "n/joblib")
    assert (await beside.pod())["unobserved"] == ""


@pytest.mark.parametrize("away", [False, True], ids=["restarted at once", "away for a while"])
async def test_a_neighbour_that_is_killed_comes_back_empty_and_loses_no_call(beside: Beside, away: bool) -> None:
    """After kill -9 of the neighbour, no call fails if the other pod has the model too. The next neighbour has no
    models. The pod notices this, and uses the new neighbour."""
    group = "away" if away else "at-once"
    await beside.in_both(group)
    beside.errors.clear()
    async with beside.traffic(group):
        await beside.more()
        beside.server.kill9()
        if away:

            async def gone() -> bool:
                return not await beside.ready()

            await until(gone, timeout=60, why="the pod shows that its server is away")
            await beside.more()
        beside.server.start()
        await until(beside.ready, timeout=120, interval=0.1, why="the pod uses the next server")
        await beside.more()
    assert beside.errors == []
    await beside.ask("joblib", "n/joblib")
    assert await beside.holders("n/joblib") == {"pod-1"}


async def test_a_model_that_a_neighbour_drops_is_loaded_again(beside: Beside) -> None:
    """If another program unloads a model in the neighbour, the model's next call is answered all the same."""
    await until(beside.ready, timeout=60, why="the pod is ready")
    await beside.ask("joblib", "n/joblib")
    async with grpc.aio.insecure_channel(beside.address) as channel:
        repository = Repository(channel)
        await repository.describe("n/joblib", timeout=20)
        await repository.unload("n/joblib", timeout=20)
        await beside.ask("joblib", "n/joblib")
        await repository.describe("n/joblib", timeout=20)


async def test_a_neighbour_that_hangs_is_left_alone_until_it_answers(beside: Beside) -> None:
    """While the neighbour is frozen, the other pod answers. Once the neighbour answers again, the pod uses it."""
    await beside.in_both("frozen")
    pid = beside.server.pid
    os.kill(pid, signal.SIGSTOP)
    try:

        async def noticed() -> bool:
            return not await beside.ready()

        await until(noticed, timeout=90, why="the pod notices that its server hangs")
        for name in NAMES:
            await beside.ask(name, f"frozen/{name}")
            assert await beside.holders(f"frozen/{name}") == {"pod-2"}
    finally:
        os.kill(pid, signal.SIGCONT)
    await until(beside.ready, timeout=120, interval=0.1, why="the pod uses the server again")
    assert beside.server.pid == pid
    await beside.ask("joblib", "n/joblib")


async def test_a_neighbour_drops_the_models_of_an_agent_that_was_killed(beside: Beside) -> None:
    """After an agent was killed, the next agent beside the same server empties the server first."""
    await until(beside.ready, timeout=60, why="the pod is ready")
    await beside.ask("joblib", "n/joblib")
    pod = beside.mesh.pods[0]
    pod.kill9()
    async with grpc.aio.insecure_channel(beside.address) as channel:
        repository = Repository(channel)
        await repository.describe("n/joblib", timeout=20)
        pod.start()

        async def dropped() -> bool:
            try:
                await repository.describe("n/joblib", timeout=20)
            except grpc.aio.AioRpcError as error:
                return error.code() is grpc.StatusCode.NOT_FOUND
            return False

        await until(dropped, timeout=90, interval=0.1, why="the next agent empties the server")
        await until(beside.ready, timeout=90, interval=0.1, why="the next agent is ready")
    await beside.ask("joblib", "n/joblib")
