"""A new authority inside the mesh: its Secret is deleted and created again under traffic, and all pods adopt it."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.support.cluster import Kube
from tests.support.installed import Installed, Traffic
from tests.support.visits import Visits

pytestmark = pytest.mark.asyncio(loop_scope="module")

INTERNAL = "mesh-internal"
SPREAD = 150.0
"""Seconds that Kubernetes needs to bring a changed Secret to all pods."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(shared_namespace: Kube, image: str) -> AsyncIterator[Installed]:
    """Two routers, two runtime pods, one member of etcd."""
    mesh = Installed(shared_namespace, image)
    mesh.helm("install", "mesh", over={"pools": [{"name": "cpu", "replicas": 2}]})
    await mesh.ready()
    await mesh.offer(10)
    yield mesh


def restarts(mesh: Installed) -> dict[str, int]:
    """Returns how often each pod's containers were restarted."""
    return {
        one["metadata"]["name"]: sum(state["restartCount"] for state in one["status"]["containerStatuses"])
        for one in mesh.pods()
        if one["metadata"]["labels"]["app.kubernetes.io/component"] in ("router", "runtime", "etcd")
    }


async def test_everybody_follows_another_authority(mesh: Installed) -> None:
    """While the Secret is missing, doctor names the commands of the docs. When they are run, each process logs a
    warning, no call fails, no container restarts, and a new pod becomes ready."""
    kube = mesh.kube
    before, first = restarts(mesh), kube.get("secret", INTERNAL)["data"]["ca.crt"]
    everybody = list(before)
    async with Traffic(mesh) as traffic:
        kube.kubectl("delete", "secret", INTERNAL)
        words = (
            f"no Secret {INTERNAL}",
            f"kubectl create secret generic {INTERNAL}",
            "--from=cronjob/mesh-certificates",
        )
        await Visits(mesh, "--only", "secrets").until_said([("fail", "secrets", "there", *words)])
        await asyncio.to_thread(mesh.typed, "Secrets")
        await kube.wait("job/renew-now", "condition=Complete", 120.0)
        assert kube.get("secret", INTERNAL)["data"]["ca.crt"] != first
        await kube.until(
            lambda: all("another authority" in kube.logs(name) for name in everybody),
            "each process warns",
            timeout=SPREAD,
        )
        assert restarts(mesh) == before
        kube.kubectl("delete", "pod", mesh.names("runtime")[0], timeout=120.0)
        await mesh.ready(300.0)
        await mesh.mesh("register", "late", "http://store:8000/models/m1.onnx", "--load", "--wait")
        await traffic.some(200)
    assert traffic.errors == []
    now = restarts(mesh)
    assert {name: now.get(name, 0) for name in before} == before
    await Visits(mesh).until_said(())


async def test_new_pods_start_with_the_new_authority(mesh: Installed) -> None:
    """Once all processes have adopted the new authority, a router and a runtime pod are replaced. The new pods become
    ready, and no call fails after that."""
    await asyncio.gather(
        *(
            mesh.kube.until(
                # A pod that was started since then has nothing to follow, and logs nothing.
                lambda name=name: (
                    "certificate of the new authority is presented" in mesh.kube.logs(name)
                    or "step to the new authority" in mesh.kube.logs(name)
                    or "another authority" not in mesh.kube.logs(name)
                ),
                f"{name} shows the new certificate",
                timeout=240.0,
            )
            for name in (*mesh.names("router"), *mesh.names("runtime"), *mesh.names("etcd"))
        )
    )
    for name in (mesh.names("router")[0], mesh.names("runtime")[0]):
        mesh.kube.kubectl("delete", "pod", name, timeout=120.0)
    await mesh.ready(180.0)
    async with Traffic(mesh) as traffic:
        await traffic.some(100)
    assert traffic.errors == []
