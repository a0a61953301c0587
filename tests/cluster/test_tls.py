"""The endpoint's certificate in a Secret: routers require it at their start, and adopt a new one under traffic."""

import ssl
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.support import certificates
from tests.support.cluster import Kube, KubeError, pair, secret
from tests.support.installed import NAME, Installed, Traffic
from tests.support.visits import Visits

pytestmark = pytest.mark.asyncio(loop_scope="module")

TLS = {"tls": {"secretName": "edge"}, "pools": [{"name": "cpu", "replicas": 1}]}


def edge(pem: bytes) -> dict[str, Any]:
    """Returns a Secret like those of cert-manager, from one text with a certificate and its key."""
    return secret("edge", pair(pem)) | {"type": "kubernetes.io/tls"}


@pytest.fixture(scope="module")
def pairs() -> list[tuple[bytes, bytes]]:
    """Two authorities, each with a certificate that it signed."""
    return [certificates.certificate(NAME) for _ in range(2)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(
    shared_namespace: Kube, image: str, pairs: list[tuple[bytes, bytes]], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Installed]:
    """Two routers that speak TLS with the first certificate. Callers trust both authorities."""
    mesh = Installed(shared_namespace, image)
    with pytest.raises(KubeError, match=r'tls\.secretName: the Secret "edge" is not in the namespace'):
        mesh.helm("install", "mesh", over=TLS)
    mesh.trust = tmp_path_factory.mktemp("trust") / "ca.pem"
    mesh.trust.write_bytes(b"".join(authority for authority, _ in pairs))
    mesh.kube.apply(edge(pairs[0][1]))
    mesh.helm("install", "mesh", over=TLS)
    await mesh.ready()
    await mesh.offer(10)
    yield mesh


def shown(mesh: Installed) -> set[str]:
    """Returns the certificates that the routers show on a new connection."""
    addresses = [one["status"]["podIP"] for one in mesh.pods("router")]
    return {ssl.get_server_certificate((address, 8033), timeout=10.0) for address in addresses}


async def test_a_certificate_is_replaced_under_traffic(mesh: Installed, pairs: list[tuple[bytes, bytes]]) -> None:
    """When the certificate is replaced under traffic, new connections get the new certificate, no call fails, and no
    container restarts."""
    (before,) = shown(mesh)
    started = {one["metadata"]["name"]: one["status"]["containerStatuses"] for one in mesh.pods("router")}
    async with Traffic(mesh) as traffic:
        mesh.kube.apply(edge(pairs[1][1]))
        await mesh.kube.until(lambda: before not in shown(mesh), "the routers show the new certificate", timeout=120.0)
        await traffic.some(200)
    assert traffic.errors == []
    assert len(shown(mesh)) == 1
    assert started == {one["metadata"]["name"]: one["status"]["containerStatuses"] for one in mesh.pods("router")}


async def test_an_expired_certificate_is_not_taken(mesh: Installed, pairs: list[tuple[bytes, bytes]]) -> None:
    """Running routers do not adopt an expired certificate. They keep the valid one and report the problem in log and
    metrics, doctor names the Secret, and no call fails. Once the Secret has its valid certificate again, the metrics
    show no refused certificate."""
    (valid,) = shown(mesh)
    assert mesh.trust is not None
    # If two authorities have one name, a new connection tries the first alone.
    mesh.trust.write_bytes(next(authority for authority, pem in pairs if valid.encode().strip() in pem))
    before = mesh.kube.get("secret", "edge")
    _, expired = certificates.certificate(NAME, ends=-certificates.HOUR)
    async with Traffic(mesh) as traffic:
        mesh.kube.apply(edge(expired))
        await mesh.kube.until(
            lambda: all(mesh.metric(name, "mesh_edge_certificate_refused") == 1 for name in mesh.names("router")),
            "the routers tell that they refuse it",
            timeout=150.0,
        )
        assert shown(mesh) == {valid}
        for name in mesh.names("router"):
            assert "the new edge certificate cannot be used, the old one stays in use" in mesh.kube.logs(name)
            assert mesh.metric(name, "mesh_edge_certificate_expires_seconds") > 0
        visits = Visits(mesh, "--only", "secrets")
        await visits.until_said([("fail", "secrets", "expiry", "tls.crt of the Secret edge", "expired on")])
        mesh.kube.apply({**edge(expired), "data": before["data"]})
        await mesh.kube.until(
            lambda: all(mesh.metric(name, "mesh_edge_certificate_refused") == 0 for name in mesh.names("router")),
            "the routers refuse nothing any longer",
            timeout=150.0,
        )
        await traffic.some(50)
    assert traffic.errors == []
    assert shown(mesh) == {valid}
