"""One etcd for meshes of several namespaces: a Secret holds the connection, and errors name mistakes in it."""

import json
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import yaml

from tests.support import documented
from tests.support.cluster import Kube, KubeError, pod, ready_at
from tests.support.installed import Installed
from tests.support.visits import Visits

pytestmark = pytest.mark.asyncio(loop_scope="module")

SMALL = {
    "router": {"replicas": 1},
    "pools": [{"name": "cpu", "replicas": 1}],
    "etcd": {"embedded": False},
}


def secret(endpoint: str, *, prefix: str = "shared", **more: str) -> dict[str, object]:
    connection = json.dumps({"endpoints": endpoint, "root_prefix": prefix, **more})
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "model-serving-etcd"},
        "stringData": {"etcd_connection": connection},
    }


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def endpoint(shared_namespace: Kube, image: str) -> str:
    """The address of a separate etcd that requires a user and a password."""
    ready = ready_at("/readyz", 2379)
    argv = ["--data-dir=/tmp/etcd", "--unsafe-no-fsync", "--listen-client-urls=http://0.0.0.0:2379"]
    argv += [f"--advertise-client-urls=http://outside.{shared_namespace.namespace}:2379"]
    shared_namespace.apply(
        pod("outside", {"name": "it", "image": image, "command": ["etcd"], "args": argv, "readinessProbe": ready}),
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "outside"},
            "spec": {"selector": {"app": "outside"}, "ports": [{"port": 2379}]},
        },
    )
    await shared_namespace.wait("pod/outside", "condition=Ready")
    for words in ("user add root:right", "user grant-role root root", "auth enable"):
        shared_namespace.exec("outside", "etcdctl", *words.split())
    return f"http://outside.{shared_namespace.namespace}:2379"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def first(shared_namespace: Kube, image: str, endpoint: str) -> AsyncIterator[Installed]:
    """A mesh on the shared etcd."""
    mesh = Installed(shared_namespace, image)
    with pytest.raises(KubeError, match=r'"model-serving-etcd" .* is not in the namespace.* Create it .*etcd.embedded'):
        mesh.helm("install", "mesh", over=SMALL)
    shared_namespace.apply(secret(endpoint, userid="root", password="right"))
    mesh.helm("install", "mesh", over=SMALL)
    await mesh.ready()
    yield mesh


async def refused(mesh: Installed, says: Callable[[str], bool]) -> None:
    """Waits until `says` is true for the logs of the router and of the runtime pod, and checks that neither is
    ready."""

    def ended() -> bool:
        names = [*mesh.names("router"), *mesh.names("runtime")]
        return len(names) == 2 and all(says(mesh.kube.kubectl("logs", name, "--tail=-1")) for name in names)

    await mesh.kube.until(ended, "the processes say why they do not start", timeout=90.0)
    for one in (*mesh.pods("router"), *mesh.pods("runtime")):
        conditions = {condition["type"]: condition["status"] for condition in one["status"]["conditions"]}
        assert conditions["Ready"] == "False"


async def test_a_second_mesh_on_the_same_prefix_refuses_to_start(
    first: Installed, namespace: Kube, endpoint: str
) -> None:
    """A second mesh on the same prefix does not start and names the owner. The first one is unaffected."""
    mesh = Installed(namespace, first.image)
    namespace.apply(secret(endpoint, userid="root", password="right"))
    mesh.helm("install", "mesh", over=SMALL)
    owner = f"{first.kube.namespace}/mesh"
    await refused(mesh, lambda text: f"belongs to the mesh '{owner}'" in text)
    await first.ready()


async def test_a_mesh_of_another_prefix_sees_nothing_of_the_first(
    first: Installed, namespace: Kube, endpoint: str
) -> None:
    """A mesh with another prefix lists other models, and no pods of the first one."""
    await first.offer(3)
    mesh = Installed(namespace, first.image)
    namespace.apply(secret(endpoint, prefix="other", userid="root", password="right"))
    mesh.helm("install", "mesh", over=SMALL)
    await mesh.ready()
    assert json.loads(await mesh.mesh("ls", "--json")) != json.loads(await first.mesh("ls", "--json"))
    pods = await mesh.mesh("pods", "--json")
    assert mesh.names("runtime")[0] in pods
    assert first.names("runtime")[0] not in pods
    await mesh.offer(1)


