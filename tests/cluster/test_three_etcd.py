"""Three members of etcd: one may fail unnoticed, and snapshots are made, listed and restored."""

import json
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from deploy.cluster import layout
from mesh.cli.exits import Exit
from tests.support.cluster import Kube
from tests.support.installed import Installed, Traffic
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODELS = 20


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(shared_namespace: Kube, image: str, volumes: str) -> AsyncIterator[Installed]:
    """Two routers, a pool of two, three members of etcd with a volume each, and a volume for snapshots."""
    mesh = Installed(shared_namespace, image, storage=volumes)
    mesh.values["pools"] = [{"name": "cpu", "replicas": 2}]
    mesh.values["etcd"]["members"] = 3
    mesh.values["etcd"]["snapshots"] = {"enabled": True, "size": "1Gi", "storageClassName": volumes}
    mesh.helm("install", "mesh")
    await mesh.ready(120.0)
    await mesh.offer(MODELS)
    yield mesh


def _leader(mesh: Installed) -> str:
    return next(name for name in mesh.names("etcd") if mesh.metric(name, "etcd_server_is_leader", port=2381))


@pytest.mark.parametrize("which", ["leader", "another"])
async def test_a_member_goes(mesh: Installed, cluster: Kube, which: str) -> None:
    """While one member is down, models are registered and loaded, and no call fails."""
    leader = _leader(mesh)
    member = leader if which == "leader" else next(name for name in mesh.names("etcd") if name != leader)
    async with Traffic(mesh) as traffic:
        cluster.kubectl("cordon", layout.NODE)  # keeps the member from coming back before the test allows it
        try:
            mesh.kube.kubectl("delete", "pod", member, timeout=120.0)
            for number in range(3):
                name = f"{which}-{number}"
                await mesh.mesh("register", name, f"http://store:8000/models/m{number}.onnx", "--load", "--wait")
            await traffic.some(100)
            (pod,) = (one for one in mesh.pods("etcd") if one["metadata"]["name"] == member)
            assert pod["status"]["phase"] == "Pending"
        finally:
            cluster.kubectl("uncordon", layout.NODE)
        await mesh.ready(120.0)
    assert traffic.errors == []


async def test_a_member_loses_its_volume(mesh: Installed) -> None:
    """A member that loses its volume joins the others as a new member, and no call fails."""

    def members() -> dict[str, str]:
        listed = json.loads(mesh.kube.exec("mesh-etcd-0", "etcdctl", "member", "list", "--write-out=json"))
        return {one["name"]: one["ID"] for one in listed["members"] if one.get("clientURLs")}

    before = members()
    async with Traffic(mesh) as traffic:
        mesh.kube.kubectl("delete", "pvc", "data-mesh-etcd-1", "--wait=false")
        mesh.kube.kubectl("delete", "pod", "mesh-etcd-1", timeout=120.0)
        await mesh.ready(120.0)
        await mesh.mesh("register", "after", "http://store:8000/models/m1.onnx", "--load", "--wait")
        await traffic.some()
    assert traffic.errors == []
    after = members()
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {"mesh-etcd-1"}


async def test_what_was_lost_comes_back_from_a_snapshot(mesh: Installed) -> None:
    """The steps of the admins' page restore all registrations: a snapshot at once, a new etcd, a restore."""
    before = {one["id"] for one in await _listed(mesh)}
    assert len(before) >= MODELS
    made = mesh.typed("Back up")
    assert re.search(r"snapshots/etcd-[0-9a-f]+-\d+-\d+T\d+Z\.db: .* 1 are kept", made), made

    mesh.typed("Restore from a snapshot", "mesh-etcd ", "component=etcd")
    await mesh.ready(180.0)

    async def back() -> bool:
        said = await mesh.mesh("pods", "--json", codes=range(10))
        pods = json.loads(said)["pods"] if said.startswith("{") else []
        return len(pods) == 2 and not any(pod.get("suspect") for pod in pods)

    await until(back, timeout=60.0, why="pods are in the new etcd")
    assert await _listed(mesh) == []

    said = mesh.typed("Restore from a snapshot", "job restore", "job/restore")
    assert f"created: {len(before)} models" in said, said
    assert {one["id"] for one in await _listed(mesh)} == before
    async with Traffic(mesh) as traffic:
        await traffic.some(100)
    assert traffic.errors == []


async def _listed(mesh: Installed) -> list[dict[str, Any]]:
    """Returns the registered models once a router can read from etcd again. Until the cluster's DNS forgets the former
    addresses of etcd's members, routers may still try those."""
    found: dict[str, Any] = {}

    async def answered() -> bool:
        nonlocal found
        found = json.loads(await mesh.mesh("ls", "--json", codes=(Exit.OK, Exit.TRY_AGAIN)))
        return "models" in found

    await until(answered, timeout=60.0, why=lambda: f"the router reads from etcd: {found}")
    models: list[dict[str, Any]] = found["models"]
    return models
