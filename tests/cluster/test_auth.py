"""The admin's key of an installed mesh: management needs it, inside the cluster and outside, and inference does not.

One installation with the chart's defaults serves the first tests, then it is upgraded to each mode of `auth.mode`.
"""

import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.support import documented
from tests.support.cluster import Kube, KubeError, pod
from tests.support.installed import Installed, Traffic
from tests.support.outside import MODEL, Outsider
from tests.support.visits import Visits

pytestmark = pytest.mark.asyncio(loop_scope="module")

SMALL = {"router": {"replicas": 1}, "pools": [{"name": "cpu", "replicas": 1}]}
SECRET = "mesh-admin-key"
PAGE = "kubernetes.md"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(shared_namespace: Kube, image: str, volume: str) -> AsyncIterator[Installed]:
    """A router and a pod, installed with the default `auth.mode`, with two models and a pod of a client."""
    mesh = Installed(shared_namespace, image, storage=volume)
    mesh.values |= SMALL | {"router": mesh.values["router"] | SMALL["router"]}
    mesh.helm("install", "mesh")
    client = {"name": "it", "image": image, "command": ["python", "-c", "import time; time.sleep(3600)"]}
    mesh.kube.apply(pod("client", client))
    await mesh.ready()
    await mesh.kube.wait("pod/client", "condition=Ready")
    await mesh.offer(2)
    yield mesh


def key(mesh: Installed) -> bytes:
    """Returns the content of the Secret with the admin's key."""
    return base64.b64decode(mesh.kube.get("secret", SECRET)["data"]["admin.key"])


def asked(mesh: Installed, method: str, path: str, body: Any = None, *, key: str = "") -> int:
    """Sends a request to the Service from outside, and returns the status."""
    return Outsider(mesh, key).asked(method, path, body)


def typed(mesh: Installed, *about: str) -> str:
    """Runs the documented commands that contain one of the texts."""
    return mesh.typed("Who may do what", *about)


async def test_the_notes_say_how_to_read_the_key(mesh: Installed) -> None:
    """The command in the notes reads the key with which `mesh` then lists the pods."""
    notes = mesh.kube.helm("get", "notes", "mesh")
    (line,) = [line.strip() for line in notes.splitlines() if "export MESH_API_KEY=" in line]
    async with mesh.kube.forward("service/modelmesh-serving", 8033) as port:
        said = await asyncio.to_thread(mesh.kube.shell, f"{line}\nmesh pods --endpoint localhost:{port}")
    assert all(name in said for name in mesh.names("runtime"))


async def test_management_from_outside_needs_the_key(mesh: Installed) -> None:
    """From outside the cluster, management is refused without the key, and with a wrong one, over REST and gRPC."""
    right = key(mesh).decode()
    for given in ("", "x" * 43):
        for method, path, body in (
            ("GET", "/mesh/v1/models", None),
            ("PUT", "/mesh/v1/models/by-rest", MODEL),
            ("DELETE", "/mesh/v1/models/m0", None),
            ("PUT", "/mesh/v1/keys/mine", {"role": "admin"}),
        ):
            assert asked(mesh, method, path, body, key=given) == 401, (method, path)
        assert await Outsider(mesh, given).registered("by-grpc") == "UNAUTHENTICATED"
    assert asked(mesh, "GET", "/mesh/v1/models/m0", key=right) == 200
    assert asked(mesh, "GET", "/mesh/v1/models/by-rest", key=right) == 404
    assert await Outsider(mesh, right).registered("by-grpc") == "OK"


async def test_management_from_inside_needs_the_key(mesh: Installed) -> None:
    """In a pod of the namespace, `mesh` is refused without the key, and works with it."""
    there = ["--endpoint", "http://modelmesh-serving:8008"]
    with pytest.raises(KubeError, match="send a key"):
        mesh.kube.exec("client", "mesh", "ls", *there)
    with pytest.raises(KubeError, match="send a key"):
        mesh.kube.exec("client", "mesh", "unregister", "m0", *there)
    listed = mesh.kube.exec("client", "env", f"MESH_API_KEY={key(mesh).decode()}", "mesh", "ls", *there)
    assert "m0" in listed


async def test_inference_is_open(mesh: Installed) -> None:
    async with Traffic(mesh) as traffic:
        await traffic.some(50)
    assert traffic.errors == []


async def test_a_key_of_ones_own(mesh: Installed) -> None:
    """The documented command makes a key, which registers a model of its grant and is refused for another model."""
    made = typed(mesh, "mesh keys create").strip()
    await mesh.kube.until(
        lambda: asked(mesh, "PUT", "/mesh/v1/models/fraud%2Fde", MODEL, key=made) == 201, "the key registers a model"
    )
    assert asked(mesh, "PUT", "/mesh/v1/models/other", MODEL, key=made) == 403


