"""TLS for clients, with real processes: REST, gRPC and the command line, mutual TLS, and a changed certificate."""

import asyncio
import http.client
import os
import ssl
import subprocess
import sys

import grpc
import numpy as np

from mesh.pb import modelmesh_pb2, modelmesh_pb2_grpc
from tests.support import models
from tests.support.certificates import HOUR, certificate
from tests.support.localmesh import Client
from tests.support.waiting import until

ONE = np.ones((1, 1), np.float32)


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
    """Existing connections continue when the certificate changes, new connections get the new certificate, and calls
    without TLS are not answered."""
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
    """With an authority for clients, only clients with a certificate signed by it are answered."""
    authority, both = certificate("127.0.0.1")
    put(tmp_path / "ca.crt", authority)
    put(tmp_path / "both.pem", both)
    trust = ssl.create_default_context(cadata=authority.decode())
    trust.load_cert_chain(tmp_path / "both.pem")
    pem = str(tmp_path / "both.pem")
    options = ["--tls-cert", pem, "--tls-key", pem, "--tls-client-ca", str(tmp_path / "ca.crt")]
    async with a_mesh(pods=1, router_options=options, trust=trust) as mesh:
        assert (await mesh.rest("GET", "/mesh/v1/pods")).status == 200
        words = ["--endpoint", mesh.rest_url(), "--ca", str(tmp_path / "ca.crt")]
        told = await asyncio.to_thread(command_line, *words, "--cert", pem, "pods")
        assert told.returncode == 0, told.stderr
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
    """An unusable certificate stops the router at its start with the file's name; the router does not wait for a better
    one."""
    (tmp_path / "tls.crt").write_text("no certificate")
    argv = [sys.executable, "-m", "router", "--listen", "127.0.0.1:0", "--probe", "127.0.0.1:0"]
    argv += ["--etcd", a_mesh(pods=0).etcd.endpoint, "--base", "test/tls"]
    argv += ["--tls-cert", str(tmp_path / "tls.crt"), "--tls-key", str(tmp_path / "missing.key")]
    told = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == 1
    assert "tls.crt" in told.stderr
    assert "Traceback" not in told.stderr
