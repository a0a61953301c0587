"""Essential duties: long-lived tasks without which a process cannot continue. When one ends, its process gives the
reason in its last log line and ends, and a new process serves calls. The tests restart what Kubernetes or `mesh up`
would restart."""

import asyncio
import os
import re
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import grpc
import numpy as np
import pytest

import mesh.envoy.duties
import mesh.local.duties
import mesh.runtime.duties
import router.process.duties
from mesh.local.duties import UP
from mesh.process import free_port, tethered
from mesh.process.tasks import Duty
from mesh.runtime.duties import AGENT, BESIDE_FOREIGN, RELAYS, RELAYS_TO_ONE_LOOP, SERVERS
from router.process.duties import LEADER, POD, WORKERS
from tests.support import sabotage
from tests.support.certificates import certificate
from tests.support.fakemlserver import FakeMLServer
from tests.support.foreign import ForeignMesh, answered, child_of
from tests.support.localmesh import Client, LocalMesh, Program, children, command
from tests.support.waiting import until

ONE = np.ones((1, 1), np.float32)
HOWS = ("raise", "cancel", "end")
SAYS = {"raise": "failed: RuntimeError: sabotaged", "cancel": "was cancelled", "end": "ended"}

WHICH = {"follow etcd": ("presence", "config"), "keep worker": ("0",)}
"""The duties of which a process has several, with the names that distinguish them."""


def essential(table: Iterable[Duty]) -> list[tuple[str, str]]:
    """Returns the names of a table's essential duties, each paired with one of the ways to die."""
    names = [
        f"{duty.name} {which}".rstrip() for duty in table if duty.essential for which in WHICH.get(duty.name, ("",))
    ]
    return [(name, HOWS[number % len(HOWS)]) for number, name in enumerate(names)]


class Mesh:
    """A mesh whose duties obey the test's orders. It uses TLS inside and at its edge, so that every duty runs."""

    def __init__(self, local: LocalMesh, orders: Path, client: Client) -> None:
        self.local = local
        self.client = client
        self._orders = orders

    def order(self, process: str, name: str, how: str) -> None:
        new = self._orders / "new"
        new.write_text(how)
        os.replace(new, self._orders / f"{process} {name}")

    async def serves(self) -> None:
        async def answered() -> bool:
            try:
                (answer,) = await self.client.infer("m", x=ONE, timeout=5)
            except grpc.aio.AioRpcError as error:
                if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    raise
                return False
            return answer.item() == 7.0

        await until(answered, timeout=40, interval=0.1, why="a call is answered")

    @property
    def worker(self) -> int:
        """The process id of the only worker, or 0 if none runs."""
        return next((pid for pid in children(self.local.routers[0].pid) if "process.worker" in command(pid)), 0)

    @property
    def server(self) -> int:
        """The process id of the only model server, or 0 if none runs."""
        return next((pid for pid in children(self.local.pods[0].pid) if "twin" in command(pid)), 0)


