"""ModelMesh's behaviours of eviction, copies, failures, drain and constraints, with real processes around models
that are as large, slow and broken as a test wants them (`tests.support.twin`).

The table lists the assertions of ModelMesh's tests, and the test of each here. Names without a file are below.

| its test | what it asserts | here |
| --- | --- | --- |
| Evictions (G) | as many as fit stay; one more evicts only the oldest, whose status says so | `a_full_pod` |
| | the new model waits until the evicted one is really gone | loads/test_flights: `the_least_recently_used_makes_way` |
| | larger than estimated: evicts as many more | `four_times_as_large` |
| | an evicted model that is requested is LOADING | `what_was_evicted_is_loading` |
| | ten at once evict ten, also with five unregistered meanwhile | `ten_at_once` |
| Evictions (T) | reuse protects; a large one displaces as many as it needs | `a_full_pod`, `four_times_as_large` |
| | the most recent stay, in one pod and in three | placement/test_simulator: `the_most_recent_stay` |
| | nothing in use is evicted | loads/test_flights: `calls_in_flight`, placement/test_room |
| | a second copy of a regularly used model | placement/test_copies: `plenty_of_room`, `proves_hot` |
| Mesh (T) | records show copies and bytes, none after the models are unregistered | the fixture `mesh` |
| Cluster (G) | answers are right while copies are made | test_copies: `a_hot_model` |
| (section 4) | the number of copies, and their eviction | placement/test_copies, leader/test_rounds |
| LoadFailure (T) | fails everywhere: LOADING_FAILED, in all of three pods | `fails_everywhere` |
| | of five pods, in three | placement/test_failures: `up_to_a_bound` |
| | one good pod of three: LOADED | `one_pod_that_can` |
| | pods stop, all models move | test_rollout: `several_pods`, test_copies: `a_pod_that_leaves` |
| Sidecar (G) | a load that fails: one error, one copy, where and when; again when asked | `a_load_that_fails` |
| FailureExpiry (G) | the error holds until it expires, whatever calls come | `holds_until_it_expires` |
| ErrorPropagation (G) | a required label: one copy; UNAVAILABLE of a model makes no copy | `errors_of_calls` |
| RefreshMissing, Sidecar (G) | a server that has lost models, or all: the next call succeeds | `its_server_has_lost` |
| LoadPriority (T) | calls overtake other loads, also queued ones | `overtakes`, placement/test_queue |
| TearDown (T) | a killed pod's models are served soon | test_faults: `a_pod_killed`, test_copies: `is_replaced` |
| ZkFail (T) | without the store, loaded models are served | test_faults: `etcd_killed`, `etcd_frozen` |
| - (not tested there) | a server that crashes, hangs, lacks memory | `no_third`, `a_load_that_fails`, test_faults |
| - | drain: loaded elsewhere first, no call waits | test_rollout, placement/test_drain |
| - | drain: loads end, calls are finished | runtime/test_pods: `leaves_in_order` |
| - | constraints: preferred, required, default, changed | `a_preference`, test_copies: `constraints_move` |
| | all of the rules for labels | placement/test_constraints, placement/test_choice |

Mesh differs on purpose in these points: failed loads and lost claims leave no placeholder in memory. Unloads need no
reserve, because loads reserve memory while it is being freed. No load with a waiting caller is refused for a "churn
age". UNAVAILABLE of a model stays UNAVAILABLE, where ModelMesh made INTERNAL of it. A hot model's second copy
does not take seven minutes.
"""

import asyncio
import time
from collections.abc import Iterable
from dataclasses import replace

import grpc
import numpy as np
import pytest
import pytest_asyncio

from mesh.etcd import Etcd, KeyValue
from mesh.pb import modelmesh_pb2 as pb
from mesh.pb import modelruntime_pb2, modelruntime_pb2_grpc
from mesh.schema.keys import Keys
from mesh.schema.records import ModelRecord
from tests.support.localmesh import Client, LocalMesh, command
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

ONE = np.ones((1, 1), np.float32)
LOADED, NOT_LOADED = pb.ModelStatusInfo.LOADED, pb.ModelStatusInfo.NOT_LOADED
LOADING, LOADING_FAILED = pb.ModelStatusInfo.LOADING, pb.ModelStatusInfo.LOADING_FAILED
CONSTRAINTS = {"solo": {"required": ["a"]}, "odd": {"required": ["a"]}, "pref": {"preferred": ["b"]}}
"""Types that only pod-1 may hold, which makes it a mesh of one pod for them, and one type that prefers pod-2."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pods(tmp_path_factory, etcd_server):
    """Three pods of 100 MiB, shared by the module's tests, that load one model at a time."""
    async with LocalMesh(
        tmp_path_factory.mktemp("behaviours"),
        etcd_server,
        pods=3,
        fake=True,
        capacity="100MiB",
        labels={"pod-1": "a", "pod-2": "b", "pod-3": "c"},
        runtime_options=["--load-concurrency", "1", "--load-timeout", "3"],
    ) as mesh:
        reply = await mesh.rest("PUT", "/mesh/v1/settings/type_constraints", CONSTRAINTS)
        assert reply.status == 200
        yield mesh


