"""`mesh doctor` on a real cluster: it finds each fault of a mesh, says what to do, and reports nothing once that is
done.

Each test plants a fault in the same mesh and removes it again. `test_one_etcd` tests a wrong password, and
`test_exhaustion` a quarantined model.
"""

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from deploy.cluster import identity, layout
from tests.support import certificates
from tests.support.cluster import Kube, pair, secret
from tests.support.installed import NAME, Installed
from tests.support.visits import Expected, Visits

pytestmark = pytest.mark.asyncio(loop_scope="module")

POOL, ROUTER = "deployment/mesh-runtime-cpu", "deployment/mesh-router"
_ETCDCTL = """
import subprocess
def etcdctl(*words, given=""):
    return subprocess.run(["etcdctl", *words], input=given, capture_output=True, text=True)
"""
_FILL = """
for number in range(40):
    if etcdctl("put", f"filling/{number:02}", given="x" * 1000000).returncode:
        break
assert "NOSPACE" in etcdctl("alarm", "list").stdout
"""
_EMPTY = """
import json
status = json.loads(etcdctl("endpoint", "status", "--write-out=json").stdout)
etcdctl("del", "filling/", "--prefix")
etcdctl("compact", str(status[0]["Status"]["header"]["revision"] + 1))
for words in (["defrag"], ["alarm", "disarm"]):
    done = etcdctl(*words)
    assert done.returncode == 0, done.stderr
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(
    shared_namespace: Kube, image: str, volume: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Installed]:
    """A router with TLS, a runtime pod, one member of etcd with a small quota."""
    mesh = Installed(shared_namespace, image, storage=volume)
    authority, pem = certificates.certificate(NAME, ends=timedelta(days=100))
    mesh.trust = tmp_path_factory.mktemp("trust") / "ca.pem"
    mesh.trust.write_bytes(authority)
    mesh.kube.apply(secret("edge", pair(pem)))
    over = {
        "tls": {"secretName": "edge"},
        "router": {"replicas": 1},
        "pools": [{"name": "cpu", "replicas": 1}],
        "etcd": {"quota": "16Mi"},
    }
    mesh.helm("install", "mesh", over=over)
    await mesh.ready()
    await mesh.offer(2)
    yield mesh


# -- faults: each context manager causes one, and removes it again


@contextlib.asynccontextmanager
async def changed(mesh: Installed, cluster: Kube, *argv: str) -> AsyncIterator[None]:
    """Changes a pool's pod template with kubectl while the block runs."""
    mesh.kube.kubectl(*argv)
    try:
        yield
    finally:
        mesh.kube.kubectl("rollout", "undo", POOL)


@contextlib.asynccontextmanager
async def scaled(mesh: Installed, cluster: Kube, what: str) -> AsyncIterator[None]:
    """Scales a workload to zero while the block runs."""
    mesh.kube.kubectl("scale", what, "--replicas=0")
    try:
        yield
    finally:
        mesh.kube.kubectl("scale", what, "--replicas=1")


@contextlib.asynccontextmanager
async def quota(mesh: Installed, cluster: Kube) -> AsyncIterator[None]:
    """Sets a quota of as many pods as exist and requests one more while the block runs."""
    running = [one for one in mesh.kube.get("pods")["items"] if one["status"]["phase"] == "Running"]
    hard = {"pods": str(len(running))}  # ended pods do not count
    limit = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "few"}, "spec": {"hard": hard}}
    there = cluster.within(mesh.kube.namespace)
    there.apply(limit)
    await mesh.kube.until(lambda: "used" in there.get("resourcequota", "few")["status"], "the quota counts")
    mesh.kube.kubectl("scale", ROUTER, "--replicas=2")
    try:
        yield
    finally:
        there.kubectl("delete", "resourcequota", "few")
        mesh.kube.kubectl("scale", ROUTER, "--replicas=1")


@contextlib.asynccontextmanager
async def applied(mesh: Installed, cluster: Kube, *objects: dict[str, Any]) -> AsyncIterator[None]:
    """Applies unwanted or malformed objects for the duration of the block."""
    mesh.kube.apply(*objects)
    try:
        yield
    finally:
        for one in objects:
            mesh.kube.kubectl("delete", one["kind"], one["metadata"]["name"])


