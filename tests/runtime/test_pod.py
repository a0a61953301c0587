"""One real pod shared by these tests: loads, answers, evictions, failures and deaths, with separate models for each
test."""

import asyncio
import json
import os
import re
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from mesh.schema.keys import Keys
from mesh.schema.records import LOADED
from mesh.wire import headers
from tests.support import models
from tests.support.agent import AgentProcess
from tests.support.etcd import EtcdServer
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

MIB = 1 << 20


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(etcd_server: EtcdServer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AgentProcess]:
    """A pod of 64 MiB with short intervals between its checks."""
    options = (
        "--check-interval",
        "0.3",
        "--hang-timeout",
        "2",
        "--load-timeout",
        "3",
        "--labels",
        "blue",
        "--zone",
        "z1",
    )
    keys = Keys(f"test/agent-{os.urandom(4).hex()}")
    async with AgentProcess(etcd_server.settings, keys, tmp_path_factory.mktemp("agent"), *options) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def pod(shared: AgentProcess) -> AgentProcess:
    """The shared pod, emptied for the test."""
    for copy in (await shared.describe()).copies:
        await shared.unload(copy.model_id)

    async def empty() -> bool:
        return not (await shared.describe()).copies

    await until(empty, why="the pod is empty")
    return shared


async def states(pod: AgentProcess) -> dict[str, str]:
    """Returns the states of the pod's copies."""
    return {copy.model_id: copy.state for copy in (await pod.describe()).copies}


async def loaded_again(pod: AgentProcess, model_id: str, created: int) -> None:
    """Waits until the pod has loaded the model again. Until then, the pod answers UNAVAILABLE, so that routers ask
    another pod."""

    async def loaded() -> bool:
        reply = await pod.load(model_id, created)
        assert reply.WhichOneof("outcome") == "loaded" or reply.refused.reason == "UNAVAILABLE", reply
        return reply.loaded.load_ms > 0

    await until(loaded, timeout=40, interval=0.1, why="loads go on")


async def test_a_copy_from_its_load_to_its_unload(pod: AgentProcess) -> None:
    """After a load, the copy has a key and answers. After the unload nothing of it is left, not even its files."""
    created = await pod.loaded("a/b c", models.constant(7.0))
    assert (await pod.infer("a/b c", created)).value == 7.0
    assert (await pod.infer("a/b c", created + 1)).not_here

    async def published() -> bool:
        copy = await pod.copy("a/b c")
        return copy is not None and copy.state == LOADED and copy.host_bytes > 0

    await until(published, why="the copy's key says that it is loaded")
    again = await pod.load("a/b c", created)
    assert again.loaded.load_ms == 0
    assert again.loaded.incarnation == pod.record.incarnation
    assert await pod.unload("a/b c", created)
    assert (await pod.infer("a/b c", created)).not_here
    assert await pod.copy("a/b c") is None
    assert not await pod.unload("a/b c", created)
    await until(lambda: not list(pod.model_dir.glob("a*")), why="the model's files are gone")


async def test_a_copy_that_nobody_called_is_told_apart_from_one_that_was(pod: AgentProcess) -> None:
    """A copy that was never called is published as unused, although its load request gave it an age of an hour. Its key
    says since when it has been loaded."""
    began = time.time_ns() // 1_000_000
    created = await pod.loaded("m", models.constant(1.0), idle_ms=3_600_000)

    async def unused(expected: bool) -> bool:
        record = await pod.published()
        return record.copies == 1 and record.oldest_unused is expected

    await until(lambda: unused(True), timeout=20, why="the copy is described as never called")
    copy = await pod.copy("m")
    assert began - 1000 <= copy.since_ms <= time.time_ns() // 1_000_000
    await pod.infer("m", created)
    await until(lambda: unused(False), timeout=20, why="the copy is described as called")


