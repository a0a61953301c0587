"""Small containers: models that do not fit are evicted or refused, and nothing is killed for using too much memory."""

from collections.abc import AsyncIterator

import grpc
import numpy as np
import pytest
import pytest_asyncio

from tests.support import models
from tests.support.cluster import Kube
from tests.support.installed import ONE, Installed
from tests.support.localmesh import Client

pytestmark = pytest.mark.asyncio(loop_scope="module")

HEAVY = [f"heavy{number}" for number in range(12)]
LIMIT = "512Mi"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(shared_namespace: Kube, image: str) -> AsyncIterator[Installed]:
    """One runtime pod of half a gigabyte, and models that together need four times its capacity."""
    mesh = Installed(shared_namespace, image)
    resources = {"requests": {"cpu": "20m", "memory": LIMIT}, "limits": {"cpu": "2", "memory": LIMIT}}
    pools = [{"name": "small", "replicas": 1, "resources": resources}]
    mesh.helm("install", "mesh", over={"pools": pools, "router": {"replicas": 1}})
    await mesh.ready()
    await mesh.offer(2)
    await mesh.store("heavy.onnx", models.weights(7.0, mebibytes=20))
    await mesh.store("greedy.onnx", models.huge_on_demand())
    await mesh.register(dict.fromkeys(HEAVY, "heavy.onnx") | {"greedy": "greedy.onnx"})
    yield mesh


def lives(mesh: Installed) -> list[tuple[int, object]]:
    """Returns how often each container in a runtime pod was restarted, and why it ended."""
    return [
        (state["restartCount"], state["lastState"])
        for one in mesh.pods("runtime")
        for state in one["status"]["containerStatuses"]
    ]


async def test_models_that_do_not_fit_make_way_for_each_other(mesh: Installed) -> None:
    """Models that do not fit together evict each other, and every call gets the right answer."""
    async with mesh.channel() as channel:
        client = Client(channel)
        for _ in range(3):
            for name in HEAVY:
                (answer,) = await client.infer(name, x=ONE)
                assert answer.item() == 7.0
    (pod,) = mesh.names("runtime")
    assert mesh.metric(pod, "mesh_evictions") > len(HEAVY)
    assert mesh.metric(pod, "mesh_pods_wanted") > 2.0
    assert mesh.metric(pod, "modelmesh_instance_used_bps") <= 10_000
    assert lives(mesh) == [(0, {})]


async def test_a_call_that_asks_for_more_than_there_is_fails_alone(mesh: Installed) -> None:
    """A call that needs too much memory fails with the reason. The model server keeps running and serves the others."""
    async with mesh.channel() as channel:
        client = Client(channel)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await client.infer("greedy", count=np.array([300_000_000], np.int64))
        assert "alloc" in str(failed.value.details()).lower(), failed.value.details()
        (answer,) = await client.infer("m1", x=ONE)
        assert answer.item() == 1.0
    assert mesh.metric(mesh.names("runtime")[0], "mesh_server_deaths") == 0
    assert lives(mesh) == [(0, {})]