async def test_the_doctor_works_with_the_key(mesh: Installed) -> None:
    visits = Visits(mesh)
    await visits.visit()
    assert visits.bad == []


async def test_an_upgrade_keeps_the_key(mesh: Installed) -> None:
    """An upgrade that changes the settings of Jobs runs the Job again, which keeps the key."""
    before = key(mesh)
    jobs = {one["metadata"]["name"] for one in mesh.kube.get("jobs")["items"]}
    mesh.helm("upgrade", "mesh", over={"jobs": {"podLabels": {"again": "yes"}}})
    new = {one["metadata"]["name"] for one in mesh.kube.get("jobs")["items"]} - jobs
    (job,) = [name for name in new if name.startswith(SECRET)]
    await mesh.kube.wait(f"job/{job}", "condition=Complete", timeout=90.0)
    assert "already has an admin's key" in mesh.kube.logs(f"job/{job}")
    assert key(mesh) == before


async def test_the_key_is_replaced(mesh: Installed) -> None:
    """The documented commands replace the admin's key. While the Secret has the old and the new key, both work."""
    old = key(mesh).decode()
    first, second, both, alone = [
        command.put({"team-a": mesh.kube.namespace})
        for command in documented.block(PAGE, "Who may do what")
        if "keys create" not in command.text
    ]
    mesh.kube.shell("\n".join(["set -e", first, second, both]))
    former, new = key(mesh).decode().split("\n")
    assert former == old

    def accepted(given: str) -> bool:
        return asked(mesh, "GET", "/mesh/v1/models/m0", key=given) == 200

    await mesh.kube.until(lambda: accepted(new), "the new key works", timeout=150.0)
    assert accepted(old)
    mesh.kube.shell(f"new={new}\n{alone}")
    await mesh.kube.until(lambda: not accepted(old), "the old key is refused", timeout=150.0)
    assert accepted(new)


async def test_with_required_inference_needs_a_key(mesh: Installed) -> None:
    """With `auth.mode=required` a call without a key is refused. Probes need none."""
    mesh.helm("upgrade", "mesh", over={"auth": {"mode": "required"}})
    await mesh.ready()
    assert await Outsider(mesh).called("m0") == "UNAUTHENTICATED"
    given = key(mesh).decode().split("\n")[-1]
    assert await Outsider(mesh, given).called("m0") == "OK"
    assert asked(mesh, "GET", "/v2/models/m0", key=given) == 200


async def test_a_service_account_calls_with_its_token(mesh: Installed) -> None:
    """With `auth.serviceAccounts`, a pod's account has the grants in the chart's values. A token for another audience
    is refused. Routers follow a change of the grants without a restart."""
    mesh.kube.kubectl("create", "serviceaccount", "scorer")
    me = f"serviceaccount:{mesh.kube.namespace}:scorer"

    def over(role: str) -> dict[str, Any]:
        grants = {"scorers": {"role": role, "models": ["*"], "to": [me]}}
        return {"auth": {"mode": "required", "serviceAccounts": "keys", "grants": grants}}

    mesh.helm("upgrade", "mesh", over=over("infer"))
    await mesh.ready(120.0)
    token = mesh.kube.kubectl("create", "token", "scorer", "--audience=mesh").strip()
    other = mesh.kube.kubectl("create", "token", "scorer").strip()
    await mesh.kube.until(lambda: asked(mesh, "GET", "/v2/models/m0", key=token) == 200, "the token is accepted")
    assert asked(mesh, "GET", "/mesh/v1/models/m0", key=token) == 403
    assert asked(mesh, "GET", "/v2/models/m0", key=other) == 401
    told = mesh.kube.exec(
        "client", "env", f"MESH_API_KEY={token}", "mesh", "whoami", "--endpoint", "http://modelmesh-serving:8008"
    )
    assert me in told

    pods = set(mesh.names("router"))
    mesh.helm("upgrade", "mesh", over=over("read"))
    await mesh.kube.until(
        lambda: asked(mesh, "GET", "/mesh/v1/models/m0", key=token) == 200, "the changed grant applies", timeout=150.0
    )
    assert asked(mesh, "GET", "/v2/models/m0", key=token) == 403
    assert set(mesh.names("router")) == pods


async def test_without_keys_everything_is_open(mesh: Installed) -> None:
    """`auth.mode=off` opens management, as with ModelMesh, and removes the key. The notes say so."""
    said = mesh.helm("upgrade", "mesh", over={"auth": {"mode": "off"}})
    assert "as with ModelMesh (auth.mode=off)" in said
    await mesh.ready()
    assert asked(mesh, "GET", "/mesh/v1/models/m0") == 200
    assert SECRET not in {one["metadata"]["name"] for one in mesh.kube.get("secrets")["items"]}
