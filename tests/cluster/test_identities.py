"""Callers with service accounts and with client certificates, and management on a port of its own.

One installation serves all tests. It starts without TLS, and is upgraded to TLS with client certificates.
"""

import asyncio
import json
import re
import ssl
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from cryptography import x509

from tests.support import certificates, documented
from tests.support.cluster import Kube, KubeError, pair, secret
from tests.support.installed import NAME, Installed, laid_over
from tests.support.outside import MODEL, Outsider
from tests.support.visits import Visits

pytestmark = pytest.mark.asyncio(loop_scope="module")

MANAGEMENT = 8034
SPIFFE = "spiffe://example.com/ns/team-a/sa/deployer"
HOST = "scorer.example.com"
MODELS, M0 = "/mesh/v1/models", "/v2/models/m0"
REVIEWED = 150.0
"""Seconds within which a router asks Kubernetes again about a token, with a margin."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(shared_namespace: Kube, image: str) -> AsyncIterator[Installed]:
    """A router and a pod. Every request needs a key or a token of a service account, which the API server reviews.
    Management has its own port."""
    mesh = Installed(shared_namespace, image)
    mesh.management = MANAGEMENT
    grants = {
        "callers": {"role": "infer", "models": ["*"], "to": [f"serviceaccount:{mesh.kube.namespace}:batch"]},
        "scorers": {"role": "infer", "models": ["*"], "to": [f"cert:{HOST}"]},
        "deployers": {"role": "register", "models": ["team/*"], "to": [f"cert:{SPIFFE}"]},
    }
    mesh.values = laid_over(
        mesh.values,
        {
            "router": {"replicas": 1},
            "pools": [{"name": "cpu", "replicas": 1}],
            "service": {"managementPort": MANAGEMENT},
            "auth": {"mode": "required", "serviceAccounts": "review", "grants": grants},
        },
    )
    mesh.helm("install", "mesh")
    await mesh.ready()
    await mesh.offer(2)
    yield mesh


@pytest.fixture(scope="module")
def binding(mesh: Installed, cluster: Kube) -> Iterator[str]:
    """The documented command with which the cluster's admin allows routers to review tokens. The binding is deleted at
    the end."""
    name = f"mesh-reviews-{mesh.kube.namespace}"
    command, *_ = documented.block("security.md", "Kubernetes service accounts")
    yield command.put({"mesh-reviews": name, "mesh:mesh": f"{mesh.kube.namespace}:mesh"})
    cluster.kubectl("delete", "clusterrolebinding", name, "--ignore-not-found")


def admin(mesh: Installed) -> Outsider:
    """Returns a caller with the admin's key."""
    return Outsider(mesh, mesh.credentials()["MESH_API_KEY"])


# --- the port for management


async def test_only_its_own_port_serves_management(mesh: Installed) -> None:
    """With `service.managementPort`, the endpoint's other ports refuse management even with the admin's key, over REST
    and gRPC. All ports serve inference."""
    caller = admin(mesh)
    for port in (8008, 8033):
        assert caller.asked("GET", MODELS, port=port) == 404
        assert caller.asked("PUT", f"{MODELS}/m9", MODEL, port=port) == 404
        assert await caller.registered("m9", port=port) == "UNIMPLEMENTED"
    assert caller.asked("GET", f"{MODELS}/m9", port=MANAGEMENT) == 404
    assert await caller.registered("m9", port=MANAGEMENT) == "OK"
    assert caller.asked("GET", f"{MODELS}/m9", port=MANAGEMENT) == 200
    assert caller.asked("DELETE", f"{MODELS}/m9", port=MANAGEMENT) == 200
    for port in (8008, 8033, MANAGEMENT):
        assert caller.asked("GET", M0, port=port) == 200
        assert await caller.called("m0", port=port) == "OK"
        assert Outsider(mesh).asked("GET", M0, port=port) == 401


async def test_a_command_at_the_wrong_port_says_so(mesh: Installed) -> None:
    """`mesh` names the cause if its endpoint serves no management."""
    async with mesh.kube.forward("service/modelmesh-serving", 8033) as port:
        argv = ("ls", "--endpoint", f"http://localhost:{port}")
        key = f"MESH_API_KEY={mesh.credentials()['MESH_API_KEY']}"
        with pytest.raises(KubeError, match="this port does not serve management"):
            await asyncio.to_thread(mesh.kube.shell, " ".join((key, "mesh", *argv)))


