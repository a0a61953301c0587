"""A mesh on a real Kubernetes, installed by the admin of one namespace, and typical events of a cluster while the mesh
is called.

One installation serves all of these tests, which leave it as they found it. Calls come from outside the cluster through
the Service. Callers retry a call once if it fails with UNAVAILABLE, and no call may fail otherwise.
"""

import gzip
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from mesh.process import free_port
from tests.support import documented
from tests.support.cluster import Kube
from tests.support.installed import Installed, Traffic

pytestmark = pytest.mark.asyncio(loop_scope="module")

CALLERS = 4
CONNECTION_AGE = 20  # s
GROUP = "monitoring.coreos.com"  # of the Prometheus operator
RIGHTS: dict[str, Any] = {
    "apiVersion": "rbac.authorization.k8s.io/v1",
    "kind": "ClusterRole",
    "metadata": {
        "name": "monitoring-for-tests",
        "labels": {"rbac.authorization.k8s.io/aggregate-to-admin": "true"},
    },
    "rules": [{"apiGroups": [GROUP], "resources": ["*"], "verbs": ["*"]}],
}
KINDS = {
    "router": ("router", ""),
    "runtime": ("runtime", "cpu"),
    "other-pool": ("runtime", "big"),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(shared_namespace: Kube, image: str, volume: str) -> AsyncIterator[Installed]:
    """Two routers, a pool of three, a pool of one with a label, etcd, and forty models, registered from outside and
    called."""
    mesh = Installed(shared_namespace, image, storage=volume)
    mesh.values["router"]["connectionAge"] = CONNECTION_AGE
    with mesh.values_file() as values:
        words = {"--set image.registry=registry.example.com": f"-f {values}"}
        mesh.typed("Install with Helm", "helm install", "rollout status", words=words)
    await mesh.ready()
    await mesh.offer(40)
    yield mesh


async def test_every_answer_is_right(mesh: Installed) -> None:
    """Models that were registered from outside are loaded and called through the Service, and every answer is right."""
    async with Traffic(mesh) as traffic:
        await traffic.some(200)
    assert traffic.errors == []


async def test_the_page_shows_what_was_installed(mesh: Installed) -> None:
    """The commands of the docs list the installed pods through a forwarded port of the Service."""
    port = free_port("127.0.0.1")
    there = f"timeout 30 bash -c 'until (: </dev/tcp/localhost/{port}) 2>/dev/null; do sleep 0.1; done'"
    # A person takes a moment between the two commands, and ends the first by closing the terminal.
    words = {
        "8033:8033 &": f"{port}:8033 >/dev/null & trap 'kill $!' EXIT; {there}",
        "localhost:8033": f"localhost:{port}",
    }
    block = documented.block("kubernetes.md", "Install with Helm")[2:]
    commands = [one.put(words).replace("team-a", mesh.kube.namespace) for one in block]
    assert len(commands) == 3
    listed = mesh.kube.shell("\n".join(["set -e", *commands]))
    assert all(name in listed for name in mesh.names("runtime"))


@pytest.mark.parametrize("kind", KINDS)
async def test_a_pod_is_deleted(mesh: Installed, kind: str) -> None:
    """When a pod is deleted, another one replaces it, and no caller notices."""
    async with Traffic(mesh) as traffic:
        mesh.kube.kubectl("delete", "pod", mesh.names(*KINDS[kind])[0], timeout=120.0)
        await mesh.ready()
        await traffic.some()
    assert traffic.errors == []


@pytest.mark.parametrize("kind", KINDS)
async def test_a_pod_is_deleted_by_force(mesh: Installed, kind: str) -> None:
    """When a pod is deleted by force, each caller may lose at most the call that it has in flight there."""
    async with Traffic(mesh, callers=CALLERS) as traffic:
        mesh.kube.kubectl("delete", "pod", mesh.names(*KINDS[kind])[0], "--force", "--grace-period=0")
        await mesh.ready()
        await traffic.some()
    assert len(traffic.errors) <= CALLERS, traffic.errors


@pytest.mark.parametrize("name", ["mesh-router", "mesh-runtime-cpu", "mesh-runtime-big"])
async def test_a_rollout_is_not_noticed(mesh: Installed, name: str) -> None:
    before = {one["metadata"]["name"] for one in mesh.pods()}
    async with Traffic(mesh) as traffic:
        mesh.kube.kubectl("rollout", "restart", f"deployment/{name}")
        await mesh.ready(180.0)
        await traffic.some()
    assert traffic.errors == []
    after = {one["metadata"]["name"] for one in mesh.pods()}
    assert not {pod for pod in before & after if pod.startswith(f"{name}-")}


async def test_an_upgrade_with_other_values_is_not_noticed(mesh: Installed, tmp_path: Path) -> None:
    """The documented commands save a backup with all models, and change options of routers and of all pools at once.
    Callers do not notice."""
    over = {"router": {"loadWait": 90, "podLabels": {"changed": "yes"}}, "runtime": {"loadTimeout": 60}}
    before = set(mesh.names("router") + mesh.names("runtime"))
    backup = tmp_path / "registry.backup"
    async with Traffic(mesh) as traffic:
        with mesh.values_file(over) as values:
            mesh.typed("Upgrade", words={"registry.backup": str(backup), "my-values.yaml": str(values)})
        await mesh.ready(240.0)
        await traffic.some()
    assert traffic.errors == []
    assert not before & set(mesh.names("router") + mesh.names("runtime"))
    saved = gzip.decompress(backup.read_bytes()).decode()
    assert all(f'"{name}"' in saved for name in mesh.models)


async def test_a_pool_shrinks_and_grows(mesh: Installed) -> None:
    async with Traffic(mesh) as traffic:
        for replicas in (1, 3):
            mesh.typed("Scale", "mesh-runtime-cpu", words={"--replicas=5": f"--replicas={replicas}"})
            await mesh.ready(180.0)
            await traffic.some()
    assert traffic.errors == []


async def test_routers_become_more_and_fewer(mesh: Installed) -> None:
    async with Traffic(mesh) as traffic:
        for replicas in (1, 3, 2):
            mesh.typed("Scale", "mesh-router", words={"--replicas=3": f"--replicas={replicas}"})
            await mesh.ready(120.0)
            await traffic.some()
    assert traffic.errors == []


async def test_connections_even_out(mesh: Installed) -> None:
    """Callers that are connected to few routers reach new routers once their connections are as old as they may be."""
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
    """Loaded models are served while etcd's pod is replaced. Afterwards a model can be registered and loaded."""
    async with Traffic(mesh) as traffic:
        await traffic.some()  # loads all models
        options = ["--force", "--grace-period=0"] if force else []
        mesh.kube.kubectl("delete", "pod", "mesh-etcd-0", *options, timeout=120.0)
        await mesh.ready()
        await traffic.some(200)
    assert traffic.errors == []
    await mesh.mesh("register", f"late-{force}", "http://store:8000/models/m1.onnx", "--load", "--wait")


async def test_it_is_monitored(mesh: Installed, cluster: Kube) -> None:
    """On a cluster with the Prometheus operator, the chart creates monitoring objects with only the rights of a
    namespace's admin."""
    kinds = {"ServiceMonitor": "servicemonitors", "PodMonitor": "podmonitors", "PrometheusRule": "prometheusrules"}
    names = [f"{plural}.{GROUP}" for plural in kinds.values()]
    cluster.apply(*(kind_of_objects(kind, plural) for kind, plural in kinds.items()), RIGHTS)
    try:
        await cluster.wait(f"crd {' '.join(names)}", "condition=Established")
        await mesh.kube.until(lambda: all(mesh.kube.can("create", name) for name in names), "the admin has the rights")
        mesh.typed("Monitor")
        made = mesh.kube.get(f"{','.join(names)},configmaps")["items"]
        assert {*kinds, "ConfigMap"} == {one["kind"] for one in made if one["metadata"]["name"].startswith("mesh")}
        mesh.helm("upgrade", "mesh")  # back to its own values: pods may be replaced
        await mesh.ready(240.0)
        assert mesh.kube.get(",".join(names))["items"] == []
    finally:
        cluster.kubectl("delete", "crd", *names)
        cluster.kubectl("delete", "clusterrole", RIGHTS["metadata"]["name"])


async def test_a_second_mesh_is_refused(mesh: Installed) -> None:
    """Helm refuses a second mesh in the namespace, and the first one stays ready."""
    with pytest.raises(AssertionError, match=r'The namespace .* already has a mesh: the release "mesh"'):
        mesh.helm("install", "another")
    await mesh.ready(30.0)


async def test_nothing_is_left(mesh: Installed) -> None:
    """`helm uninstall` removes everything that the chart and the mesh have created."""
    mesh.typed("Uninstall", "helm uninstall")
    await mesh.kube.until(lambda: not mesh.left(), "nothing is left", timeout=150.0)


def kind_of_objects(kind: str, plural: str) -> dict[str, Any]:
    """Returns a CustomResourceDefinition for a kind of the Prometheus operator, with a schema that accepts any
    object."""
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    version = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": anything}}
    names = {"kind": kind, "plural": plural, "singular": kind.lower()}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{GROUP}"},
        "spec": {"group": GROUP, "scope": "Namespaced", "names": names, "versions": [version]},
    }
