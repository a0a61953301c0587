"""A model that really exhausts its container: the kernel kills the server, the model is quarantined, and others are
served.

A model server limits its memory, so usually only the call that needs too much fails (`test_memory`). This test turns
the limit off, to simulate memory that the limit does not cover, such as mappings of a driver.
"""

import json
from collections.abc import AsyncIterator

import grpc
import numpy as np
import pytest
import pytest_asyncio

from tests.support import models
from tests.support.cluster import Kube
from tests.support.installed import Installed, Traffic
from tests.support.localmesh import Client
from tests.support.visits import Visits

pytestmark = pytest.mark.asyncio(loop_scope="module")

MEMORY = "512Mi"
FLOATS = 300_000_000  # more than twice the container's memory
CALLERS = 4
_UNBOUNDED = """
from mesh.runtime.server import __main__
from mesh.runtime.server.onnx import memory
memory.limit = lambda maximum: 0
__main__.main()
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(shared_namespace: Kube, image: str) -> AsyncIterator[Installed]:
    """Two runtime pods whose model servers have no memory limit, and models that take little memory when loaded."""
    mesh = Installed(shared_namespace, image)
    program = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "unbounded"}}
    mesh.kube.apply({**program, "data": {"unbounded.py": _UNBOUNDED}})
    resources = {"requests": {"cpu": "20m", "memory": MEMORY}, "limits": {"cpu": "2", "memory": MEMORY}}
    pool = {
        "name": "cpu",
        "replicas": 2,
        "resources": resources,
        "extraEnv": [{"name": "MESH_SERVER_MODULE", "value": "unbounded"}, {"name": "PYTHONPATH", "value": "/program"}],
        "extraVolumes": [{"name": "program", "configMap": {"name": "unbounded"}}],
        "extraVolumeMounts": [{"name": "program", "mountPath": "/program"}],
    }
    mesh.helm("install", "mesh", over={"pools": [pool], "router": {"replicas": 1}})
    await mesh.ready()
    await mesh.offer(10)
    await mesh.store("greedy.onnx", models.huge_on_demand())
    await mesh.register({"greedy": "greedy.onnx"})
    yield mesh


async def test_a_model_that_exhausts_its_container_is_quarantined(mesh: Installed) -> None:
    """A model whose requests kill servers is quarantined, and its next caller gets the reason. Each death may fail at
    most one call of each caller of other models: the call in flight. Afterwards all pods are ready and serve models."""

    async def status() -> dict[str, object]:
        while True:
            found: dict[str, object] = json.loads(await mesh.mesh("status", "greedy", "--json", codes=range(10)))
            if "quarantined" in found:
                return found
            said.append(found)  # for instance that no pod answers for a moment

    said: list[dict[str, object]] = []
    deaths = 0
    async with Traffic(mesh, callers=CALLERS) as traffic, mesh.channel() as channel:
        client = Client(channel)
        (answer,) = await client.infer("greedy", count=np.array([10], np.int64))
        assert answer.item() == 0.0
        while not (await status())["quarantined"]:
            with pytest.raises(grpc.aio.AioRpcError):
                await client.infer("greedy", wait_for_ready=True, count=np.array([FLOATS + deaths], np.int64))
            deaths += 1
            assert deaths <= 6, (await status(), said)
        with pytest.raises(grpc.aio.AioRpcError, match="quarantined"):
            await client.infer("greedy", count=np.array([10], np.int64))
        await mesh.ready()
        await traffic.some(100)
    assert len(traffic.errors) <= CALLERS * deaths, traffic.errors
    told = json.dumps(await status())
    assert "SIGKILL, probably for lack of memory while it was running this model" in told
    visits = Visits(mesh, "--only", "mesh")
    await visits.visit()
    assert visits.found("warn", "mesh", "quarantine", "greedy", "mesh release"), visits.findings
    assert all(mesh.metric(name, "modelmesh_instance_models_total") > 0 for name in mesh.names("runtime"))
