"""The upgrade from the previous version under traffic: both versions work together.

The previous version is this tree's image with the protocol between routers and agents lowered by one.
"""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.support import installed
from tests.support.cluster import Kube
from tests.support.installed import Installed, Traffic

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(shared_namespace: Kube, image_before: str, volume: str) -> AsyncIterator[Installed]:
    """Two routers and a pool of two, of the previous version."""
    mesh = Installed(shared_namespace, image_before, storage=volume)
    mesh.values["pools"] = [{"name": "cpu", "replicas": 2}]
    mesh.helm("install", "mesh")
    await mesh.ready()
    await mesh.offer(20)
    yield mesh


async def test_routers_of_the_version_before_load_into_new_pods(mesh: Installed, image: str) -> None:
    """Routers of the previous version load models into pods of the new one. When pools are upgraded first, only such
    pods exist for a while."""
    async with Traffic(mesh) as traffic:
        mesh.kube.kubectl("set", "image", "deployment/mesh-runtime-cpu", f"runtime={image}")
        await mesh.ready(180.0)
        await mesh.mesh("register", "late", "http://store:8000/models/m1.onnx", "--load", "--wait")
        await traffic.some(100)
        mesh.kube.kubectl("rollout", "undo", "deployment/mesh-runtime-cpu")
        await mesh.ready(180.0)
        await traffic.some()
    assert traffic.errors == []


async def test_an_upgrade_is_not_noticed(mesh: Installed, image: str) -> None:
    """Callers do not notice `helm upgrade`, which replaces every pod, including etcd's only member. A cold model is
    loaded afterwards."""
    before = set(mesh.names("router") + mesh.names("runtime"))
    pools = mesh.values["pools"]
    mesh.values = {
        **installed.values(image, storage=mesh.values["etcd"]["storage"]["storageClassName"]),
        "pools": pools,
    }
    async with Traffic(mesh) as traffic:
        await traffic.some()  # loads all models
        mesh.helm("upgrade", "mesh")
        await mesh.ready(240.0)
        await traffic.some(100)
    assert traffic.errors == []
    assert not before & set(mesh.names("router") + mesh.names("runtime"))
    images = {container["image"] for one in mesh.pods() for container in one["spec"]["containers"]}
    assert images == {image}
    await mesh.mesh("register", "later", "http://store:8000/models/m2.onnx", "--load", "--wait")
