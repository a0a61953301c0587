"""TLS for clients, with real processes: REST, gRPC and the command line, mutual TLS, and a changed certificate."""

import asyncio
import http.client
import os
import ssl
import subprocess
import sys

import grpc
import numpy as np
from cryptography import x509

from mesh.pb import modelmesh_pb2, modelmesh_pb2_grpc
from mesh.v2 import SERVICE
from tests.support import models
from tests.support.certificates import HOUR, Authority, certificate, forwarded, named
from tests.support.localmesh import Client, infer_request
from tests.support.waiting import until

ONE = np.ones((1, 1), np.float32)
SCORER = "spiffe://example.com/ns/team-a/sa/scorer"
CLIENTS = {
    "scorer": [x509.UniformResourceIdentifier(SCORER)],
    "lister": [x509.DNSName("lister.example.com")],
    "stranger": [x509.DNSName("stranger.example.com")],
    "server": [named("127.0.0.1")],
}
"""The names in the certificates of clients; the last one has none that could identify it."""


def put(path, content: bytes) -> None:
    """Replaces a file atomically, as Kubernetes and cert-manager do."""
    new = path.with_name(path.name + ".new")
    new.write_bytes(content)
    os.replace(new, path)


def command_line(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mesh", *words], capture_output=True, text=True, timeout=60, check=False
    )


async def test_clients_call_over_tls_and_the_certificate_changes_under_them(a_mesh, tmp_path):
    """Existing connections continue when the certificate changes, and new connections get the new certificate, but
    never an expired one. Calls without TLS are not answered."""
    folder = tmp_path / "tls"
    folder.mkdir()
    authority, server = certificate("127.0.0.1")
    put(folder / "ca.crt", authority)
    put(folder / "tls.pem", server)
    trust = ssl.create_default_context(cadata=authority.decode())
    options = ["--tls-cert", str(folder / "tls.pem"), "--tls-key", str(folder / "tls.pem")]
    async with a_mesh(pods=1, router_options=options, trust=trust) as mesh:
        channel = grpc.aio.secure_channel(mesh.grpc_address(), grpc.ssl_channel_credentials(authority))
        mesh.channels.append(channel)
        path = mesh.write("m.onnx", models.constant(7.0))
        info = modelmesh_pb2.ModelInfo(type="onnx", path=path.as_uri())
        stub = modelmesh_pb2_grpc.ModelMeshStub(channel)
        await stub.registerModel(modelmesh_pb2.RegisterModelRequest(modelId="m", modelInfo=info), timeout=30)
        client = Client(channel)
        assert (await client.infer("m", x=ONE))[0].item() == 7

        url = mesh.rest_url()
        told = await asyncio.to_thread(command_line, "--endpoint", url, "--ca", str(folder / "ca.crt"), "infer", "m")
        assert told.returncode == 0, told.stderr
        told = await asyncio.to_thread(command_line, "--endpoint", url, "ls")
        assert told.returncode != 0
        assert "--ca" in told.stderr
        plain = await asyncio.to_thread(command_line, "--endpoint", url.replace("https", "http"), "ls")
        assert plain.returncode != 0

        host, port = mesh.grpc_address().split(":")
        kept = http.client.HTTPSConnection(host, int(port), context=trust, timeout=30)

        def get() -> int:
            kept.request("GET", "/v2/health/ready")
            answer = kept.getresponse()
            answer.read()
            return answer.status

        def shown() -> str:
            return ssl.get_server_certificate((host, int(port)), timeout=10)

        assert await asyncio.to_thread(get) == 200
        sock = kept.sock
        before = await asyncio.to_thread(shown)

        async def says(metric: str) -> bool:
            return metric in (await mesh.get(f"{mesh.probe_url()}/metrics")).body.decode()

        _, ended = certificate("127.0.0.1", ends=-HOUR)
        put(folder / "tls.pem", ended)
        await until(lambda: says("mesh_edge_certificate_refused 1"), timeout=20, interval=0.1)
        assert await asyncio.to_thread(shown) == before, "an expired certificate is not shown"
        assert not await says("mesh_edge_certificate_expires_seconds -")
        authority, server = certificate("127.0.0.1")
        put(folder / "tls.pem", server)

        async def changed() -> bool:
            return await asyncio.to_thread(shown) != before

        await until(changed, timeout=20, interval=0.1)
        assert await asyncio.to_thread(get) == 200
        assert kept.sock is sock, "the connection was kept"
        assert (await client.infer("m", x=ONE))[0].item() == 7
        kept.close()
        mesh.trust = ssl.create_default_context(cadata=authority.decode())
        assert (await mesh.rest("GET", "/mesh/v1/pods")).status == 200


