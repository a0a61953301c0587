"""A real Kubernetes for the tests of this folder, an image of this tree on it, and a namespace for each test.

A running cluster (`make cluster`) is used and left running. Otherwise one is built, started and taken down again,
unless MESH_CLUSTER_KEEP=1 leaves it running. If the machine cannot run a cluster, the tests are skipped with the
reason.
"""

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.cluster import identity, images, layout, lifecycle, needs
from deploy.cluster.progress import Steps
from mesh.schema import records
from tests.support.cluster import Kube

_HERE = Path(__file__).parent
_LIMIT = 900.0
"""Seconds for one test: more than its waits take together, because their errors show what happened in the cluster."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(_HERE):
            item.add_marker(pytest.mark.cluster)
            item.add_marker(pytest.mark.timeout(_LIMIT))


@contextlib.contextmanager
def _aloud(request: pytest.FixtureRequest) -> Iterator[None]:
    """Shows output immediately, for steps that take minutes."""
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
        yield


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Kube]:
    """The running cluster, with the rights of its admin."""
    if obstacles := needs.obstacles():
        pytest.skip(f"this machine cannot run the test cluster: {'; '.join(obstacles)}")
    kept = True
    with _aloud(request):
        steps = lifecycle.build(more=1)
        if not lifecycle.is_up():
            kept = bool(os.environ.get("MESH_CLUSTER_KEEP"))
            try:
                with steps.step("starting the cluster") as tell:
                    lifecycle.up(tell)
            except lifecycle.OccupiedError as error:
                pytest.skip(str(error))
    try:
        yield Kube(layout.KUBECONFIG)
    finally:
        if not kept:
            lifecycle.down()


@pytest.fixture(scope="session")
def image(cluster: Kube, request: pytest.FixtureRequest) -> str:
    """The name of this tree's image on the node. The image is built if the tree has changed since the last build."""
    with _aloud(request), Steps(1).step("building Mesh's image"):
        return lifecycle.image()


@pytest.fixture(scope="session")
def image_before(image: str) -> str:
    """The name of an image of the previous version, whose routers and agents know only the previous protocol."""

    def lower(root: Path) -> None:
        (source,) = root.glob("opt/mesh/lib/python*/site-packages/mesh/schema/records.py")
        text, count = re.subn(r"(?m)^PROTOCOL = .*$", f"PROTOCOL = {records.PROTOCOL - 1}", source.read_text())
        assert count == 1
        source.write_text(text)
        for compiled in source.parent.glob("__pycache__/records.*.pyc"):  # Python trusts these without the source
            compiled.unlink()

    return lifecycle.image_changed(image, f"{images.MESH}-before", lower)


@contextlib.contextmanager
def _a_namespace(cluster: Kube, folder: Path) -> Iterator[Kube]:
    name = f"test-{secrets.token_hex(4)}"
    here = cluster.within(name)
    here.apply(
        {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {
                "name": name,
                "labels": {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")},
            },
        },
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "owner", "namespace": name}},
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": {"name": "owner", "namespace": name},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "admin"},
            "subjects": [{"kind": "ServiceAccount", "name": "owner", "namespace": name}],
        },
    )
    token = here.kubectl("create", "token", "owner", "--duration=4h").strip()
    kubeconfig = folder / f"{name}.kubeconfig"
    authority = (layout.PKI / "ca.crt").read_bytes()
    identity.write(kubeconfig, identity.kubeconfig(authority, user={"token": token}, namespace=name))
    try:
        yield Kube(kubeconfig, name)
    finally:
        # Not waited for: it takes seconds, and the next test has a namespace of its own.
        here.kubectl("delete", "pods", "--all", "--grace-period=1", "--wait=false")
        cluster.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture
def namespace(cluster: Kube, tmp_path: Path) -> Iterator[Kube]:
    """A new namespace under Pod Security's `restricted`, for an admin with rights in this namespace only."""
    with _a_namespace(cluster, tmp_path) as here:
        yield here


@pytest.fixture(scope="module")
def shared_namespace(cluster: Kube, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kube]:
    """A namespace like `namespace`, shared by all tests of a module."""
    with _a_namespace(cluster, tmp_path_factory.mktemp("namespace")) as here:
        yield here


@pytest.fixture(scope="module")
def volume(cluster: Kube, shared_namespace: Kube) -> Iterator[str]:
    """The storage class of one volume for `shared_namespace`, because the cluster does not provision volumes by
    itself."""
    with _volumes(cluster, shared_namespace.namespace, 1) as name:
        yield name


@pytest.fixture(scope="module")
def volumes(cluster: Kube, shared_namespace: Kube) -> Iterator[str]:
    """The storage class of eight volumes: three for members of etcd, one for a member that loses its volume, three for
    all members again, and one for snapshots."""
    with _volumes(cluster, shared_namespace.namespace, 8) as name:
        yield name


@contextlib.contextmanager
def _volumes(cluster: Kube, name: str, count: int) -> Iterator[str]:
    made = [f"{name}-{number}" for number in range(count)]
    for one in made:
        folder = layout.RUN / "volumes" / one
        folder.mkdir(parents=True)
        folder.chmod(0o777)  # as a volume that Kubernetes gives to the pod's group
        cluster.apply(
            {
                "apiVersion": "v1",
                "kind": "PersistentVolume",
                "metadata": {"name": one},
                "spec": {
                    "storageClassName": name,
                    "capacity": {"storage": "1Gi"},
                    "accessModes": ["ReadWriteOnce"],
                    "persistentVolumeReclaimPolicy": "Retain",
                    "hostPath": {"path": str(folder), "type": "Directory"},
                },
            }
        )
    yield name
    cluster.kubectl("delete", "persistentvolume", *made, "--wait=false")