async def test_its_size_and_load_time_are_remembered(pod: AgentProcess) -> None:
    created = await pod.loaded("m", models.weights(1.0, mebibytes=4))

    async def remembered() -> bool:
        record = await pod.model("m")
        return 4 * MIB < record.host_bytes < 6 * MIB and record.load_ms > 0

    await until(remembered, why="the record has them")
    assert (await pod.load("m", created)).loaded.host_bytes == (await pod.model("m")).host_bytes


async def test_the_least_recently_used_is_evicted(pod: AgentProcess) -> None:
    """The copy whose last call is the oldest is evicted, whatever the order of loads. The decision is described with
    its reason."""
    created = {}
    for name in ("a", "b", "c"):
        created[name] = await pod.loaded(name, models.weights(1.0, mebibytes=18), idle_ms=1)
    assert (await pod.infer("a", created["a"])).value == 1.0
    await pod.loaded("d", models.weights(2.0, mebibytes=18))

    async def evicted() -> bool:
        return await states(pod) == {"a": "loaded", "c": "loaded", "d": "loaded"}

    await until(evicted, why="b is evicted")
    assert (await pod.infer("b", created["b"])).not_here
    assert (await pod.infer("a", created["a"])).value == 1.0
    assert await pod.copy("b") is None
    reason = json.loads((await pod.describe("b")).decisions[0])
    assert reason["what"] in ("evict", "unload")
    assert "evicts 1 copy" in reason["why"] or "evicted for" in reason["why"]
    _, metrics = await pod.probe("/metrics")
    wanted = re.search(r"^mesh_pods_wanted ([0-9.]+)$", metrics, re.MULTILINE)
    assert wanted is not None, metrics
    assert 1.0 < float(wanted[1]) < 1.6, "four models of 18 MiB and a little were in use, in a pod of 64 MiB"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param(b"this is no model", "", id="not-onnx"),
        pytest.param(models.constant(1.0)[:40], "", id="truncated"),
        pytest.param(models.endless_loop(), "3 s", id="endless"),
        pytest.param(models.huge_allocation(40 << 30), "memory", id="asks-for-gigabytes"),
    ],
)
async def test_a_load_that_fails_says_why_everywhere(pod: AgentProcess, content: bytes, says: str) -> None:
    """A failed load gives its reason in the reply and in the record. It leaves neither a key nor a copy behind, and
    does not affect other models."""
    good = await pod.loaded("good", models.constant(1.0))
    created = await pod.register("bad", content)
    reply = await pod.load("bad", created)
    reason = "NO_ROOM" if says == "memory" else "LOAD_FAILED"
    assert reply.failed.reason == reason, reply
    assert says in reply.failed.text
    assert reply.failed.text
    failure = (await pod.model("bad")).failures[0]
    assert (failure.pod, failure.text) == (pod.name, reply.failed.text)
    assert await pod.copy("bad") is None

    async def gone() -> bool:
        return "bad" not in await states(pod)

    await until(gone, why="the copy is off the books")
    assert (await pod.infer("good", good)).value == 1.0


async def test_files_that_cannot_be_had(pod: AgentProcess) -> None:
    """The load of a model whose files are missing or outside the roots, or whose path is empty or of an unknown scheme,
    fails with the puller's text."""
    for number, (path, says) in enumerate(
        [(f"{pod.models}/none.onnx", "none.onnx"), ("/etc/passwd", "--file-root"), ("", "path"), ("ftp://x/y", "ftp")]
    ):
        created = await pod.register_path(f"bad{number}", path)
        reply = await pod.load(f"bad{number}", created)
        assert reply.failed.reason == "LOAD_FAILED", reply
        assert says in reply.failed.text