@pytest_asyncio.fixture(loop_scope="module")
async def mesh(pods):
    """The module's mesh, without models. After each test its models are unregistered, and the pods must become
    empty."""
    yield pods
    listed = (await pods.rest("GET", "/mesh/v1/models?limit=1000")).json["models"]
    await asyncio.gather(*(pods.rest("DELETE", f"/mesh/v1/models/{model['id']}") for model in listed))
    state: list[object] = []

    async def empty() -> bool:
        state[:] = (await pods.rest("GET", "/mesh/v1/pods")).json["pods"]
        return all(pod["state"] == "ready" and not (pod["copies"] or pod["used"] or pod["loading"]) for pod in state)

    await until(empty, timeout=20, interval=0.05, why=lambda: f"all pods are empty: {state}")


async def status(mesh: LocalMesh, model_id: str) -> pb.ModelStatusInfo:
    return await mesh.management().getModelStatus(pb.GetStatusRequest(modelId=model_id), timeout=30)


async def statuses(mesh: LocalMesh, names: Iterable[str]) -> dict[str, int]:
    stub = mesh.management()
    names = list(names)
    replies = await asyncio.gather(*(stub.getModelStatus(pb.GetStatusRequest(modelId=name)) for name in names))
    return {name: reply.status for name, reply in zip(names, replies, strict=True)}


async def loaded(mesh: LocalMesh, names: Iterable[str]) -> list[str]:
    return [name for name, found in (await statuses(mesh, names)).items() if found == LOADED]


async def ensure(mesh: LocalMesh, model_id: str, *, sync: bool) -> pb.ModelStatusInfo:
    return await mesh.management().ensureLoaded(pb.EnsureLoadedRequest(modelId=model_id, sync=sync), timeout=30)


def hours_ago(hours: float) -> int:
    """Returns the time that many hours ago, in milliseconds since the epoch."""
    return int((time.time() - hours * 3600) * 1000)


async def fill(mesh: LocalMesh, count: int, *, size: str = "10MiB") -> list[str]:
    """Loads that many models into pod-1, last used half a day ago, a minute apart. (A model that is registered with a
    load and without a time counts as last used an hour ago.)"""
    names = [f"m{number:02}" for number in range(count)]
    for number, name in enumerate(names):
        used = hours_ago(12 - number / 60)
        assert (await mesh.register_fake(name, type="solo", size=size, now=True, last_used_ms=used)).status == LOADED
    return names


async def counters(mesh: LocalMesh, pod: str = "pod-1") -> dict[str, int]:
    return (await mesh.rest("GET", f"/mesh/v1/pods/{pod}")).json["counters"]


async def answer(mesh: LocalMesh, model_id: str) -> float:
    (found,) = await Client(mesh.channel()).infer(model_id, x=ONE)
    return float(found.item())


async def refused(mesh: LocalMesh, model_id: str) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await Client(mesh.channel()).infer(model_id, x=ONE)
    return error.value


def spi(mesh: LocalMesh) -> modelruntime_pb2_grpc.ModelRuntimeStub:
    """Returns a second client of pod-1's model server, which bypasses the agent."""
    words = command(mesh.server_pid(mesh.pods[0])).split()
    mesh.channels.append(grpc.aio.insecure_channel(f"unix:{words[words.index('--spi') + 1]}"))
    return modelruntime_pb2_grpc.ModelRuntimeStub(mesh.channels[-1])


# --- eviction ---


async def test_a_full_pod_lets_go_of_the_oldest_and_of_no_other(mesh):
    """A full pod holds as many models as fit. One more model evicts exactly one, whose status shows the eviction at
    once. A call protects the oldest model from eviction."""
    names = await fill(mesh, 10)
    assert await loaded(mesh, names) == names
    assert (await mesh.register_fake("n0", type="solo", size="10MiB", now=True)).status == LOADED
    assert (await statuses(mesh, names))["m00"] == NOT_LOADED
    assert await loaded(mesh, [*names, "n0"]) == [*names[1:], "n0"]
    await answer(mesh, "m01")
    assert (await mesh.register_fake("n1", type="solo", size="10MiB", now=True)).status == LOADED
    assert await loaded(mesh, [*names, "n0", "n1"]) == ["m01", *names[3:], "n0", "n1"]


