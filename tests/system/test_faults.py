"""Deaths of processes and of etcd: resident models are still served, lost copies are loaded again, and no answer is
wrong."""

import asyncio
import os
import signal
from collections import Counter

import grpc
import numpy as np
import pytest

from tests.support import models
from tests.support.localmesh import LEASE_TTL, PAUSE, Client, LocalMesh, children, command, freeze, thaw
from tests.support.waiting import until

ONE = np.ones((1, 1), np.float32)


class Traffic:
    """Calls of models that each answer their own number, made until the block ends; every answer is checked."""

    def __init__(self, mesh: LocalMesh, count: int, *, prefix: str = "m", callers: int = 4) -> None:
        self.mesh = mesh
        self.count = count
        self.prefix = prefix
        self.callers = callers
        self.answers = 0
        self.wrong: list[str] = []
        self.errors: Counter[tuple[str, str]] = Counter()
        self._stop = False
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Traffic":
        for number in range(self.count):
            await self.mesh.register(f"{self.prefix}{number}", models.constant(float(number)), load=True)
        for caller in range(self.callers):
            client = Client(self.mesh.channel(caller % len(self.mesh.routers)))
            self._tasks.append(asyncio.create_task(self._call(client, caller)))
        return self

    async def _call(self, client: Client, caller: int) -> None:
        number = caller
        while not self._stop:
            number = (number + 1) % self.count
            try:
                (answer,) = await client.infer(f"{self.prefix}{number}", x=ONE)
            except grpc.aio.AioRpcError as error:
                self.errors[error.code().name, error.details() or ""] += 1
                await asyncio.sleep(0.01)
                continue
            self.answers += 1
            if answer.item() != number:
                self.wrong.append(f"model {number} answered {answer.item()}")
            await asyncio.sleep(PAUSE)

    async def some(self, answers: int = 200, why: str = "traffic goes on") -> None:
        goal = self.answers + answers
        await until(lambda: self.answers >= goal, timeout=40, why=f"{why}; errors {self.errors}")

    async def __aexit__(self, *_: object) -> None:
        self._stop = True
        await asyncio.gather(*self._tasks)
        assert not self.wrong


async def loads(mesh: LocalMesh) -> dict[str, float]:
    """Returns the number of loads of each incarnation of a pod."""
    found = {}
    for pod in (await mesh.rest("GET", "/mesh/v1/pods")).json["pods"]:
        text = (await mesh.get(f"http://{pod['probe']}/metrics")).body.decode()
        (line,) = [line for line in text.splitlines() if line.startswith("modelmesh_loadmodel_milliseconds_count")]
        found[pod["incarnation"]] = float(line.split()[-1])
    return found


async def test_a_pod_killed_is_replaced_by_the_others(a_mesh):
    """After a `kill -9` of an agent, which ends its server too, other pods load its models. Once they have, no call
    fails. No answer is wrong."""
    async with a_mesh(pods=3) as mesh, Traffic(mesh, 12) as traffic:
        await traffic.some()
        victim = mesh.pods[0]
        server = mesh.server_pid(victim)
        victim.kill9()
        await until(lambda: not os.path.exists(f"/proc/{server}"), why="the model server died with its agent")
        traffic.errors.clear()

        async def all_elsewhere() -> bool:
            states = [await mesh.status(f"m{number}") for number in range(12)]
            return all(s["status"] == "LOADED" and s["copies"][0]["pod"] != victim.name for s in states)

        await until(all_elsewhere, timeout=LEASE_TTL * 4 + 20, interval=0.2, why="every model lives elsewhere")
        traffic.errors.clear()
        await traffic.some()
        assert not traffic.errors
        victim.start()
        await mesh.ready()
        await traffic.some()
        assert not traffic.errors


async def single_copies(mesh):
    """Prevents further copies of hot models, so that every counted load is an unwanted one."""
    reply = await mesh.rest("PUT", "/mesh/v1/settings/type_limits", {"_default": {"max": 1}})
    assert reply.status == 200

    async def settled() -> bool:
        found = [await mesh.status(f"m{number}") for number in range(8)]
        return all(len(status["copies"]) == 1 for status in found)

    await until(settled, timeout=60, interval=0.3, why="each model has a single copy")