async def test_the_notes_lead_to_the_port_for_management(mesh: Installed) -> None:
    """The port-forward in the notes leads to the port for management, with which `mesh` then works."""
    notes = mesh.kube.helm("get", "notes", "mesh")
    (forwarded,) = re.findall(r"port-forward service/modelmesh-serving 8033:(\d+)", notes)
    assert int(forwarded) == mesh.management
    assert mesh.names("runtime")[0] in await mesh.mesh("pods")


async def test_commands_in_a_pod_find_the_port(mesh: Installed) -> None:
    """The documented commands in a router's pod use the port for management by themselves."""
    made = mesh.typed("Who may do what", "mesh keys create").strip()
    await mesh.kube.until(
        lambda: Outsider(mesh, made).asked("PUT", f"{MODELS}/fraud%2Fde", MODEL, port=MANAGEMENT) == 201,
        "the key registers a model",
    )
    assert Outsider(mesh, made).asked("PUT", f"{MODELS}/fraud%2Fde", MODEL) == 404


# --- service accounts, which the API server reviews


def token(mesh: Installed, *, audience: str = "mesh") -> str:
    """Returns a token of the account `batch`."""
    return mesh.kube.kubectl("create", "token", "batch", f"--audience={audience}").strip()


async def test_without_the_right_to_review_tokens_no_token_is_accepted(mesh: Installed) -> None:
    """Without a ClusterRoleBinding, tokens are refused as long as the router may not review them. Doctor names the
    missing binding, and keys still work."""
    mesh.kube.kubectl("create", "serviceaccount", "batch")
    assert Outsider(mesh, token(mesh)).asked("GET", M0) == 503
    assert admin(mesh).asked("GET", M0) == 200
    expected = ("fail", "mesh", "tokens", "does not let this pod review tokens", "system:auth-delegator")
    await Visits(mesh, "--only", "mesh").until_said([expected])


async def test_a_reviewed_service_account_calls(mesh: Installed, cluster: Kube, binding: str, tmp_path: Path) -> None:
    """With the documented binding, and without a restart, the API server's answer identifies an account, which has the
    grants in the values. A token for another audience is refused."""
    pods = set(mesh.names("router"))
    await asyncio.to_thread(cluster.shell, binding)
    given = token(mesh)
    caller = Outsider(mesh, given)
    await mesh.kube.until(lambda: caller.asked("GET", M0) == 200, "the token is accepted")
    assert await caller.called("m0") == "OK"
    assert caller.asked("GET", f"{MODELS}/m0", port=MANAGEMENT) == 403
    assert Outsider(mesh, token(mesh, audience="another")).asked("GET", M0) == 401
    assert Outsider(mesh, given[:-8] + "AAAAAAAA").asked("GET", M0) == 401
    assert set(mesh.names("router")) == pods

    *_, create, whoami = documented.block("security.md", "Kubernetes service accounts")
    async with mesh.kube.forward("service/modelmesh-serving", MANAGEMENT) as port:
        lines = [create.put({"team-a": mesh.kube.namespace}), f"export MESH_ENDPOINT=localhost:{port}", whoami.text]
        told = await asyncio.to_thread(mesh.kube.shell, "\n".join(["set -e", *lines]), folder=tmp_path)
    assert f"serviceaccount:{mesh.kube.namespace}:batch" in told
    await Visits(mesh).until_said(())


async def test_a_deleted_account_is_refused(mesh: Installed, binding: str) -> None:
    """The router asks again about a token that it has accepted, and refuses the token once its account is deleted."""
    caller = Outsider(mesh, token(mesh))
    assert caller.asked("GET", M0) == 200
    mesh.kube.kubectl("delete", "serviceaccount", "batch")
    await mesh.kube.until(lambda: caller.asked("GET", M0) == 401, "the token is refused", timeout=REVIEWED)


# --- client certificates