@pytest.mark.parametrize("type", ["solo", "odd"], ids=["predicted", "larger-than-predicted"])
async def test_one_four_times_as_large_displaces_four(mesh, type):
    """A model four times as large evicts four others, even if its size is only known after the load, as for the first
    model of a type."""
    names = await fill(mesh, 10)
    before = await counters(mesh)
    assert (await mesh.register_fake("large", type=type, size="40MiB", now=True)).status == LOADED

    async def evicted() -> bool:
        return await loaded(mesh, [*names, "large"]) == [*names[4:], "large"]

    await until(evicted, why="the four oldest are gone")
    assert (await counters(mesh))["evictions"] - before["evictions"] == 4


async def test_what_was_evicted_is_loading_when_it_is_asked_for(mesh):
    """An evicted model is LOADING once `ensureLoaded` is called, and LOADED when the load is done. The oldest of the
    other models is evicted for it."""
    gate = mesh.folder / "evicted"
    gate.touch()
    words = {"type": "solo", "size": "10MiB", "gate": gate.name, "last_used_ms": hours_ago(13)}
    assert (await mesh.register_fake("back", now=True, **words)).status == LOADED
    names = await fill(mesh, 10)
    assert (await status(mesh, "back")).status == NOT_LOADED
    gate.unlink()
    assert (await ensure(mesh, "back", sync=False)).status == LOADING
    assert (await status(mesh, "back")).status == LOADING
    gate.touch()
    assert (await ensure(mesh, "back", sync=True)).status == LOADED
    assert await loaded(mesh, ["back", *names]) == ["back", *names[1:]]


@pytest.mark.parametrize("leaving", [0, 5], ids=["alone", "with-five-unregistered"])
async def test_ten_at_once_evict_the_ten_oldest(mesh, leaving):
    """After ten concurrent loads exactly the ten oldest copies are gone, even if five of their models are unregistered
    meanwhile."""
    names = await fill(mesh, 20, size="5MiB")
    news = [f"n{number}" for number in range(10)]
    replies, _ = await asyncio.gather(
        asyncio.gather(*(mesh.register_fake(name, type="solo", size="5MiB", now=True) for name in news)),
        asyncio.gather(*(mesh.rest("DELETE", f"/mesh/v1/models/{name}") for name in names[:leaving])),
    )
    assert [reply.status for reply in replies] == [LOADED] * 10
    assert await loaded(mesh, [*names, *news]) == [*names[10:], *news]


async def test_a_storm_of_cold_calls_is_served_in_turn(mesh):
    """Concurrent cold calls of sixty models are all answered in a mesh with room for fifteen."""
    names = [f"cold{number:02}" for number in range(60)]
    await asyncio.gather(*(mesh.register_fake(name, size="20MiB", value=number) for number, name in enumerate(names)))
    answers = await asyncio.gather(*(answer(mesh, name) for name in names))
    assert answers == list(range(60))


async def test_a_model_that_fits_nowhere_is_found_out_once(mesh):
    """A load of a model that fits nowhere is tried once. The second call is refused without a load, no copy is evicted,
    and the model's status has its size."""
    names = await fill(mesh, 9)
    await mesh.register_fake("huge", type="solo", size="400MiB")
    before = await counters(mesh)
    for _ in range(2):
        error = await refused(mesh, "huge")
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "400 MiB" in (error.details() or "")
        assert (await counters(mesh))["load_refusals"] == before["load_refusals"] + 1
    found = await status(mesh, "huge")
    assert found.status == LOADING_FAILED
    assert "400 MiB" in found.errors[0]
    assert await loaded(mesh, names) == names


# --- loading ---