async def test_etcd_killed_and_restarted(a_mesh_of_its_own):
    """No call of a resident model fails and nothing is loaded again while etcd is killed and restarted. Registrations
    fail with 503 meanwhile, and succeed when etcd is back."""
    async with a_mesh_of_its_own(pods=2) as mesh, Traffic(mesh, 8) as traffic:
        await single_copies(mesh)
        await traffic.some()
        before = await loads(mesh)
        mesh.etcd.kill9()
        await traffic.some(400, "etcd is away")
        reply = await mesh.rest("PUT", "/mesh/v1/models/late", {"type": "onnx", "path": "file:///x"})
        assert (reply.status, reply.json["reason"]) == (503, "REGISTRY_AWAY")
        unknown = await mesh.rest("POST", "/v2/models/unknown/infer", {"inputs": []})
        assert unknown.status == 503
        await mesh.etcd.start()

        answers = []

        async def registered() -> bool:
            reply = await mesh.rest("PUT", "/mesh/v1/models/late", {"type": "onnx", "path": "file:///x"})
            answers.append(reply.body)
            return reply.status < 300

        await until(registered, timeout=40, interval=0.2, why=lambda: f"registration works again: {answers[-1]!r}")
        await traffic.some(400, "etcd is back")
        assert not traffic.errors
        assert await loads(mesh) == before


@pytest.mark.long
async def test_etcd_frozen_for_three_lease_times(a_mesh_of_its_own):
    """When etcd freezes for three lease times, all leases expire as soon as it continues. No call fails, nothing is
    loaded again, and the pods publish themselves again."""
    async with a_mesh_of_its_own(pods=3) as mesh, Traffic(mesh, 9) as traffic:
        await single_copies(mesh)
        await traffic.some()
        before = await loads(mesh)
        mesh.etcd.freeze()
        try:
            frozen = asyncio.get_running_loop().time()
            await until(lambda: asyncio.get_running_loop().time() - frozen > 3 * LEASE_TTL, timeout=60)
            await traffic.some(200, "etcd is frozen")
        finally:
            mesh.etcd.thaw()
        await traffic.some(400, "etcd goes on")
        await mesh.ready()

        async def published() -> bool:
            found = [await mesh.status(f"m{number}") for number in range(9)]
            return all(status["status"] == "LOADED" for status in found)

        await until(published, timeout=30, interval=0.2, why="the copies are published again")
        await traffic.some(200)
        assert not traffic.errors
        assert await loads(mesh) == before


async def test_the_model_server_killed(a_mesh):
    """After the model server is killed the agent starts another one, and the models are served again."""
    async with a_mesh(pods=1) as mesh, Traffic(mesh, 6) as traffic:
        await traffic.some()
        old = mesh.server_pid(mesh.pods[0])
        os.kill(old, signal.SIGKILL)
        await traffic.some(400, "the server is back")
        assert mesh.server_pid(mesh.pods[0]) != old
        traffic.errors.clear()
        await traffic.some(200)
        assert not traffic.errors


@pytest.mark.long
async def test_the_only_worker_killed(a_mesh):
    """When the only worker is killed, its calls in flight may be lost. Calls that arrive before its successor starts
    wait for it."""
    async with a_mesh(pods=1, router_options=["--workers", "1"]) as mesh, Traffic(mesh, 4) as traffic:
        await traffic.some()
        (worker,) = [pid for pid in children(mesh.routers[0].pid) if "router.process.worker" in command(pid)]
        os.kill(worker, signal.SIGKILL)
        await traffic.some(300)
        assert sum(traffic.errors.values()) <= traffic.callers
        assert {code for code, _ in traffic.errors} <= {"UNAVAILABLE"}