@pytest.fixture(scope="module")
def authority() -> certificates.Authority:
    """The authority of clients' certificates."""
    return certificates.Authority()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def secure(
    mesh: Installed, authority: certificates.Authority, tmp_path_factory: pytest.TempPathFactory
) -> Installed:
    """The same mesh with TLS, which accepts certificates of clients."""
    trusted, pem = certificates.certificate(NAME, ends=timedelta(days=100))
    mesh.kube.apply(secret("edge", pair(pem)), secret("callers", {"ca.crt": authority.pem}))
    mesh.values["tls"] = {"secretName": "edge", "clientAuth": "optional", "clientCASecret": "callers"}
    mesh.helm("upgrade", "mesh")
    await mesh.ready(120.0)
    mesh.trust = tmp_path_factory.mktemp("trust") / "ca.pem"
    mesh.trust.write_bytes(trusted)
    return mesh


def certified(mesh: Installed, authority: certificates.Authority, name: x509.GeneralName) -> Outsider:
    """Returns a caller with a certificate for this name."""
    return Outsider(mesh, certificate=authority.issue(name, common_name="nobody"))


async def test_a_certificate_identifies_its_caller(secure: Installed, authority: certificates.Authority) -> None:
    """A caller has the grants of the names in its certificate, on all ports, over REST and gRPC, and no others."""
    scorer = certified(secure, authority, x509.DNSName(HOST))
    deployer = certified(secure, authority, x509.UniformResourceIdentifier(SPIFFE))
    nobody = certified(secure, authority, x509.DNSName("other.example.com"))
    for port in (8033, 8008, MANAGEMENT):
        assert [one.asked("GET", M0, port=port) for one in (scorer, deployer, nobody)] == [200, 403, 403]
    assert [await one.called("m0") for one in (scorer, deployer)] == ["OK", "PERMISSION_DENIED"]

    path = f"{MODELS}/team%2Fone"
    assert [one.asked("PUT", path, MODEL, port=MANAGEMENT) for one in (scorer, nobody, deployer)] == [403, 403, 201]
    assert await deployer.registered("team/two", port=MANAGEMENT) == "OK"
    assert await deployer.registered("another", port=MANAGEMENT) == "PERMISSION_DENIED"
    assert await deployer.registered("team/three", port=8033) == "UNIMPLEMENTED"


async def test_commands_present_a_certificate(secure: Installed, authority: certificates.Authority) -> None:
    """`mesh whoami` with a client certificate shows the name in the certificate."""
    assert secure.trust is not None
    deployer = certified(secure, authority, x509.UniformResourceIdentifier(SPIFFE))
    async with secure.kube.forward("service/modelmesh-serving", MANAGEMENT) as port:
        with deployer.files() as (certificate, key):
            options = f"--ca {secure.trust} --cert {certificate} --key {key} --endpoint https://{NAME}:{port}"
            told = await asyncio.to_thread(secure.kube.shell, f"mesh {options} whoami --json")
    assert f"cert:{SPIFFE}" in json.dumps(json.loads(told))


async def test_a_forged_certificate_is_refused(secure: Installed, authority: certificates.Authority) -> None:
    """Neither a header that claims a certificate nor a certificate of another authority identifies anybody."""
    pem = authority.issue(x509.DNSName(HOST))
    header = {"x-forwarded-client-cert": certificates.forwarded(pem).decode()}
    nobody = certified(secure, authority, x509.DNSName("other.example.com"))
    for port in (8008, MANAGEMENT):
        assert Outsider(secure).asked("GET", M0, port=port, headers=header) == 401
        assert nobody.asked("GET", M0, port=port, headers=header) == 403
        with pytest.raises((ssl.SSLError, ConnectionError)):
            certified(secure, certificates.Authority(), x509.DNSName(HOST)).asked("GET", M0, port=port)
    assert admin(secure).asked("GET", M0) == 200


async def test_nothing_is_missing_with_tls(secure: Installed) -> None:
    """Doctor reports no problem in the mesh with TLS and a port for management."""
    await Visits(secure).until_said(())


async def test_required_certificates(secure: Installed, authority: certificates.Authority) -> None:
    """With `tls.clientAuth=require`, clients without a certificate get no connection. Pods become ready as before."""
    over: dict[str, Any] = {"tls": {"clientAuth": "require"}}
    secure.helm("upgrade", "mesh", over=over)
    await secure.ready(120.0)
    for port in (8033, MANAGEMENT):
        with pytest.raises((ssl.SSLError, ConnectionError)):
            admin(secure).asked("GET", M0, port=port)
        assert certified(secure, authority, x509.DNSName(HOST)).asked("GET", M0, port=port) == 200