@pytest.mark.parametrize("queued", [True, False], ids=["queued-already", "new"])
async def test_a_callers_model_overtakes_what_nobody_waits_for(mesh, queued):
    """In a pod that loads one model at a time, a model that a caller waits for is loaded before those that nobody waits
    for, even if it was already queued."""
    gate = mesh.folder / f"queue-{queued}"
    await mesh.register_fake("first", type="solo", gate=gate.name, now=True, sync=False)
    waiting = ["second", "third"]
    for name in waiting:
        await mesh.register_fake(name, type="solo", load="0.1s", now=True, sync=False)
    await mesh.register_fake("called", type="solo", value=4, load="0.1s", now=queued, sync=False)

    async def copies() -> dict[str, dict]:
        pod = (await mesh.rest("GET", "/mesh/v1/pods/pod-1")).json
        return {copy["model_id"]: copy for copy in pod["copies"]}

    async def behind() -> bool:
        states = {name: copy["state"] for name, copy in (await copies()).items()}
        behind = [*waiting, "called"] if queued else waiting
        return states == {"first": "loading", **dict.fromkeys(behind, "waiting")}

    await until(behind, why="one loads, the others wait")
    call = asyncio.ensure_future(answer(mesh, "called"))

    async def wanted() -> bool:
        """Returns whether the pod knows that a caller waits for the model. According to their registrations, the other
        models were last used an hour ago."""
        copy = (await copies()).get("called")
        return copy is not None and copy["state"] == "waiting" and copy["idle_ms"] < 1_800_000

    await until(wanted, why="the pod knows of the caller")
    assert (await mesh.status("called"))["copies"][0]["load"] == {"state": "waiting", "ahead": 0, "expected_ms": 0}
    assert {(await mesh.status(name))["copies"][0]["load"]["ahead"] for name in waiting} == {1, 2}
    gate.touch()
    assert await call == 4

    async def done() -> dict[str, dict] | None:
        found = await copies()
        return found if all(copy["state"] == "loaded" for copy in found.values()) else None

    ages = {name: copy["age_ms"] for name, copy in (await until(done)).items()}
    assert sorted(ages, key=lambda name: -ages[name])[:2] == ["first", "called"]


# --- failures ---


@pytest.mark.parametrize(
    ("fail", "says"),
    [("no such layer", "no such layer"), ("memory", "memory"), ("hang", "within 3 s")],
    ids=["text", "memory", "hang"],
)
async def test_a_load_that_fails(mesh, fail, says):
    """A failed load appears in the status as one failed copy with its pod and error text, also when the status is read
    again. Callers get that text without a retry, with INTERNAL, or with RESOURCE_EXHAUSTED if memory was missing. Other
    models of the pod are unaffected, and nothing of the load remains."""
    await mesh.register_fake("good", type="solo", value=1, now=True)
    server, began = mesh.server_pid(mesh.pods[0]), time.time()
    reply = await mesh.register_fake("bad", type="solo", fail=fail, now=True)
    assert reply.status == LOADING_FAILED
    (text,) = reply.errors
    assert says in text
    (info,) = reply.modelCopyInfos
    assert (info.location, info.copyStatus) == ("pod-1", LOADING_FAILED)
    assert began - 1 < info.time / 1000 < time.time() + 1
    assert await status(mesh, "bad") == reply
    before = await counters(mesh)
    error = await refused(mesh, "bad")
    code = grpc.StatusCode.RESOURCE_EXHAUSTED if fail == "memory" else grpc.StatusCode.INTERNAL
    assert error.code() is code
    assert (error.details() or "").startswith(f"{text} (")
    assert (await counters(mesh))["load_failures"] == before["load_failures"]
    assert await answer(mesh, "good") == 1
    assert mesh.server_pid(mesh.pods[0]) == server
    copies = (await mesh.rest("GET", "/mesh/v1/pods/pod-1")).json["copies"]
    assert [copy["model_id"] for copy in copies] == ["good"]


async def test_a_model_that_fails_everywhere_is_tried_everywhere_once(mesh):
    """A model that cannot be loaded anywhere is tried once in each of three pods, and then the caller gets the model's
    own error."""
    reply = await mesh.register_fake("bad", fail="no such layer", now=True)
    assert (reply.status, list(reply.errors)) == (LOADING_FAILED, ["no such layer"] * 3)
    assert {info.location for info in reply.modelCopyInfos} == {"pod-1", "pod-2", "pod-3"}
    assert {info.copyStatus for info in reply.modelCopyInfos} == {LOADING_FAILED}
    error = await refused(mesh, "bad")
    assert error.code() is grpc.StatusCode.INTERNAL
    assert (error.details() or "").startswith("no such layer (")
    assert await status(mesh, "bad") == reply


async def test_one_pod_that_can_load_it_is_enough(mesh):
    """Two pods fail to load the model before a third one loads it. Their failures are shown along with the copy."""
    await mesh.register_fake("m", value=7, fail="not here", at="pod-2+pod-3")
    assert await answer(mesh, "m") == 7
    found = await status(mesh, "m")
    assert (found.status, list(found.errors)) == (LOADED, ["not here"] * 2)
    assert {info.location: info.copyStatus == LOADING_FAILED for info in found.modelCopyInfos} == {
        "pod-1": False,
        "pod-2": True,
        "pod-3": True,
    }