async def test_clients_show_who_they_are(a_mesh, tmp_path):
    """With an authority for clients, only clients with a certificate of this authority are answered. The names in the
    certificate identify the client, whatever its requests say."""
    authority = Authority()
    put(tmp_path / "ca.crt", authority.pem)
    for name, names in CLIENTS.items():
        put(tmp_path / f"{name}.pem", authority.issue(*names))
    put(tmp_path / "admin.key", b"a" * 40)

    def trust(name: str) -> ssl.SSLContext:
        context = ssl.create_default_context(cadata=authority.pem.decode())
        context.load_cert_chain(tmp_path / f"{name}.pem")
        return context

    pem = str(tmp_path / "server.pem")
    options = ["--tls-cert", pem, "--tls-key", pem, "--tls-client-ca", str(tmp_path / "ca.crt")]
    options += ["--auth", "required", "--admin-key-file", str(tmp_path / "admin.key")]
    async with a_mesh(pods=1, router_options=options, trust=trust("server"), key="a" * 40) as mesh:
        path = mesh.write("m.onnx", models.constant(7.0))
        assert (await mesh.rest("PUT", "/mesh/v1/models/m", {"type": "onnx", "path": path.as_uri()})).status == 201
        for role, subject in (("infer", f"cert:{SCORER}"), ("read", "cert:lister.example.com")):
            grant = {"role": role, "models": ["*"], "to": [subject]}
            assert (await mesh.rest("PUT", f"/mesh/v1/grants/{role}", grant)).status == 201

        forged = forwarded((tmp_path / "scorer.pem").read_bytes()).decode()
        host, port = mesh.grpc_address().split(":")

        def asked(name: str, path: str, **headers: str) -> int:
            connection = http.client.HTTPSConnection(host, int(port), context=trust(name), timeout=30)
            connection.request("GET", path, headers={"X-Forwarded-Client-Cert": forged, **headers})
            return connection.getresponse().status

        async def inferred(name: str) -> str:
            files = (tmp_path / f"{name}.pem").read_bytes()
            channel = grpc.aio.secure_channel(
                f"{host}:{port}", grpc.ssl_channel_credentials(authority.pem, files, files)
            )
            mesh.channels.append(channel)
            try:
                infer = channel.unary_unary(f"/{SERVICE}/ModelInfer", lambda one: one.SerializeToString(), bytes)
                await infer(infer_request("m", x=ONE), metadata=[("x-forwarded-client-cert", forged)], timeout=30)
            except grpc.aio.AioRpcError as error:
                return error.code().name
            return "OK"

        async def known() -> bool:
            return await asyncio.to_thread(asked, "scorer", "/v2/models/m/ready") == 200

        await until(known, timeout=20, why="the grants are read")
        found = {
            name: [
                await asyncio.to_thread(asked, name, "/v2/models/m/ready"),
                await asyncio.to_thread(asked, name, "/mesh/v1/models/m"),
                await inferred(name),
            ]
            for name in CLIENTS
        }
        assert found == {
            "scorer": [200, 403, "OK"],
            "lister": [403, 200, "PERMISSION_DENIED"],
            "stranger": [403, 403, "PERMISSION_DENIED"],
            "server": [401, 401, "UNAUTHENTICATED"],
        }
        assert await asyncio.to_thread(asked, "scorer", "/v2/models/m/ready", Authorization="Bearer " + "x" * 40) == 401

        words = ["--endpoint", mesh.rest_url(), "--ca", str(tmp_path / "ca.crt")]
        told = await asyncio.to_thread(command_line, *words, "--cert", str(tmp_path / "lister.pem"), "whoami")
        assert told.returncode == 0, told.stderr
        assert "cert:lister.example.com" in told.stdout
        told = await asyncio.to_thread(command_line, *words, "pods")
        assert told.returncode != 0
        assert "Traceback" not in told.stderr


async def test_clients_may_show_who_they_are(a_mesh, tmp_path):
    """When client certificates are optional, clients without one are answered, and clients with a certificate of
    another authority are not."""
    authority, both = certificate("127.0.0.1")
    _, strange = certificate("127.0.0.1")
    put(tmp_path / "ca.crt", authority)
    put(tmp_path / "both.pem", both)
    put(tmp_path / "strange.pem", strange)
    pem = str(tmp_path / "both.pem")
    options = ["--tls-cert", pem, "--tls-key", pem, "--tls-client-ca", str(tmp_path / "ca.crt")]
    trust = ssl.create_default_context(cadata=authority.decode())
    async with a_mesh(pods=1, router_options=[*options, "--tls-client-auth", "optional"], trust=trust) as mesh:
        words = ["--endpoint", mesh.rest_url(), "--ca", str(tmp_path / "ca.crt")]
        for shown, answered in (
            ([], True),
            (["--cert", pem], True),
            (["--cert", str(tmp_path / "strange.pem")], False),
        ):
            told = await asyncio.to_thread(command_line, *words, *shown, "pods")
            assert (told.returncode == 0) is answered, told.stderr
            assert "Traceback" not in told.stderr


async def test_options_that_do_not_go_together_are_refused(tmp_path):
    """TLS options that contradict each other are refused before anything starts, and the error names the option."""
    pem = str(tmp_path / "tls.pem")
    cases = (
        (["--tls-client-auth", "require"], "--tls-client-ca"),
        (["--tls-cert", pem, "--tls-key", pem, "--tls-client-ca", pem, "--tls-client-auth", "none"], "neither"),
    )
    for options, words in cases:
        argv = [sys.executable, "-m", "router", *options]
        told = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, timeout=60, check=False)
        assert told.returncode == 2
        assert words in told.stderr
        assert "--tls-client-auth" in told.stderr


async def test_a_certificate_that_cannot_work_is_told_at_the_start(a_mesh, tmp_path):
    """An unusable certificate stops the router at its start, with an error that names the file."""
    (tmp_path / "tls.crt").write_text("no certificate")
    argv = [sys.executable, "-m", "router", "--listen", "127.0.0.1:0", "--probe", "127.0.0.1:0"]
    argv += ["--etcd", a_mesh(pods=0).etcd.endpoint, "--base", "test/tls"]
    argv += ["--tls-cert", str(tmp_path / "tls.crt"), "--tls-key", str(tmp_path / "missing.key")]
    told = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == 1
    assert "tls.crt" in told.stderr
    assert "Traceback" not in told.stderr