def obey(orders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes processes that start from now on take orders from that folder."""
    orders.mkdir()
    monkeypatch.setenv("MESH_SABOTAGE", str(orders))
    former = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (sabotage.__path__[0], former))))


@pytest.fixture
async def mesh_of_duties(a_mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Mesh]:
    orders, inside, edge = tmp_path / "orders", tmp_path / "inside", tmp_path / "edge.pem"
    obey(orders, monkeypatch)
    argv = [sys.executable, "-m", "mesh", "certificates", "--dir", str(inside)]
    await asyncio.to_thread(subprocess.run, argv, check=True, capture_output=True, timeout=60)
    authority, server = certificate("127.0.0.1")
    edge.write_bytes(server)
    options = ["--internal-tls", str(inside)]
    router_options = [*options, "--workers", "1", "--tls-cert", str(edge), "--tls-key", str(edge)]
    trust = ssl.create_default_context(cadata=authority.decode())
    async with a_mesh(
        pods=1, router_options=router_options, runtime_options=options, trust=trust, fake=True, log_level="info"
    ) as local:
        channel = grpc.aio.secure_channel(local.grpc_address(), grpc.ssl_channel_credentials(authority))
        local.channels.append(channel)
        monkeypatch.setattr(local, "channel", lambda router=0: channel)
        await local.register_fake("m", value=7)
        made = Mesh(local, orders, Client(channel))
        await made.serves()
        yield made


def last_line(program: Program, process: str) -> str:
    """Returns the last log line of a process. `program` is the process or the parent that passes on its output."""
    lines = [line for line in program.tail(200).splitlines() if re.match(rf"\S+ \w+ +{process}:", line)]
    return lines[-1]


async def ended(program: Program, process: str, name: str, how: str) -> None:
    """Waits until the process has ended and given that reason, and starts it again."""
    assert program.process is not None
    assert await asyncio.to_thread(program.process.wait, 40) == 1, program.tail()
    says_why(last_line(program, process), name, how)
    program.start()


def says_why(line: str, name: str, how: str) -> None:
    assert f"the task '{name}', which this process cannot do without, {SAYS[how]}".replace("'", "") in line.replace(
        "\\", ""
    ).replace("'", ""), line


def test_every_duty_is_in_one_of_the_tables() -> None:
    """The tests of this file go through tables of duties. A duty in none of them, for example one that runs only beside
    a foreign server, would never be tested."""
    modules = (mesh.envoy.duties, mesh.local.duties, mesh.runtime.duties, router.process.duties)
    defined = {duty for module in modules for duty in vars(module).values() if isinstance(duty, Duty)}
    assert defined == {*POD, *LEADER, *WORKERS, *AGENT, *SERVERS, *RELAYS, *BESIDE_FOREIGN, *RELAYS_TO_ONE_LOOP, *UP}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("most", [pytest.param(1, id="one"), pytest.param(None, id="every", marks=pytest.mark.long)])
async def test_the_end_of_an_essential_duty_ends_its_process(mesh_of_duties: Mesh, most: int | None) -> None:
    """The test ends duties of the router pod and of the agent in turn, then duties of their children: one duty of each
    process, or all of them."""
    mesh, local = mesh_of_duties, mesh_of_duties.local
    agents = essential(AGENT)[:most]
    routers = essential(POD)[:most]
    for number in range(max(len(agents), len(routers))):
        rounds = []
        for process, table, programs in (("agent", agents, local.pods), ("router", routers, local.routers)):
            if number < len(table):
                mesh.order(process, *table[number])
                rounds.append(ended(programs[0], process, *table[number]))
        await asyncio.gather(*rounds)
        await local.ready()
        await mesh.serves()
    workers = essential(WORKERS)[:most]
    servers = essential(SERVERS)[:most]
    for number in range(max(len(workers), len(servers))):
        before = mesh.worker, mesh.server
        if number < len(workers):
            mesh.order("worker", *workers[number])
            await until(lambda: mesh.worker not in (0, before[0]), timeout=30, why=f"after {workers[number]}")  # noqa: B023
            says_why(last_line(local.routers[0], "worker0"), *workers[number])
        if number < len(servers):
            mesh.order("server", *servers[number])
            await until(lambda: mesh.server not in (0, before[1]), timeout=30, why=f"after {servers[number]}")  # noqa: B023
            says_why(last_line(local.pods[0], "model-server"), *servers[number])
        await mesh.serves()


@pytest.mark.long
@pytest.mark.timeout(300)
async def test_the_end_of_any_duty_of_a_relay_loses_no_model(
    tmp_path: Path, etcd_server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When any essential duty of a relay ends, the relay gives the reason and ends, and the next relay continues with
    the copies. If the agent's own duty beside a foreign server ends, the agent ends."""
    obey(orders := tmp_path / "orders", monkeypatch)
    argv = [sys.executable, "-m", "mesh", "certificates", "--dir", str(inside := tmp_path / "inside")]
    await asyncio.to_thread(subprocess.run, argv, check=True, capture_output=True, timeout=60)
    options = ["--internal-tls", str(inside)]
    more = {"router_options": options, "runtime_options": options, "log_level": "info"}
    async with ForeignMesh(tmp_path, etcd_server, egress="envoy", **more) as it:
        await it.register("m", now=True)
        mesh = it.mesh
        for name, how in essential(RELAYS):
            before = child_of(mesh, "mesh.runtime.relay")
            (orders / "new").write_text(how)
            os.replace(orders / "new", orders / f"relay {name}")
            await until(lambda: child_of(mesh, "mesh.runtime.relay") not in (0, before), timeout=40, why=name)  # noqa: B023
            says_why(last_line(mesh.pods[0], "relay"), name, how)
            assert dict((await answered(it, "m")).results) == {"m": "hello"}
        assert it.noted("load m") == it.noted("status") == 1
        ((name, how),) = essential(BESIDE_FOREIGN)
        (orders / "new").write_text(how)
        os.replace(orders / "new", orders / f"agent {name}")
        await ended(mesh.pods[0], "agent", name, how)
        assert dict((await answered(it, "m")).results) == {"m": "hello"}


@pytest.mark.long
@pytest.mark.timeout(180)
async def test_the_end_of_a_duty_of_a_relay_to_one_event_loop_ends_the_relay(
    tmp_path: Path, etcd_server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When an additional duty of a relay to a server with one event loop ends, the relay gives the reason and ends."""
    obey(orders := tmp_path / "orders", monkeypatch)
    root = tmp_path / "server" / "models"
    root.mkdir(parents=True)
    async with FakeMLServer(root) as server:
        pod = ["--adapter", "mlserver", "--server", server.address, "--server-models", str(root.parent)]
        async with LocalMesh(tmp_path, etcd_server, pods=1, log_level="info", runtime_options=pod) as mesh:
            for name, how in essential(RELAYS_TO_ONE_LOOP):
                before = child_of(mesh, "mesh.runtime.relay")
                (orders / "new").write_text(how)
                os.replace(orders / "new", orders / f"relay {name}")
                await until(lambda: child_of(mesh, "mesh.runtime.relay") not in (0, before), timeout=40, why=name)  # noqa: B023
                says_why(last_line(mesh.pods[0], "relay"), name, how)


async def test_what_a_process_can_do_without_is_started_again(mesh_of_duties: Mesh) -> None:
    """An agent restarts its duties that are not essential. A duty of the leader that ends costs the leader its term,
    not its process."""
    mesh, local = mesh_of_duties, mesh_of_duties.local
    pids = local.pods[0].pid, local.routers[0].pid
    for duty in AGENT:
        if not duty.essential:
            mesh.order("agent", duty.name, "raise")
    for duty in LEADER:
        leads = local.routers[0].tail(200).count("this router leads name")
        mesh.order("router", duty.name, "raise")
        await until(
            lambda: local.routers[0].tail(200).count("this router leads name") > leads,  # noqa: B023
            timeout=30,
            why=f"it leads again, after {duty.name}",
        )
    again = "background task failed and is started again task={}"
    for duty in AGENT:
        if not duty.essential:
            told = again.format(duty.name if " " not in duty.name else f'"{duty.name}"')
            await until(lambda: told in local.pods[0].tail(200), why=told)  # noqa: B023
    await mesh.serves()
    assert (local.pods[0].pid, local.routers[0].pid) == pids
    assert [program.process.poll() for program in (*local.pods, *local.routers) if program.process] == [None, None]


@pytest.mark.long
@pytest.mark.timeout(180)
async def test_a_duty_that_hangs_ends_its_process(mesh_of_duties: Mesh) -> None:
    """A duty that hangs ends its process, even while the process's event loop still runs and its heartbeat
    continues."""
    mesh, local = mesh_of_duties, mesh_of_duties.local
    before = mesh.worker
    mesh.order("worker", "tick", "hang")
    await until(lambda: mesh.worker not in (0, before), timeout=60, interval=0.2, why="the worker is replaced")
    assert "tick" in (line := last_line(local.routers[0], "worker0"))
    assert "hangs: it should turn at least every 15 s" in line
    await mesh.serves()


async def test_mesh_up_ends_where_it_keeps_a_part_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When `mesh up` cannot keep one of its processes running, it ends all of them and itself, and says why in its last
    line."""
    orders = tmp_path / "orders"
    obey(orders, monkeypatch)
    argv = [sys.executable, "-P", "-m", "mesh", "up", "--listen", f"127.0.0.1:{free_port()}", "--pods", "1"]
    argv += ["--probe", f"127.0.0.1:{free_port()}", "--data-dir", str(tmp_path / "data"), "--no-samples"]
    log = tmp_path / "up.log"
    with log.open("wb") as out:
        up = subprocess.Popen(tethered(argv), stdout=out, stderr=out, stdin=subprocess.DEVNULL, cwd=tmp_path)
    try:
        await until(
            lambda: len(children(up.pid)) >= 3 and "curl" in log.read_text(), timeout=90, why="mesh up is ready"
        )
        below = children(up.pid)
        (duty,) = UP
        (orders / f"up {duty.name} etcd").write_text("raise")
        assert await asyncio.to_thread(up.wait, 60) == 1
        said = "the task 'keep etcd', which this process cannot do without, failed: RuntimeError: sabotaged"
        assert said in log.read_text().splitlines()[-1]
        assert not [pid for pid in below if command(pid)]
    finally:
        up.kill()
        up.wait(10)
