"""A pool with a model server in a separate container: installed by the chart, drained and rolled out under traffic.

The server is the example runtime (`tests.support.exampleruntime`), in an image made from this tree's image.
"""

import json
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from deploy.cluster import images, lifecycle
from tests.support import bulk, exampleproto, exampleruntime
from tests.support.cluster import Kube
from tests.support.exampleproto import PREDICT, PredictRequest, PredictResponse
from tests.support.installed import Installed, Traffic

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODELS = 12
SOCKET = "unix:/run/mesh-server/spi.sock"


@pytest.fixture(scope="module")
def example(image: str) -> str:
    """The name of an image with the example runtime."""

    def add(root: Path) -> None:
        (packages,) = root.glob("opt/mesh/lib/python*/site-packages")
        support = packages / "tests" / "support"
        support.mkdir(parents=True)
        for module in (exampleruntime, exampleproto, bulk):
            assert module.__file__
            shutil.copy(module.__file__, support)

    return lifecycle.image_changed(image, f"{images.MESH}-example", add)


class Predictions(Traffic):
    """Callers of the example runtime's models."""

    def caller(self, channel: grpc.aio.Channel) -> Callable[[str, bool], Awaitable[str]]:
        """Returns a function that calls a model and checks which model has answered."""
        predict = channel.unary_unary(PREDICT, PredictRequest.SerializeToString, PredictResponse.FromString)

        async def call(name: str, wait: bool) -> str:
            text = f"{name} {self.calls}"
            metadata = (("mm-model-id", name),)
            answer = await predict(PredictRequest(text=text), metadata=metadata, timeout=30, wait_for_ready=wait)
            right = (dict(answer.results), answer.model_name) == ({name: text}, name)
            return "" if right else str(answer)

        return call


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(shared_namespace: Kube, image: str, example: str) -> AsyncIterator[Installed]:
    """Two routers, a pool of one ONNX pod, and a pool of two pods with an example runtime each."""
    mesh = Installed(shared_namespace, image)
    options = ("--method", "mmesh.ExamplePredictor/predict=1")
    server = {
        "image": example,
        "pullPolicy": "Never",
        "types": ["example"],
        "spi": SOCKET,
        "command": ["python", "-m", exampleruntime.MODULE],
        "args": ["--listen", SOCKET, *options],
        "probes": {
            "startup": {
                "exec": {"command": ["test", "-S", SOCKET.removeprefix("unix:")]},
                "periodSeconds": 1,
                "failureThreshold": 120,
            }
        },
    }
    small = {"requests": {"cpu": "20m", "memory": "512Mi"}, "limits": {"cpu": "2", "memory": "512Mi"}}
    mesh.values["pools"] = [
        {"name": "cpu", "replicas": 1},
        {"name": "example", "replicas": 2, "server": server, "agentResources": small},
    ]
    mesh.helm("install", "mesh")
    await mesh.ready(180.0)
    await mesh.offer(4)
    names = [f"e{number}" for number in range(MODELS)]
    lines = [{"id": name, "path": "http://store:8000/models/m0.onnx", "type": "example"} for name in names]
    await mesh.mesh("import", "-", given="\n".join(map(json.dumps, lines)))
    mesh.models = dict.fromkeys(names, 0.0)
    yield mesh


async def test_models_of_the_server_are_only_in_its_pool(mesh: Installed) -> None:
    """Models are loaded where their types are served, in pods whose two containers are ready."""
    async with Predictions(mesh) as traffic:
        await traffic.some()
    assert traffic.errors == []
    pods = set(mesh.names("runtime", "example"))
    assert len(pods) == 2
    for name in mesh.models:
        status = json.loads(await mesh.mesh("status", name, "--json"))
        assert {copy["pod"] for copy in status["copies"]} <= pods
        assert status["copies"]
    for pod in mesh.pods("runtime", "example"):
        (server,) = pod["status"]["initContainerStatuses"]
        assert server["ready"]
        assert server["started"]


async def test_a_rollout_of_the_pool_is_not_noticed(mesh: Installed) -> None:
    before = set(mesh.names("runtime", "example"))
    async with Predictions(mesh) as traffic:
        mesh.kube.kubectl("rollout", "restart", "deployment/mesh-runtime-example")
        await mesh.ready(240.0)
        await traffic.some(100)
    assert traffic.errors == []
    assert not before & set(mesh.names("runtime", "example"))


async def test_a_deleted_pod_is_drained(mesh: Installed) -> None:
    """Callers do not notice that one of two pods is deleted, as when a node is drained."""
    (gone, _) = mesh.names("runtime", "example")
    async with Predictions(mesh) as traffic:
        mesh.kube.kubectl("delete", "pod", gone, "--wait=false")
        await mesh.kube.until(lambda: gone not in mesh.names(), f"{gone} has gone", timeout=180.0)
        await mesh.ready(180.0)
        await traffic.some(100)
    assert traffic.errors == []


async def test_a_server_that_is_killed_is_restarted_and_its_models_come_back(mesh: Installed) -> None:
    """The container of a server that ends is restarted although the agent's container keeps running. Then the server's
    models answer again."""
    pod = mesh.names("runtime", "example")[0]
    restarts = lambda: next(  # noqa: E731
        one["status"]["initContainerStatuses"][0]["restartCount"]
        for one in mesh.pods("runtime", "example")
        if one["metadata"]["name"] == pod
    )
    before = restarts()
    mesh.kube.exec(pod, "python", "-c", "import os; os.kill(1, 15)", container="server")
    await mesh.kube.until(lambda: restarts() > before, "the server is restarted", timeout=120.0)
    await mesh.ready(180.0)
    async with Predictions(mesh) as traffic:
        await traffic.some(2 * MODELS)
    assert traffic.errors == []
