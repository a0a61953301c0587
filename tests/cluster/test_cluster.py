"""The test cluster itself, as the tests of the installation expect it."""

import asyncio
import json
import urllib.request
from pathlib import Path

import pytest

from deploy.cluster import lifecycle
from tests.support.cluster import Kube, KubeError, pod, ready_at

_HELLO = """
import http.server
class Hello(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"hello")
http.server.HTTPServer(("", 8080), Hello).serve_forever()
"""
_ASK = "import urllib.request; print(urllib.request.urlopen('http://hello:8080', timeout=20).read().decode())"


def test_the_owner_of_a_namespace_owns_nothing_else(namespace: Kube) -> None:
    """An admin of one namespace may create Deployments and Roles in it, but no cluster-wide objects, and sees no pods
    of kube-system."""
    assert namespace.can("create", "deployments.apps")
    assert namespace.can("create", "roles.rbac.authorization.k8s.io")
    with pytest.raises(KubeError, match=r"cannot list resource .nodes"):
        namespace.kubectl("get", "nodes")
    assert not namespace.can("create", "customresourcedefinitions.apiextensions.k8s.io")
    assert not namespace.can("create", "clusterroles.rbac.authorization.k8s.io")
    assert not namespace.within("kube-system").can("get", "pods")


def test_pod_security_refuses_what_is_not_restricted(namespace: Kube) -> None:
    """A pod that could run as root is not admitted."""
    careless = pod("careless", {"name": "it", "image": "any"})
    del careless["spec"]["securityContext"]["runAsNonRoot"]
    with pytest.raises(KubeError, match="violates PodSecurity"):
        namespace.apply(careless)


async def test_services_have_names_and_lead_to_pods(namespace: Kube, image: str) -> None:
    """A pod calls another by the name of its service, and the test calls it through a forwarded port."""
    ready = ready_at("/", 8080)
    namespace.apply(
        pod("hello", {"name": "it", "image": image, "command": ["python", "-c", _HELLO], "readinessProbe": ready}),
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "hello"},
            "spec": {"selector": {"app": "hello"}, "ports": [{"port": 8080}]},
        },
    )
    await namespace.wait("pod/hello", "condition=Ready")
    namespace.apply(pod("caller", {"name": "it", "image": image, "command": ["python", "-c", _ASK]}))
    await namespace.wait("pod/caller", "jsonpath={.status.phase}=Succeeded")
    assert namespace.logs("caller") == "hello\n"
    async with namespace.forward("service/hello", 8080) as port:
        with await asyncio.to_thread(urllib.request.urlopen, f"http://127.0.0.1:{port}", timeout=10) as reply:
            assert reply.read() == b"hello"
    assert "uid=" in namespace.exec("hello", "id")


def test_helm_works_as_the_owner(namespace: Kube) -> None:
    assert json.loads(namespace.helm("list", "--output=json")) == []


async def test_the_current_folder_stays_as_it_is(
    namespace: Kube, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """kubectl and helm write no caches into the current folder, even for a user without a home directory."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    here = set(tmp_path.iterdir())
    lifecycle.kubectl("get", "nodes")
    namespace.kubectl("get", "pods")
    namespace.helm("list")
    with pytest.raises(KubeError, match="not found"):
        async with namespace.forward("service/nobody", 80):
            pass
    assert set(tmp_path.iterdir()) == here
