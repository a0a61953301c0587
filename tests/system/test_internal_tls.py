"""Mutual TLS inside the mesh, with real processes: calls, cold starts, management, unknown clients, and a change of the
authority during calls."""

import asyncio
import itertools
import ssl
import subprocess
import sys

import grpc
import numpy as np
import pytest

from mesh.etcd import Etcd
from mesh.identity import Identity, rpc
from mesh.pb import agent_pb2, agent_pb2_grpc
from mesh.schema.keys import Keys
from mesh.schema.records import PodRecord
from mesh.wire.client import Lost, Pool
from tests.support.authority import Authority, Mounted
from tests.support.localmesh import Client, LocalMesh
from tests.support.waiting import until

DAY = 86400
ONE = np.ones((1, 1), np.float32)
TLS_ALERT = b"\x15"
PLAIN = (("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1))


async def records(mesh: LocalMesh) -> list[PodRecord]:
    etcd = Etcd(mesh.etcd.settings)
    try:
        keys = Keys(mesh.base)
        return [PodRecord.decode((await etcd.get(keys.pod(pod.name))).value) for pod in mesh.pods]
    finally:
        await etcd.close()


async def why_no_call(address: str, identity: Identity | None) -> str:
    """Returns the error of a call to a data port on a new connection, or an empty text if the call was answered."""
    pool = Pool(address, identity=identity, connect_timeout=5)
    try:
        await pool.call(b"/inference.GRPCInferenceService/ServerLive", (), b"\0\0\0\0\0", timeout=10)
        return ""
    except Lost as lost:
        return str(lost)
    finally:
        pool.abort()


async def why_no_answer(address: str, identity: Identity | None) -> str:
    """Returns the error of a call to a control port on a new connection, or an empty text if TLS succeeded and only the
    token was missing."""
    async with rpc.channel(address, PLAIN, identity) as channel:
        try:
            await agent_pb2_grpc.AgentStub(channel).Describe(agent_pb2.DescribeRequest(), timeout=10)
            return ""
        except grpc.aio.AioRpcError as error:
            return "" if "token" in (error.details() or "") else f"{error.code().name} {error.details()}"


async def expiry(mesh: LocalMesh, url: str) -> float:
    """Returns the seconds until the certificate expires, as a process reports them."""
    text = (await mesh.get(f"{url}/metrics")).body.decode()
    (line,) = [line for line in text.splitlines() if line.startswith("mesh_internal_certificate_expires_seconds ")]
    return float(line.split()[1])


@pytest.fixture
def authority() -> Authority:
    return Authority()


async def answered(host: str, port: int) -> bytes:
    """Returns all bytes that a port answers to a request in plain text."""
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(b"POST /inference.GRPCInferenceService/ModelInfer HTTP/1.1\r\nhost: x\r\nmm-model-id: m\r\n\r\n")
    said = b""
    try:
        async with asyncio.timeout(10):
            while more := await reader.read(4096):
                said += more
    except ConnectionError:
        pass
    finally:
        writer.close()
    return said


async def test_the_mesh_serves_and_strangers_are_refused(a_mesh, tmp_path):
    """With certificates from `mesh certificates`, registration, a cold start, calls over gRPC and REST and an
    explanation from the pods work over TLS. Clients without TLS, without a certificate or with one of another authority
    reach neither port of a pod."""
    folder = tmp_path / "tls"
    argv = [sys.executable, "-m", "mesh", "certificates", "--dir", str(folder)]
    made = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, timeout=60, check=False)
    assert made.returncode == 0, made.stderr
    trusted = (folder / "ca.crt").read_bytes()
    options = ["--internal-tls", str(folder)]
    async with a_mesh(pods=2, router_options=options, runtime_options=options, fake=True) as mesh:
        await mesh.register_fake("m", value=7)
        client = Client(mesh.channel())
        assert (await client.infer("m", x=ONE))[0].item() == 7
        body = {"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [1]}]}
        assert (await mesh.rest("POST", "/v2/models/m/infer", body)).json["outputs"][0]["data"] == [7]
        told = await mesh.rest("GET", "/mesh/v1/models/m/explain")
        assert told.status == 200, told.body

        ours = Identity(folder)
        other = Authority("other")
        stranger = Identity(Mounted.of(tmp_path / "stranger", other, trust=other.pem + trusted).path)
        nobody = ssl.create_default_context(cadata=trusted.decode())
        for record in await records(mesh):
            assert await why_no_call(record.data_address, ours) == ""
            assert await why_no_answer(record.control_address, ours) == ""
            for identity in (None, stranger):
                assert await why_no_call(record.data_address, identity)
                assert await why_no_answer(record.control_address, identity)
            for address in (record.data_address, record.control_address):
                host, port = address.split(":")
                reader, writer = await asyncio.open_connection(host, port, ssl=nobody, server_hostname="mesh.internal")
                with pytest.raises((ssl.SSLError, ConnectionError, EOFError)):
                    await asyncio.wait_for(reader.readexactly(1), 10)
                writer.close()
                said = await answered(host, int(port))
                assert said[:1] in (b"", TLS_ALERT), said
                assert len(said) < 16, "an alert says only that this is no TLS"
            assert 364 * DAY < await expiry(mesh, f"http://{record.probe_address}") <= 365 * DAY
        assert 364 * DAY < await expiry(mesh, mesh.probe_url()) <= 365 * DAY


@pytest.mark.long
async def test_an_authority_changes_under_calls(a_mesh, tmp_path, authority):
    """An authority is replaced in three steps, each taken by every process. No call or load fails meanwhile. At the
    end, the old authority's certificates are refused."""
    folders = {name: Mounted.of(tmp_path / name, authority) for name in ("router", "runtime")}
    new = Authority("new")
    async with a_mesh(
        pods=2,
        router_options=["--internal-tls", str(folders["router"].path)],
        runtime_options=["--internal-tls", str(folders["runtime"].path)],
        fake=True,
    ) as mesh:
        for number in range(12):
            await mesh.register_fake(f"m{number}", value=number)
        client = Client(mesh.channel())
        old = Identity(Mounted.of(tmp_path / "old", authority, trust=authority.pem + new.pem).path)
        pods = await records(mesh)
        failed: list[str] = []
        stop = asyncio.Event()
        calls = 0

        async def call(number: int) -> None:
            nonlocal calls
            while not stop.is_set():
                try:
                    (answer,) = await client.infer(f"m{number}", x=ONE)
                    assert answer.item() == number
                    calls += 1
                except grpc.aio.AioRpcError as error:
                    failed.append(f"m{number}: {error.code().name} {error.details()}")
                    return
                await asyncio.sleep(0.01)

        async def load() -> None:  # keeps agents busy with loads
            for number in itertools.count():
                if stop.is_set():
                    return
                try:
                    await mesh.register_fake(f"n{number}", size="64KiB", load="0.2s", now=True)
                except grpc.aio.AioRpcError as error:
                    failed.append(f"n{number}: {error.code().name} {error.details()}")
                    return

        callers = [asyncio.create_task(call(number)) for number in range(12)]
        callers.append(asyncio.create_task(load()))
        try:
            both = authority.pem + new.pem
            steps = ((authority, both), (new, both), (new, new.pem))
            for changes, (by, trust) in enumerate(steps, 1):
                for folder in folders.values():
                    folder.issue(by, trust=trust)
                before = calls

                def taken(changes: int = changes, before: int = before) -> bool:
                    processes = [*mesh.pods, *mesh.routers]  # a pod's model server too, a router's worker too
                    said = [program.log.read_text().count("TLS inside the mesh was replaced") for program in processes]
                    return calls > before + 100 and all(count >= 2 * changes for count in said)

                await until(taken, timeout=60, why=f"change {changes} is taken by all")
        finally:
            stop.set()
            await asyncio.gather(*callers)
        assert not failed
        for record in pods:
            assert await why_no_call(record.data_address, old)
            assert await why_no_answer(record.control_address, old)
            assert await why_no_call(record.data_address, Identity(folders["router"].path)) == ""


async def test_files_that_do_not_work_end_the_start(a_mesh, tmp_path, authority):
    """A certificate of another authority stops a router at its start, and a missing folder stops a pod. The error names
    the option and the reason."""
    folder = Mounted.of(tmp_path / "tls", authority, trust=Authority("other").pem)
    mesh = a_mesh(pods=1, router_options=["--internal-tls", str(folder.path)], runtime_options=["--internal-tls", "no"])
    for program, words in ((mesh.routers[0], "signed by"), (mesh.pods[0], "no/ca.crt")):
        program.start()
        await until(lambda program=program: program.process.poll() is not None, timeout=60, why="the process ends")
        assert program.process.returncode != 0
        text = " ".join(program.log.read_text().replace("│", " ").split())
        assert words in text
        assert "--internal-tls" in text