async def test_a_wrong_password_is_named(first: Installed, namespace: Kube, endpoint: str, tmp_path: Path) -> None:
    """The processes and the doctor name a wrong password. Once the Secret is right, the pods become ready by
    themselves."""
    mesh = Installed(namespace, first.image)
    namespace.apply(secret(endpoint, prefix="third", userid="root", password="wrong"))
    mesh.helm("install", "mesh", over=SMALL)
    await refused(mesh, lambda text: "etcd refuses this process" in text and "check the user, password" in text)
    (tmp_path / "password").write_text("wrong")
    address = first.kube.get("pod", "outside")["status"]["podIP"]  # this machine does not resolve the cluster's names
    where = ("--etcd", f"http://{address}:2379", "--etcd-user", "root", "--etcd-password-file")
    visits = Visits(mesh, "--only", "etcd", *where, str(tmp_path / "password"), kube=namespace)
    await visits.visit()
    assert visits.found("fail", "etcd", "password", "check user and password"), visits.findings
    namespace.apply(secret(endpoint, prefix="third", userid="root", password="right"))
    await mesh.ready(180.0)


def gone(mesh: Installed, *argv: str) -> dict[str, object]:
    """Returns the docs' pod for the prefix of a deleted mesh. `argv` replaces its command."""
    page = (documented.DOCS / "kubernetes.md").read_text()
    (text,) = [block for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "mesh-prefix" in block]
    found: dict[str, Any] = yaml.safe_load(text)
    (container,) = found["spec"]["containers"]
    assert container["args"][:2] == ["prefix", "remove"]
    container["image"] = mesh.image
    container["args"][1:2] = argv or ["remove"]
    return found


async def test_what_a_mesh_has_left_is_handed_over_and_removed(
    first: Installed, namespace: Kube, endpoint: str, tmp_path: Path
) -> None:
    """An uninstalled mesh keeps its prefix until the documented pod transfers it, with its models, to another mesh that
    waits for it. Once that mesh is uninstalled too, the pod removes everything below the prefix, and nothing else."""

    def left(prefix: str) -> list[str]:
        words = ("etcdctl", "--user=root:right", "get", f"{prefix}/", "--prefix", "--keys-only")
        return first.kube.exec("outside", *words).split()

    await first.offer(3)
    first.kube.exec("outside", "etcdctl", "--user=root:right", "put", "shared2/theirs", "x")
    first.kube.helm("uninstall", "mesh")
    await first.kube.until(lambda: not first.names(), "its pods are gone", timeout=120.0)
    heir = Installed(namespace, first.image)
    namespace.apply(secret(endpoint, userid="root", password="right"))
    heir.helm("install", "mesh", over=SMALL)
    await refused(heir, lambda text: "mesh prefix transfer" in text)
    namespace.apply(gone(heir, "transfer", f"--to={namespace.namespace}/mesh"))
    await namespace.wait("pod/mesh-prefix", "jsonpath={.status.phase}=Succeeded")
    assert "handed over: 3 models" in namespace.logs("mesh-prefix")
    namespace.kubectl("delete", "pod", "mesh-prefix")
    await heir.ready(240.0)
    assert {one["id"] for one in json.loads(await heir.mesh("ls", "--json"))["models"]} == {"m0", "m1", "m2"}

    file = tmp_path / "prefix.yaml"
    file.write_text(json.dumps(gone(heir)))
    heir.typed("Uninstall", "helm uninstall")
    said = heir.typed("Uninstall", "mesh-prefix", "prefix.yaml", words={"prefix.yaml": str(file)})
    assert "removed: 3 models" in said
    assert left("shared") == []
    assert left("shared2") == ["shared2/theirs"]