@contextlib.asynccontextmanager
async def expired(mesh: Installed, cluster: Kube) -> AsyncIterator[None]:
    """Puts a certificate that expired an hour ago into the endpoint's Secret. Running routers keep their valid one."""
    before = mesh.kube.get("secret", "edge")
    _, pem = certificates.certificate(NAME, ends=-certificates.HOUR)
    mesh.kube.apply(secret("edge", pair(pem)))
    try:
        yield
    finally:
        mesh.kube.apply(secret("edge", {key: base64.b64decode(value) for key, value in before["data"].items()}))


@contextlib.asynccontextmanager
async def deleted(mesh: Installed, cluster: Kube, name: str) -> AsyncIterator[None]:
    """Deletes a Secret of the chart while the block runs."""
    before = mesh.kube.get("secret", name)
    mesh.kube.kubectl("delete", "secret", name)
    try:
        yield
    finally:
        kept = {key: before["metadata"][key] for key in ("name", "labels", "annotations")}
        mesh.kube.apply({**before, "metadata": kept})


@contextlib.asynccontextmanager
async def no_admin_key(mesh: Installed, cluster: Kube) -> AsyncIterator[None]:
    """Removes the admin's key from its Secret, as if the Job had not made it."""
    (value,) = mesh.kube.get("secret", "mesh-admin-key")["data"].values()
    change = [{"op": "remove", "path": "/data/admin.key"}]
    mesh.kube.kubectl("patch", "secret", "mesh-admin-key", "--type=json", f"--patch={json.dumps(change)}")
    try:
        yield
    finally:
        mesh.kube.kubectl("patch", "secret", "mesh-admin-key", f"--patch={json.dumps({'data': {'admin.key': value}})}")


@contextlib.asynccontextmanager
async def unknown_key(mesh: Installed, cluster: Kube) -> AsyncIterator[None]:
    """Registers a model that names a store which the storage Secret lacks."""
    key = json.dumps({"storage_key": "nowhere", "storage_params": {"bucket": "models"}})
    await mesh.mesh("register", "keyed", "keyed.onnx", "--key", key)
    try:
        yield
    finally:
        await mesh.mesh("unregister", "keyed")


@contextlib.asynccontextmanager
async def no_place(mesh: Installed, cluster: Kube) -> AsyncIterator[None]:
    """Registers a type that requires a label which no pod has."""
    await mesh.mesh("settings", "type_constraints", '{"onnx": {"required": ["nobody-has-it"]}}')
    try:
        yield
    finally:
        await mesh.mesh("settings", "type_constraints", "--clear")


@contextlib.asynccontextmanager
async def full(mesh: Installed, cluster: Kube) -> AsyncIterator[None]:
    """Fills etcd up to its real quota."""
    program = ("exec", "mesh-etcd-0", "--", "python", "-c")
    await asyncio.to_thread(mesh.kube.kubectl, *program, _ETCDCTL + _FILL)
    try:
        yield
    finally:
        await asyncio.to_thread(mesh.kube.kubectl, *program, _ETCDCTL + _EMPTY)


Fault = Callable[[Installed, Kube], AbstractAsyncContextManager[None]]


def _changed(*argv: str) -> Fault:
    return lambda mesh, cluster: changed(mesh, cluster, *argv)


def _scaled(what: str) -> Fault:
    return lambda mesh, cluster: scaled(mesh, cluster, what)


def _deleted(name: str) -> Fault:
    return lambda mesh, cluster: deleted(mesh, cluster, name)


STORAGE = secret("storage-config", {"minio": b"{not json"})