async def test_a_failure_holds_until_it_expires(mesh):
    """Calls do not prolong a failure. After its quarter of an hour, which the test simulates in the record, the next
    call loads the model."""
    await mesh.register_fake("m", type="solo", value=2, fail="no such layer", fails=1)
    before = await counters(mesh)
    for _ in range(3):
        assert ((await refused(mesh, "m")).details() or "").startswith("no such layer (")
    assert (await counters(mesh))["load_failures"] == before["load_failures"] + 1
    await age_failures(mesh, "m", 840_000)
    assert ((await refused(mesh, "m")).details() or "").startswith("no such layer (")
    await age_failures(mesh, "m", 61_000)
    assert await answer(mesh, "m") == 2
    assert not (await status(mesh, "m")).errors


async def age_failures(mesh: LocalMesh, model_id: str, ms: int) -> None:
    """Moves the failures in a model's record back by `ms` milliseconds."""

    def older(kv: KeyValue | None) -> bytes:
        assert kv is not None
        record = ModelRecord.decode(kv.value)
        failures = tuple(replace(failure, at_ms=failure.at_ms - ms) for failure in record.failures)
        return replace(record, failures=failures).encode()

    async with Etcd(mesh.etcd.settings) as etcd:
        await etcd.update(Keys(mesh.base).model(model_id), older)


async def test_a_load_that_kills_its_server_gets_no_third(mesh):
    """A model whose loads kill two servers is quarantined before it can kill a third. The servers and their other
    models come back by themselves."""
    await mesh.register_fake("good", type="solo", value=1, now=True)
    lives = [(await counters(mesh, pod))["server_lives"] for pod in ("pod-1", "pod-2", "pod-3")]
    assert (await mesh.register_fake("bad", fail="crash", now=True)).status == LOADING_FAILED
    error = await refused(mesh, "bad")
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert (error.details() or "").count("while it was loading this model") == 2
    assert await answer(mesh, "good") == 1

    async def died() -> int:
        now = [(await counters(mesh, pod))["server_lives"] for pod in ("pod-1", "pod-2", "pod-3")]
        return sum(now) - sum(lives)

    assert await until(died) == 2


async def test_errors_of_calls_are_the_callers_and_make_no_copies(mesh):
    """Errors of calls are passed to the callers and cause no further copies, not even UNAVAILABLE from a model that
    only one pod may hold."""
    await mesh.register_fake("m", type="solo", error="try some other time", now=True)
    before = await mesh.stats()
    for _ in range(3):
        error = await refused(mesh, "m")
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert (error.details() or "").endswith("try some other time")
    found = await status(mesh, "m")
    assert found.status == LOADED
    assert [info.location for info in found.modelCopyInfos] == ["pod-1"]
    assert (await mesh.stats())["loads"] == before["loads"]


@pytest.mark.parametrize("how", ["unloaded", "purged"])
async def test_a_model_that_its_server_has_lost_is_loaded_again(mesh, how):
    """A model that its server has lost without the agent's knowledge is loaded again by the next call. The test does
    this twice, and no caller sees an error."""
    await mesh.register_fake("m", type="solo", value=5, now=True)
    await mesh.register_fake("other", type="solo", value=6, now=True)
    stub = spi(mesh)
    for _ in range(2):
        if how == "unloaded":
            await stub.unloadModel(modelruntime_pb2.UnloadModelRequest(modelId="m"))
        else:
            await stub.runtimeStatus(modelruntime_pb2.RuntimeStatusRequest())
        assert await answer(mesh, "m") == 5
        assert await answer(mesh, "other") == 6
    found = await status(mesh, "m")
    assert (found.status, list(found.errors)) == (LOADED, [])


# --- constraints ---


async def test_a_preference_is_followed_as_long_as_there_is_room(mesh):
    """Models of a type go to the pods that the type prefers while these have room. After that a model goes to another
    pod with room, and nothing is evicted from a preferred pod."""
    assert (await mesh.register_fake("one", type="pref", size="60MiB", now=True)).status == LOADED
    assert [info.location for info in (await status(mesh, "one")).modelCopyInfos] == ["pod-2"]

    async def published() -> bool:
        found = (await mesh.rest("GET", "/mesh/v1/pods")).json["pods"]
        return {pod["pod"]: pod["used"] for pod in found}["pod-2"] == 60 << 20

    await until(published, why="the router knows that pod-2 has no room for another one")
    assert (await mesh.register_fake("two", type="pref", size="60MiB", now=True)).status == LOADED
    (info,) = (await status(mesh, "two")).modelCopyInfos
    assert info.location in ("pod-1", "pod-3")
    assert await loaded(mesh, ["one", "two"]) == ["one", "two"]