@pytest.mark.long
async def test_a_worker_killed(a_mesh):
    """After one of two workers is killed, the router pod starts another one. Callers are answered meanwhile, and calls
    fail with no status but UNAVAILABLE."""
    async with a_mesh(pods=1, router_options=["--workers", "2"]) as mesh, Traffic(mesh, 4) as traffic:
        await traffic.some()
        workers = [pid for pid in children(mesh.routers[0].pid) if "router.process.worker" in command(pid)]
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)

        def two_again() -> bool:
            alive = [pid for pid in children(mesh.routers[0].pid) if "router.process.worker" in command(pid)]
            return len(alive) == 2 and workers[0] not in alive

        await until(two_again, timeout=20, why="another worker is ready")
        await traffic.some(300)
        assert {code for code, _ in traffic.errors} <= {"UNAVAILABLE"}


@pytest.mark.long
async def test_nothing_outlives_a_router_killed(a_mesh):
    """After a `kill -9` of the router pod its workers and its Envoy end too."""
    async with a_mesh(pods=1) as mesh:
        below = children(mesh.routers[0].pid)
        assert len(below) >= 2
        mesh.routers[0].kill9()
        await until(
            lambda: not [pid for pid in below if os.path.exists(f"/proc/{pid}")], why="the router's children are gone"
        )
        mesh.routers[0].start()
        await mesh.ready()


@pytest.mark.long
async def test_a_frozen_model_server_is_replaced(a_mesh):
    """A model server that hangs is killed and replaced. Callers who retry after their deadlines get the new server's
    answer."""
    async with a_mesh(pods=1) as mesh:
        await mesh.register("m", models.constant(5.0), load=True)
        old = mesh.server_pid(mesh.pods[0])
        freeze(old)
        try:
            client = Client(mesh.channel())

            async def answered() -> bool:
                try:
                    (answer,) = await client.infer("m", x=ONE, timeout=2)
                except grpc.aio.AioRpcError as error:
                    if error.code() not in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE):
                        raise
                    return False
                return answer.item() == 5.0

            await until(answered, timeout=60, why="another server answers")
            assert mesh.server_pid(mesh.pods[0]) != old
        finally:
            if os.path.exists(f"/proc/{old}"):
                thaw(old)


async def test_a_model_that_kills_servers_is_quarantined(a_mesh):
    """A request during which a server dies is never sent again, and the third one that kills a server is the last. The
    model is quarantined, its callers are told why, and other models are unaffected."""
    async with a_mesh(pods=2) as mesh:
        await mesh.register("good", models.constant(1.0), load=True)
        await mesh.register("killer", models.slow(), load=True)
        client = Client(mesh.channel())
        for deaths in (1, 2, 3):
            call = asyncio.create_task(client.infer("killer", timeout=40, **models.slow_inputs(20.0 + deaths)))

            async def running() -> str:
                for pod in mesh.pods:
                    found = (await mesh.rest("GET", f"/mesh/v1/pods/{pod.name}")).json
                    for copy in found.get("copies", ()):
                        if copy["model_id"] == "killer" and copy["in_flight"]:
                            return pod.name
                return ""

            name = await until(running, timeout=20, interval=0.05, why="the call runs in some pod")
            (pod,) = [pod for pod in mesh.pods if pod.name == name]
            os.kill(mesh.server_pid(pod), signal.SIGSEGV)

            async def noticed(deaths: int = deaths) -> bool:
                return len((await mesh.status("killer"))["killed"]) == deaths

            await until(noticed, timeout=20, why="the death is in the record")
            assert (await mesh.status("killer"))["quarantined"] is (deaths == 3)
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call
            # The first request is not sent again because the record names it, the others because two servers have died.
            code = grpc.StatusCode.FAILED_PRECONDITION if deaths == 1 else grpc.StatusCode.UNAVAILABLE
            assert error.value.code() is code, error.value
        reply = await mesh.rest("POST", "/v2/models/killer/infer", {"inputs": []})
        assert (reply.status, reply.json["reason"]) == (503, "QUARANTINED")
        (answer,) = await client.infer("good", x=ONE)
        assert answer.item() == 1.0
        assert (await mesh.rest("POST", "/mesh/v1/models/killer/release")).status == 200
        assert not (await mesh.status("killer"))["quarantined"]
