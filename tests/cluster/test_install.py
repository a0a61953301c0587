"""A mesh on a real Kubernetes, installed by the admin of one namespace, and what clusters do to it while it is called.

One installation for all of these tests, which leave it as they found it. Calls come from outside of the cluster through
the Service; a caller whose call fails with UNAVAILABLE makes it once more, and no call may fail beyond that.
"""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.support.cluster import Kube
from tests.support.installed import Installed, Traffic

pytestmark = pytest.mark.asyncio(loop_scope="module")

CALLERS = 4
CONNECTION_AGE = 20  # s
KINDS = {
    "router": ("router", ""),
    "runtime": ("runtime", "cpu"),
    "other-pool": ("runtime", "big"),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(shared_namespace: Kube, image: str, volume: str) -> AsyncIterator[Installed]:
    """Two routers, a pool of three, a pool of one with a label, etcd; forty models, registered from outside, called."""
    mesh = Installed(shared_namespace, image, storage=volume)
    mesh.values["router"]["connectionAge"] = CONNECTION_AGE
    mesh.helm("install", "mesh")
    await mesh.ready()
    await mesh.offer(40)
    yield mesh


async def test_every_answer_is_right(mesh: Installed) -> None:
    """Models that were registered from outside are loaded and called through the Service."""
    async with Traffic(mesh) as traffic:
        await traffic.some(200)
    assert traffic.errors == []
    listed = await mesh.mesh("pods", "--json")
    assert all(name in listed for name in mesh.names("runtime"))


@pytest.mark.parametrize("kind", KINDS)
async def test_a_pod_is_deleted(mesh: Installed, kind: str) -> None:
    """Another one takes its place, and nobody notices."""
    async with Traffic(mesh) as traffic:
        mesh.kube.kubectl("delete", "pod", mesh.names(*KINDS[kind])[0], timeout=120.0)
        await mesh.ready()
        await traffic.some()
    assert traffic.errors == []


@pytest.mark.parametrize("kind", KINDS)
async def test_a_pod_is_deleted_by_force(mesh: Installed, kind: str) -> None:
    """Of its calls in flight, one each caller at most, some may fail; no others do."""
    async with Traffic(mesh, callers=CALLERS) as traffic:
        mesh.kube.kubectl("delete", "pod", mesh.names(*KINDS[kind])[0], "--force", "--grace-period=0")
        await mesh.ready()
        await traffic.some()
    assert len(traffic.errors) <= CALLERS, traffic.errors


@pytest.mark.parametrize("name", ["mesh-router", "mesh-runtime-cpu", "mesh-runtime-big"])
async def test_a_rollout_is_not_noticed(mesh: Installed, name: str) -> None:
    """All its pods are replaced."""
    before = {one["metadata"]["name"] for one in mesh.pods()}
    async with Traffic(mesh) as traffic:
        mesh.kube.kubectl("rollout", "restart", f"deployment/{name}")
        await mesh.ready(180.0)
        await traffic.some()
    assert traffic.errors == []
    after = {one["metadata"]["name"] for one in mesh.pods()}
    assert not {pod for pod in before & after if pod.startswith(f"{name}-")}


async def test_an_upgrade_with_other_values_is_not_noticed(mesh: Installed) -> None:
    """Options of routers and of all pools change at once."""
    over = {"router": {"loadWait": 90, "podLabels": {"changed": "yes"}}, "runtime": {"loadTimeout": 60}}
    before = set(mesh.names("router") + mesh.names("runtime"))
    async with Traffic(mesh) as traffic:
        mesh.helm("upgrade", "mesh", over=over)
        await mesh.ready(240.0)
        await traffic.some()
    assert traffic.errors == []
    assert not before & set(mesh.names("router") + mesh.names("runtime"))


async def test_a_pool_shrinks_and_grows(mesh: Installed) -> None:
    """To one pod and back to three: those that go hand over what they hold."""
    async with Traffic(mesh) as traffic:
        for replicas in (1, 3):
            mesh.kube.kubectl("scale", "deployment/mesh-runtime-cpu", f"--replicas={replicas}")
            await mesh.ready(180.0)
            await traffic.some()
    assert traffic.errors == []


async def test_routers_become_more_and_fewer(mesh: Installed) -> None:
    """From one to three, and back to the two that the values ask for."""
    async with Traffic(mesh) as traffic:
        for replicas in (1, 3, 2):
            mesh.kube.kubectl("scale", "deployment/mesh-router", f"--replicas={replicas}")
            await mesh.ready(120.0)
            await traffic.some()
    assert traffic.errors == []


async def test_connections_even_out(mesh: Installed) -> None:
    """Callers that are connected to few routers find those that come, within one age of a connection."""
    async with Traffic(mesh, callers=12, pause=0.1) as traffic:
        mesh.kube.kubectl("scale", "deployment/mesh-router", "--replicas=3")
        await mesh.ready(120.0)
        await mesh.kube.until(
            lambda: all(mesh.metric(name, "mesh_edge_connections") for name in mesh.names("router")),
            "every router has connections",
            timeout=3 * CONNECTION_AGE,
        )
        mesh.kube.kubectl("scale", "deployment/mesh-router", "--replicas=2")
        await mesh.ready(120.0)
    assert traffic.errors == []


@pytest.mark.parametrize("force", [False, True], ids=["asked", "by force"])
async def test_etcd_goes_and_comes_back(mesh: Installed, force: bool) -> None:
    """What is loaded is served meanwhile; what was registered is there again, and models can be loaded."""
    async with Traffic(mesh) as traffic:
        await traffic.some()  # all are loaded
        options = ["--force", "--grace-period=0"] if force else []
        mesh.kube.kubectl("delete", "pod", "mesh-etcd-0", *options, timeout=120.0)
        await mesh.ready()
        await traffic.some(200)
    assert traffic.errors == []
    await mesh.mesh("register", f"late-{force}", "http://store:8000/models/m1.onnx", "--load", "--wait")


async def test_a_second_mesh_is_refused(mesh: Installed) -> None:
    """By Helm, with the reason and the way out; the first one goes on."""
    with pytest.raises(AssertionError, match=r'There is a mesh in the namespace .* already: the release "mesh"'):
        mesh.helm("install", "another")
    await mesh.ready(30.0)


async def test_nothing_is_left(mesh: Installed) -> None:
    """`helm uninstall` removes everything that it and the mesh have made; the admin's own things stay."""
    mesh.kube.helm("uninstall", "mesh", "--wait", "--timeout=2m", timeout=150.0)

    await mesh.kube.until(lambda: not mesh.left(), "nothing is left", timeout=90.0)