async def test_a_file_that_was_not_complete_is_loaded_once_it_is(pod: AgentProcess) -> None:
    """An incomplete file is loaded once it is complete, without a release. Until then further requests get the same
    error without another load."""
    whole = models.constant(3.0)
    created = await pod.register("half", whole[: len(whole) // 2])
    path = Path((await pod.model("half")).path)
    first = (await pod.load("half", created)).failed
    assert first.kind == "content"
    before = (await pod.describe()).counters["load_failures"]
    assert (await pod.load("half", created)).failed == first
    assert (await pod.describe()).counters["load_failures"] == before
    (failure,) = (await pod.model("half")).failures
    assert (failure.kind.value, failure.text) == ("content", first.text)
    path.write_bytes(whole)
    assert (await pod.load("half", created)).WhichOneof("outcome") == "loaded"
    assert (await pod.infer("half", created)).value == 3.0


async def test_a_model_larger_than_the_pod(pod: AgentProcess) -> None:
    """A model that is larger than the pod, by its files or by the size that the request states, is refused, and nothing
    is evicted for it."""
    await pod.loaded("good", models.constant(1.0))
    created = await pod.register("elephant", models.weights(0, mebibytes=70))
    reply = await pod.load("elephant", created)
    assert reply.refused.reason == "NOWHERE", reply
    known = await pod.load("elephant", created, host_bytes=100 * MIB)
    assert known.refused.reason == "NOWHERE"
    assert "64.0 MiB" in known.refused.text
    assert await states(pod) == {"good": "loaded"}
    assert not (await pod.model("elephant")).failures


async def test_an_id_registered_again(pod: AgentProcess) -> None:
    """After an id is registered again, calls get answers from the new file, and calls for the old registration get
    none."""
    old = await pod.loaded("m", models.constant(1.0))
    await pod.etcd.delete(pod.keys.model("m"))
    new = await pod.loaded("m", models.constant(2.0))
    assert (await pod.infer("m", new)).value == 2.0
    assert (await pod.infer("m", old)).not_here
    assert (await pod.load("m", old)).WhichOneof("outcome") == "stale"


async def test_a_registration_that_is_gone_is_not_loaded(pod: AgentProcess) -> None:
    created = await pod.register("m", models.constant(1.0))
    await pod.etcd.delete(pod.keys.model("m"))
    assert (await pod.load("m", created)).WhichOneof("outcome") == "stale"
    assert await states(pod) == {}


async def test_what_was_unregistered_unseen_is_found_out(pod: AgentProcess) -> None:
    """The agent's periodic check withdraws a model whose unregistration it never saw, and leaves the others."""
    await pod.loaded("gone", models.constant(1.0))
    await pod.loaded("kept", models.constant(1.0))
    await pod.etcd.delete(pod.keys.model("gone"))

    async def withdrawn() -> bool:
        return await states(pod) == {"kept": "loaded"} and await pod.copy("gone") is None

    await until(withdrawn, why="withdrawn by the periodic check")


async def test_a_load_cannot_be_confused_by_bad_requests(pod: AgentProcess) -> None:
    assert (await pod.load("", 1)).refused.reason == "BAD_REQUEST"
    assert (await pod.load("m", -1)).refused.reason == "BAD_REQUEST"


async def test_it_says_how_it_is(pod: AgentProcess) -> None:
    """A pod's presence, description, probes and metrics report the same state."""
    created = await pod.loaded("m", models.constant(1.0))
    await pod.infer("m", created)
    assert pod.record.labels == ("blue", "cpu")
    assert (pod.record.zone, pod.record.capacity_bytes, pod.record.state) == ("z1", 64 * MIB, "ready")
    described = await pod.describe()
    assert (described.state, described.capacity_bytes) == ("ready", 64 * MIB)
    assert described.resident_bytes > 10 * MIB
    (copy,) = described.copies

    async def call_counted() -> bool:
        nonlocal described, copy
        described = await pod.describe()
        (copy,) = described.copies
        return copy.in_flight == 0

    await until(call_counted, why="the call is counted, which happens after its answer is on its way")
    assert (copy.calls, copy.in_flight, copy.create_revision) == (1, 0, created)
    assert copy.host_bytes == described.used_bytes
    assert await pod.probe("/ready") == (200, "ok\n")
    assert await pod.probe("/live") == (200, "ok\n")

    async def counted() -> bool:
        _, text = await pod.probe("/metrics")
        lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return (
            lines["modelmesh_instance_models_total"] == "1"
            and float(lines["modelmesh_instance_capacity_bytes"]) == 64 * MIB
            and float(lines["modelmesh_instance_used_bytes"]) == copy.host_bytes
            and int(lines["modelmesh_loadmodel_milliseconds_count"]) >= 1
            and int(lines.get('modelmesh_invoke_model_milliseconds_count{method="ModelInfer",code="OK"}', 0)) >= 1
            and float(lines['process_resident_memory_bytes{process="model-server"}']) > 0
        )

    await until(counted, why="metrics say the same")

    async def told() -> bool:
        record = await pod.published()
        return record is not None and record.copies == 1

    await until(told, why="the pod's record has the copy")


async def test_the_model_server_killed(pod: AgentProcess) -> None:
    """After a SIGKILL of the model server, its copies are withdrawn, another server starts, and loads continue. No
    model is blamed, and other pods may make the interrupted load."""
    idle = await pod.loaded("idle", models.constant(1.0))
    running = await pod.loaded("running", models.slow())
    call = asyncio.create_task(pod.infer("running", running, timeout=30, **models.slow_inputs(20.0)))

    async def runs() -> bool:
        return (await pod.describe("running")).copies[0].in_flight == 1

    await until(runs, why="the call runs")
    endless = await pod.register("loading", models.endless_loop())
    load = asyncio.create_task(pod.load("loading", endless))

    async def loads() -> bool:
        return any(copy.state == "loading" and copy.age_ms > 300 for copy in (await pod.describe("loading")).copies)

    await until(loads, why="the load is in the server")
    old = pod.server_pid
    os.kill(old, signal.SIGKILL)
    reply = await load
    assert (reply.refused.reason, reply.refused.text) == (
        "UNAVAILABLE",
        "the model server was killed by SIGKILL from outside before it had loaded this model",
    )

    async def withdrawn() -> bool:
        return await pod.copy("idle") is None and await pod.copy("running") is None

    await until(withdrawn, why="the copies are withdrawn")
    with pytest.raises(Exception, match=r"."):
        await call
    await loaded_again(pod, "idle", idle)
    assert pod.server_pid != old
    assert (await pod.infer("idle", idle)).value == 1.0

    for name in ("idle", "running", "loading"):
        record = await pod.model(name)
        assert not record.killed
        assert not record.failures
    assert pod.record.incarnation == (await pod.describe()).incarnation
    record = await pod.published()
    assert record is not None
    assert record.data_address == pod.record.data_address


async def test_a_call_that_crashes_the_server_is_blamed_alone(pod: AgentProcess) -> None:
    """If a call crashes the server with an integer division overflow, only its model is blamed. Models that were
    running or loading are not, and other pods may make the interrupted load."""
    divide = await pod.loaded("divide", models.divide())
    running = await pod.loaded("beside", models.slow())
    others = [asyncio.create_task(pod.infer("beside", running, timeout=30, **models.slow_inputs(20.0)))]
    endless = await pod.register("cut", models.endless_loop())
    load = asyncio.create_task(pod.load("cut", endless))

    async def at_work() -> bool:
        loads = any(copy.state == "loading" and copy.age_ms > 300 for copy in (await pod.describe("cut")).copies)
        return loads and (await pod.describe("beside")).copies[0].in_flight == 1

    await until(at_work, why="the calls are under way")
    overflow = {"a": np.array([-(2**31)], np.int32), "b": np.array([-1], np.int32)}
    others.append(asyncio.create_task(pod.infer("divide", divide, **overflow)))
    reply = await load
    assert reply.refused.reason == "UNAVAILABLE"

    async def written() -> bool:
        return len((await pod.model("divide")).killed) == 1

    await until(written, why="the suspect's record says so")
    text = (await pod.model("divide")).killed[0]
    assert "was killed by SIGFPE while it was running this model (request " in text
    for name in ("beside", "cut"):
        record = await pod.model(name)
        assert not record.killed
        assert not record.failures
    for other in await asyncio.gather(*others, return_exceptions=True):
        assert isinstance(other, Exception)
    await loaded_again(pod, "beside", running)


async def test_a_pod_killed_whole_by_hand_blames_nobody(pod: AgentProcess) -> None:
    """A pod that is killed by hand twice, during calls and with memory to spare, blames no model in its next life. (For
    exhausted memory, see blame/test_earlier and tests/cluster/test_exhaustion.)"""
    running = await pod.loaded("running", models.slow())

    async def runs() -> bool:
        copies = (await pod.describe("running")).copies
        return bool(copies) and copies[0].in_flight == 1

    for _ in range(2):
        call = asyncio.create_task(pod.infer("running", running, timeout=30, **models.slow_inputs(20.0)))
        await until(runs, why="the call runs")
        pod.kill9()
        await pod.process.wait(10.0)
        with pytest.raises(Exception, match=r"."):
            await call
        await pod.start()
        assert any("no measurement shows a lack of memory" in line for line in pod.lines)
        await loaded_again(pod, "running", running)
    record = await pod.model("running")
    assert (record.killed, record.blames) == ((), ())


async def test_a_server_that_is_stopped_is_replaced_and_no_model_blamed(pod: AgentProcess) -> None:
    """A server that is stopped by SIGSTOP during calls is replaced, twice. No model is blamed, because models do not
    send SIGSTOP."""
    created = await pod.loaded("m", models.constant(3.0))
    running = await pod.loaded("running", models.slow())

    async def runs() -> bool:
        copies = (await pod.describe("running")).copies
        return bool(copies) and copies[0].in_flight == 1

    for _ in range(2):
        call = asyncio.create_task(pod.infer("running", running, timeout=30, **models.slow_inputs(20.0)))
        await until(runs, why="the call runs")
        old = pod.server_pid
        os.kill(old, signal.SIGSTOP)
        await until(lambda old=old: not os.path.exists(f"/proc/{old}"), timeout=30, why="the stopped server was killed")
        with pytest.raises(Exception, match=r"."):
            await call
        await loaded_again(pod, "running", running)
    await loaded_again(pod, "m", created)
    assert (await pod.infer("m", created)).value == 3.0
    assert pod.server_pid != old
    assert not (await pod.model("running")).killed
    assert 'mesh_hung_processes{process="model-server"} 2' in (await pod.probe("/metrics"))[1]
    # The pod runs with `--device auto`, and later servers get the device that the first one found.
    assert _argument(pod.server_pid, "device") == "cpu"


def _argument(pid: int, name: str) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return words[words.index(f"--{name}") + 1]


async def test_a_lost_lease_changes_nothing_for_callers(pod: AgentProcess, etcd_server: EtcdServer) -> None:
    """The keys return under a new lease, and no model is loaded again. Meanwhile, the pod answers calls of routers that
    have read the model's record."""
    created = await pod.loaded("m", models.constant(4.0))
    kv = await pod.etcd.get(pod.keys.pod(pod.name))
    assert kv is not None
    loads = (await pod.describe()).counters["loads"]
    etcd_server.etcdctl("lease", "revoke", f"{kv.lease:x}")
    assert await pod.published() is None
    # Routers call a pod that has vanished like this: after they have read the record.
    assert (await pod.infer("m", created, headers.VERIFIED)).value == 4.0

    async def back() -> bool:
        copy, record = await pod.copy("m"), await pod.published()
        return copy is not None and record is not None and record.incarnation == pod.record.incarnation

    await until(back, timeout=20, why="the copies are published again")

    async def proven() -> bool:
        return (await pod.infer("m", created)).value == 4.0

    await until(proven, timeout=5, why="calls are answered that say nothing")
    assert (await pod.describe()).counters["loads"] == loads