FAULTS: dict[str, tuple[Fault, list[Expected]]] = {
    "image": (
        _changed("set", "image", POOL, "runtime=localhost/mesh:typo"),
        [("fail", "kubernetes", "pods", "ErrImageNeverPull", "check image.registry, repository and tag")],
    ),
    "too-large": (
        _changed("set", "resources", POOL, "--requests=memory=900Gi", "--limits=memory=900Gi"),
        [
            (
                "fail",
                "kubernetes",
                "pods",
                "is Pending",
                "Insufficient memory",
                "free resources on a node, or lower the pod's requests",
            )
        ],
    ),
    "crashing": (
        _changed("set", "env", POOL, "MESH_CAPACITY=lots"),
        [("fail", "kubernetes", "pods", "CrashLoopBackOff", "kubectl logs", "--previous")],
    ),
    "quota": (quota, [("fail", "kubernetes", "workload", "exceeded quota", "ask for a larger quota")]),
    "no-runtime-pods": (
        _scaled(POOL),
        [
            ("warn", "kubernetes", "workload", "mesh-runtime-cpu", "it is scaled to 0", f"kubectl scale {POOL}"),
            ("fail", "mesh", "pods", "there are no runtime pods"),
        ],
    ),
    "no-etcd": (
        _scaled("statefulset/mesh-etcd"),
        [
            ("warn", "kubernetes", "workload", "mesh-etcd", "it is scaled to 0"),
            ("fail", "etcd", "reach", "mesh-etcd-0.mesh-etcd:2379"),
            ("fail", "mesh", "registry", "check etcd"),
        ],
    ),
    "etcd-full": (full, [("fail", "etcd", "alarm", "NOSPACE", "etcd.quota", "etcdctl alarm disarm")]),
    "storage-secret": (
        lambda mesh, cluster: applied(mesh, cluster, STORAGE),
        [("fail", "secrets", "storage", "minio is not JSON", "docs/storage.md")],
    ),
    "storage-key": (unknown_key, [("fail", "mesh", "storage", "no key nowhere", "keyed", "add nowhere to the Secret")]),
    "no-place": (no_place, [("fail", "mesh", "types", "type onnx", "nobody-has-it", "pools[].labels")]),
    "connection": (
        _deleted("mesh-etcd-connection"),
        [("fail", "secrets", "there", "no Secret mesh-etcd-connection", "mesh-router", "creates it")],
    ),
    "admin-secret": (
        _deleted("mesh-admin-key"),
        [("fail", "secrets", "there", "no Secret mesh-admin-key", "mesh-router", "the chart creates it: helm upgrade")],
    ),
    "admin-key": (
        no_admin_key,
        [("fail", "secrets", "keys", "mesh-admin-key has no key admin.key", "mesh-router", "helm upgrade")],
    ),
    "expired": (
        expired,
        [("fail", "secrets", "expiry", "tls.crt of the Secret edge", "expired on", "renew it in the Secret")],
    ),
}


async def test_a_mesh_without_faults_is_well(mesh: Installed) -> None:
    """In a mesh without faults, doctor checks Kubernetes, Secrets, etcd and the mesh, and reports no problem."""
    visits = Visits(mesh)
    await visits.visit()
    assert visits.bad == []
    assert {one["area"] for one in visits.findings} >= {"kubernetes", "secrets", "etcd", "mesh"}


@pytest.mark.parametrize("name", FAULTS)
async def test_a_fault_is_found(mesh: Installed, cluster: Kube, name: str) -> None:
    """A planted fault is reported with its cause and the way out, and is no longer reported once it is removed."""
    fault, expected = FAULTS[name]
    async with fault(mesh, cluster):
        await Visits(mesh).until_said(expected)
    await mesh.ready(120.0)
    await Visits(mesh).until_said(())


async def test_rights_that_are_missing(mesh: Installed, cluster: Kube, tmp_path: Path) -> None:
    """A user with read-only rights sees which rights are missing, and still gets findings about pods."""
    there, name = cluster.within(mesh.kube.namespace), mesh.kube.namespace
    there.kubectl("create", "serviceaccount", "guest")
    there.kubectl("create", "rolebinding", "guest", "--clusterrole=view", f"--serviceaccount={name}:guest")
    token = there.kubectl("create", "token", "guest").strip()
    kubeconfig = tmp_path / "guest.kubeconfig"
    authority = (layout.PKI / "ca.crt").read_bytes()
    identity.write(kubeconfig, identity.kubeconfig(authority, user={"token": token}, namespace=name))
    visits = Visits(mesh, "--only", "kubernetes", kube=Kube(kubeconfig, name))
    await visits.visit()
    assert visits.found("warn", "kubernetes", "rights", "you have no right to", "ask for the role `admin`"), (
        visits.findings
    )
    assert visits.found("ok", "kubernetes", "pods", "1 runtime")
