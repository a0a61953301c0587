"""Tests that need a separate pod, or two: shutdown, taken names, races, and an etcd that is unavailable."""

import asyncio
import hashlib
import os
import time
from pathlib import Path

import grpc
import pytest

from mesh.identity import rpc
from mesh.pb import agent_pb2
from mesh.process import free_port
from mesh.schema.keys import Keys
from mesh.schema.records import LEAVING
from mesh.wire import headers
from tests.support import models, twin
from tests.support.agent import AgentProcess, AnAgent
from tests.support.authority import Authority, Mounted
from tests.support.etcd import EtcdServer
from tests.support.waiting import until


async def test_a_full_disk_budget_makes_the_oldest_copies_go(an_agent: AnAgent) -> None:
    """With a disk budget of five files and enough memory, each of eight models is loaded, and the last five stay."""
    async with an_agent("--disk-budget", "5KiB", "--server-module", twin.MODULE) as pod:
        for number in range(8):
            folder = pod.models / f"m{number}"
            folder.mkdir()
            path = folder / twin.name(size="1MiB", value=number)
            path.write_bytes(os.urandom(1024))
            created = await pod.register_path(f"m{number}", str(path))
            reply = await pod.load(f"m{number}", created)
            assert reply.WhichOneof("outcome") == "loaded", reply
            assert (await pod.infer(f"m{number}", created)).value == number
        copies = (await pod.describe()).copies
        assert {copy.model_id for copy in copies} == {f"m{number}" for number in range(3, 8)}
        files = {(info := file.stat()).st_ino: info.st_size for file in (pod.model_dir / ".blobs").iterdir()}
        assert sum(files.values()) <= 5 << 10


@pytest.mark.long
async def test_two_pods_never_load_the_same_model_twice(an_agent: AnAgent) -> None:
    """When two pods are asked at the same time for each of ten models, one copy of each is made, and the losing pod
    names the winner."""
    async with an_agent() as one, an_agent(name="pod-2") as other:
        for number in range(10):
            name = f"m{number}"
            created = await one.register(name, models.constant(float(number)))
            replies = await asyncio.gather(one.load(name, created), other.load(name, created))
            outcomes = sorted(str(reply.WhichOneof("outcome")) for reply in replies)
            assert outcomes == ["elsewhere", "loaded"], replies
            winner = one if replies[0].WhichOneof("outcome") == "loaded" else other
            (loser,) = [reply for reply in replies if reply.WhichOneof("outcome") == "elsewhere"]
            assert loser.elsewhere.pod == winner.name
            assert (await winner.infer(name, created)).value == number

        # A pod that dies silently leaves nothing, and its name can be taken again at once.
        server = one.server_pid
        one.kill9()
        await until(lambda: not os.path.exists(f"/proc/{server}"), why="the server died with its agent")
        await one.start()
        created = await one.register("again", models.constant(5.0))
        assert (await one.load("again", created)).WhichOneof("outcome") == "loaded"

        async def swept() -> bool:
            return await one.copy("m0") is None or (await one.copy("m0")).incarnation == one.record.incarnation

        await until(swept, why="keys of the earlier life are gone")

        # Another agent with the same name.
        second = an_agent("--model-dir", str(one.models.parent / "twin"))
        await second.launch()
        assert await second.process.wait(30) == 1
        assert any("give each pod its own --name" in line for line in second.lines)
        assert (await one.published()).incarnation == one.record.incarnation
        await second.etcd.close()


async def test_two_first_loads_of_a_file_that_is_replaced_in_between(an_agent: AnAgent) -> None:
    """If a file is replaced between the pulls of two first loads, one load succeeds and the other is refused with both
    digests."""
    options = ("--server-module", twin.MODULE)
    async with an_agent(*options) as one, an_agent(*options, name="pod-2") as other:
        path = one.models / twin.name(gate="go")
        path.write_bytes(b"the first")
        created = await one.register_path("m", str(path))
        loads = []
        for pod, expected in ((one, 0), (other, 1)):
            loads.append(asyncio.create_task(pod.load("m", created, expected_copies=expected)))

            async def loading(pod: AgentProcess = pod) -> bool:
                return [copy.state for copy in (await pod.describe("m")).copies] == ["loading"]

            await until(loading, why=f"{pod.name} has pulled it and loads it")
            path.with_name("other").write_bytes(b"the second")
            path.with_name("other").replace(path)
        (one.model_dir.parent / "go").touch()
        replies = await asyncio.gather(*loads)
        assert sorted(str(reply.WhichOneof("outcome")) for reply in replies) == ["failed", "loaded"], replies
        failed = next(reply.failed for reply in replies if reply.HasField("failed"))
        loaded = next(reply.loaded for reply in replies if reply.HasField("loaded"))
        digests = {hashlib.sha256(content).hexdigest() for content in (b"the first", b"the second")}
        assert failed.reason == "CONTENT_CHANGED"
        assert all(digest in failed.text for digest in digests)
        assert (await one.model("m")).digest == loaded.digest
        copies = [copy for copy in (await one.copy("m"), await other.copy("m")) if copy is not None]
        assert [(copy.state, copy.digest) for copy in copies] == [("loaded", loaded.digest)]


