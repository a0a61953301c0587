"""The installation of a mesh on this cluster from this tree's image, as the page for admins describes it for a
trial."""

import asyncio

from tests.support import documented
from tests.support.cluster import Kube
from tests.support.installed import Installed, Traffic

HEADING = "On this machine, without a registry"


async def test_a_mesh_for_trying(namespace: Kube, image: str) -> None:
    """The documented commands install a mesh that serves models."""
    cluster, name, environment, creation, *rest = documented.block("kubernetes.md", HEADING)
    assert cluster.text == "make cluster"
    assert "make -s cluster-image" in name.text
    assert ".cache/cluster/admin.kubeconfig" in environment.text
    assert creation.text == "kubectl create namespace team-a"
    lines = [f"image={image}", *(command.put({"team-a": namespace.namespace}) for command in rest)]
    mesh = Installed(namespace, image)
    try:
        await asyncio.to_thread(namespace.shell, "\n".join(["set -e", *lines]))
        await mesh.ready(120.0)
        # Models come from a private address here.
        namespace.kubectl("set", "env", "deployment/mesh-runtime-cpu", "MESH_HTTP_ALLOW_PRIVATE=true")
        await mesh.ready(180.0)
        await mesh.offer(3)
        async with Traffic(mesh) as traffic:
            await traffic.some(20)
        assert traffic.errors == []
    finally:
        namespace.helm("uninstall", "mesh")
