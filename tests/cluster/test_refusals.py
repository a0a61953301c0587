"""Mistakes of an admin on a real cluster. For each mistake, a message names the cause and the way out, and the mesh
becomes ready once the mistake is corrected. Other mistakes are in `test_install` (a second mesh), `test_one_etcd` and
`test_tls`."""

from typing import Any

import pytest

from tests.support import authority, certificates
from tests.support.cluster import Kube, KubeError, pair, secret
from tests.support.installed import NAME, Installed
from tests.support.visits import Visits

ETCD = ("mesh.internal", "localhost", "mesh-etcd-0.mesh-etcd")


def internal(by: authority.Authority, *, hours: float) -> dict[str, Any]:
    """Returns the Secret with the certificate between the mesh's pods."""
    certificate, key = by.issue(*ETCD, hours=hours)
    return secret("ours", {"ca.crt": by.pem, "tls.crt": certificate, "tls.key": key})


def edge(*, ends: Any = certificates.HOUR) -> dict[str, Any]:
    """Returns the Secret with the certificate that clients see."""
    _, pem = certificates.certificate(NAME, ends=ends)
    return secret("edge", pair(pem))


def test_a_typo_in_a_values_file(namespace: Kube, image: str) -> None:
    """Helm refuses a values file with a typo, names the key and its place, and installs nothing."""
    mesh = Installed(namespace, image)
    for over, where in (
        ({"router": {"replcas": 3}}, "router"),
        ({"pools": [{"name": "cpu", "replcas": 3}]}, "pools"),
        ({"etcd": {"replcas": 3}}, "etcd"),
    ):
        with pytest.raises(KubeError, match=rf"{where}\b.*replcas.* not allowed"):
            mesh.helm("install", "mesh", over=over)
    assert mesh.left() == []


async def test_certificates_that_have_expired(namespace: Kube, image: str) -> None:
    """With an expired certificate, first between the mesh's pods and then for clients, processes say which certificate
    expired, and when."""
    mesh = Installed(namespace, image)
    ours = authority.Authority()
    namespace.apply(internal(ours, hours=-1), edge(ends=-certificates.HOUR))
    over = {
        "tls": {"secretName": "edge"},
        "internalTLS": {"existingSecret": "ours"},
        "router": {"replicas": 1},
        "pools": [{"name": "cpu", "replicas": 1}],
    }
    mesh.helm("install", "mesh", over=over)

    def told(component: str, *words: str) -> bool:
        logs = [namespace.kubectl("logs", name, "--tail=-1") for name in mesh.names(component)]
        return bool(logs) and all(word in log for log in logs for word in words)

    for component in ("router", "runtime"):
        words = ("/etc/mesh/internal/tls.crt has expired on", "internalTLS.existingSecret")
        await namespace.until(lambda who=component, words=words: told(who, *words), f"the {component} says why")

    namespace.apply(internal(ours, hours=24))
    words = ("/etc/mesh/tls/tls.crt has expired on", "Secret that tls.secretName names")
    await namespace.until(lambda: told("router", *words), "the router says why", timeout=120.0)
    assert not any(
        container["ready"] for one in mesh.pods("router") for container in one["status"]["containerStatuses"]
    )

    namespace.apply(edge())
    await mesh.ready(180.0)


async def test_a_container_that_is_too_small_for_models(namespace: Kube, image: str) -> None:
    """A runtime pod whose container is too small for `capacity: auto` ends at once and reports the available and the
    required memory. Doctor shows this error."""
    mesh = Installed(namespace, image)
    memory = {"memory": "192Mi"}
    resources = {"requests": {"cpu": "20m", **memory}, "limits": {"cpu": "2", **memory}}
    pools = [{"name": "cpu", "replicas": 1, "resources": resources}]
    mesh.helm("install", "mesh", over={"router": {"replicas": 1}, "pools": pools})

    def told() -> bool:
        logs = [namespace.kubectl("logs", name, "--tail=-1") for name in mesh.names("runtime")]
        return any("192 MiB" in said and "282 MiB" in said for said in logs)

    await namespace.until(told, "the pod names both numbers", timeout=120.0)
    await namespace.wait(f"pod/{mesh.names('router')[0]}", "condition=Ready")
    visits = Visits(mesh, "--only", "kubernetes")
    await visits.until_said([("fail", "kubernetes", "pods", "mesh-runtime-cpu", "kubectl logs")])
    resources["requests"]["memory"] = resources["limits"]["memory"] = "512Mi"
    mesh.helm("upgrade", "mesh", over={"router": {"replicas": 1}, "pools": pools})
    await mesh.ready(180.0)