@pytest.mark.long
async def test_a_name_is_taken_only_once_by_pods_that_speak_tls(an_agent: AnAgent, tmp_path: Path) -> None:
    """With mutual TLS, a pod whose name is taken asks the present holder for a sign of life, and gives up the name."""
    options = ("--internal-tls", str(Mounted.of(tmp_path / "tls", Authority()).path))
    async with an_agent(*options):
        second = an_agent(*options, "--model-dir", str(tmp_path / "twin"))
        await second.launch()
        assert await second.process.wait(30) == 1
        assert any("give each pod its own --name" in line for line in second.lines)
        assert not any("waiting for the lease" in line for line in second.lines), "the second pod had its answer"
        await second.etcd.close()


async def test_it_leaves_in_order(an_agent: AnAgent) -> None:
    """On SIGTERM a pod answers its calls in flight, refuses loads, removes all its keys, and exits with status 0."""
    async with an_agent() as pod:
        await pod.loaded("idle", models.constant(1.0))
        slow = await pod.loaded("slow", models.slow())
        call = asyncio.create_task(pod.infer("slow", slow, timeout=30, **models.slow_inputs(1.5)))

        async def runs() -> bool:
            return (await pod.describe("slow")).copies[0].in_flight == 1

        await until(runs, why="the call runs")
        late = await pod.register("late", models.constant(1.0))
        leaving = asyncio.create_task(pod.stop())

        async def said() -> bool:
            record = await pod.published()
            return record is None or record.state == LEAVING

        await until(said, why="the pod says that it is draining")
        if await pod.published() is not None:
            assert (await pod.load("late", late)).refused.reason == "UNAVAILABLE"
            assert (await pod.probe("/ready"))[0] == 503
        answer = await call
        assert answer.code == 0, answer
        assert await leaving == 0
        assert await pod.published() is None
        assert await pod.copy("idle") is None
        assert not os.path.exists(f"/proc/{pod.process.pid}")


@pytest.mark.long
async def test_etcd_is_away(own_etcd: EtcdServer, keys: Keys, tmp_path: object) -> None:
    """While etcd hangs for longer than the lease, a pod answers routers that say that etcd is unavailable, and refuses
    loads with the reason. It recovers without help."""
    async with AgentProcess(own_etcd.settings, keys, tmp_path, lease_ttl=2) as pod:  # type: ignore[arg-type]
        created = await pod.loaded("m", models.constant(6.0))
        other = await pod.register("other", models.constant(1.0))
        request = {"model_path": (await pod.model("other")).path}
        own_etcd.freeze()
        frozen = time.monotonic()
        try:
            while time.monotonic() - frozen < 5.0:
                assert (await pod.infer("m", created, headers.ETCD_AWAY)).value == 6.0
                await asyncio.sleep(0.05)
            assert (await pod.infer("m", created)).verify_first
            reply = await pod.ask("other", other, **request)
            assert reply.refused.reason == "REGISTRY_AWAY", reply
            assert await pod.probe("/ready") == (200, "ok\n")
        finally:
            own_etcd.thaw()

        async def healed() -> bool:
            copy = await pod.copy("m")
            return copy is not None and (await pod.load("other", other)).WhichOneof("outcome") == "loaded"

        await until(healed, timeout=20, interval=0.1, why="published again, and loads go on")

        async def proven() -> bool:
            return (await pod.infer("m", created)).value == 6.0

        await until(proven, timeout=5, interval=0.05, why="calls are answered that say nothing")
        assert (await pod.describe()).counters["loads"] == 2


async def test_a_pod_that_comes_before_etcd_waits_for_it(own_etcd: EtcdServer, keys: Keys, tmp_path: Path) -> None:
    """A pod that starts before etcd says what it waits for, on its probe and once in the log. It is live meanwhile and
    needs no restart."""
    own_etcd.kill9()
    probe = free_port()
    pod = AgentProcess(own_etcd.settings, keys, tmp_path, "--probe", f"127.0.0.1:{probe}")
    await pod.launch()
    try:

        async def says_so() -> bool:
            status, text = await pod.probe("/ready", probe)
            return status == 503 and f"etcd is unavailable: read at {own_etcd.endpoint}" in text

        await until(says_so, timeout=30, interval=0.05, why="/ready names etcd")
        assert (await pod.probe("/live", probe))[0] == 200
        await own_etcd.start()

        async def is_ready() -> bool:
            return (await pod.probe("/ready", probe))[0] == 200

        await until(is_ready, timeout=30, interval=0.05, why="the pod is ready")
        assert await pod.published() is not None
        assert sum("waiting for etcd" in line for line in pod.lines) == 1, pod.lines
    finally:
        assert await pod.stop() == 0
        await pod.etcd.close()


async def test_the_control_port_is_for_those_who_read_etcd(an_agent: AnAgent) -> None:
    """A caller of the control port who has no access to etcd can neither load, unload nor list models."""
    async with an_agent() as pod:
        created = await pod.loaded("m", models.constant(6.0))
        requests = {
            "Load": agent_pb2.LoadRequest(model_id="m", create_revision=created, model_type="onnx"),
            "Unload": agent_pb2.UnloadRequest(model_id="m"),
            "Describe": agent_pb2.DescribeRequest(),
        }
        assert pod.record is not None
        token = pod.record.token
        for metadata in ((), rpc.shown("guessed"), rpc.shown(token[:-1]), rpc.shown(token + "0"), rpc.shown("")):
            for name, request in requests.items():
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await getattr(pod.stub, name)(request, timeout=10, metadata=metadata)
                assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED
                assert "etcd" in (error.value.details() or "")
                assert token not in (error.value.details() or "")
        assert (await pod.infer("m", created)).value == 6.0
        assert (await pod.describe("m")).copies
