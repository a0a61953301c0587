"""Writes of vmodels when etcd or other writers interfere: unknown outcomes, conflicts, and ids that are registered
again."""

import asyncio

import pytest

from mesh.etcd import EtcdUnavailable
from mesh.pb import agent_pb2
from mesh.schema import vmodels
from mesh.schema.records import CopyRecord
from mesh.statuses import MeshError, Reason
from placement.vmodels.changes import SetVModel
from router.management.requests import Item, MoveVModel
from router.vmodels import store
from tests.router.management.test_management import Desk
from tests.router.management.test_management import desk as desk
from tests.support.waiting import until


async def move(desk: Desk, item: Item | None = None, **change: object):
    """Changes the vmodel `v`, for instance its target."""
    return await desk.management.handlers.vmodels.set(MoveVModel("v", SetVModel(**change), item, auto_delete=True))


def unconfirmed(desk: Desk, monkeypatch, times: int = 1) -> list[str]:
    """Loses the answers to the next `times` writes. Returns a list to which each of these writes adds whether it was
    done or refused."""
    txn, happened = desk.etcd.txn, []

    async def failing(compares, success, failure=(), **more):
        result = await txn(compares, success, failure, **more)
        if compares and len(happened) < times:
            happened.append("done" if result.succeeded else "refused")
            raise EtcdUnavailable("no answer", ambiguous=True)
        return result

    monkeypatch.setattr(desk.etcd, "txn", failing)
    return happened


async def test_a_write_without_an_answer_counts_once(desk, monkeypatch):
    """If etcd made a write but its confirmation was lost, the write is found to be made. It is neither repeated nor
    counted twice."""
    happened = unconfirmed(desk, monkeypatch)
    info = await move(desk, Item("m", "onnx", "/m"), target="m", version="1")
    assert happened == ["done"]
    assert (info.record.active, dict(info.record.more.versions)) == ("m", {"1": "m"})
    assert (await desk.record("m")).refs == 1


async def test_a_rollback_without_an_answer_is_an_error_and_not_two_rollbacks(desk, monkeypatch):
    """A rollback with an unknown outcome is an error for its caller and is not repeated, because each rollback leads to
    another version."""
    for version in ("1", "2", "3"):
        await move(desk, Item(f"m{version}", "onnx", f"/{version}"), target=f"m{version}", version=version)
    unconfirmed(desk, monkeypatch)
    with pytest.raises(MeshError) as error:
        await move(desk, back=True)
    assert error.value.reason is Reason.REGISTRY_AWAY
    kv = await desk.etcd.get(desk.keys.vmodel("v"))
    assert vmodels.decode(kv.value).target == "m2"


async def test_a_change_gives_up_if_others_never_stop_writing(desk, monkeypatch):
    """A change fails with UNAVAILABLE, which says that a retry may help, if another write precedes every attempt."""
    monkeypatch.setattr(store, "PATIENCE", 1.0)
    await desk.management.register("m", "onnx", "/m")
    txn, writes = desk.etcd.txn, 0

    async def disturbed(compares, success, failure=(), **more):
        nonlocal writes
        if compares:
            writes += 1
            await desk.change("m", load_ms=writes)
        return await txn(compares, success, failure, **more)

    monkeypatch.setattr(desk.etcd, "txn", disturbed)
    with pytest.raises(MeshError, match="keep changing") as error:
        await move(desk, target="m")
    assert (error.value.reason, writes > 1) == (Reason.UNAVAILABLE, True)
    assert await desk.etcd.get(desk.keys.vmodel("v")) is None


async def test_a_late_withdrawal_spares_the_next_registration_of_the_id(desk, monkeypatch):
    """The copies of a deleted model are unloaded a moment later. The request names the deleted registration, so copies
    of a later one stay."""
    registered = asyncio.Event()
    sleep = asyncio.sleep
    monkeypatch.setattr(store, "FAREWELL", 1234.0)
    monkeypatch.setattr(store.asyncio, "sleep", lambda s: registered.wait() if s == 1234.0 else sleep(s))
    asked = []

    async def unload(pod, request, *, timeout):
        """Unloads the copy as an agent does: only if it is of the registration that the request names."""
        asked.append(request.create_revision)
        key = desk.keys.copy(request.model_id, pod.name)
        kv = await desk.etcd.get(key)
        had = kv is not None and CopyRecord.decode(kv.value).create_revision == request.create_revision
        if had:
            await desk.etcd.delete(key)
        return agent_pb2.UnloadReply(had_copy=had)

    monkeypatch.setattr(desk.agents, "unload", unload)
    await move(desk, Item("m", "onnx", "/m"), target="m")
    await desk.management.register("n", "onnx", "/n")
    desk.pod("p")
    await desk.copy("m", "p")
    former = await desk.created("m")
    await move(desk, target="n", force=True)
    await desk.etcd.delete(desk.keys.copy("m", "p"))  # the pod has evicted it
    await desk.management.register("m", "onnx", "/new")
    await desk.copy("m", "p")
    before = len(asked)
    registered.set()
    await until(lambda: len(asked) > before, why="the late withdrawal asks the pod")
    assert set(asked) == {former}
    kv = await desk.etcd.get(desk.keys.copy("m", "p"))
    assert kv is not None
    assert CopyRecord.decode(kv.value).create_revision == await desk.created("m") > former


async def test_requests_for_one_vmodel_at_the_same_time_leave_one_record(desk):
    """Twenty concurrent requests set the same vmodel to four models. They leave one record, and one reference to its
    model."""
    names = [f"m{number}" for number in range(4)]
    for name in names:
        await desk.management.register(name, "onnx", f"/{name}")
    await asyncio.gather(*(move(desk, target=names[number % 4], force=True) for number in range(20)))
    record = vmodels.decode((await desk.etcd.get(desk.keys.vmodel("v"))).value)
    assert not record.moving
    assert {name: (await desk.record(name)).refs for name in names} == {
        name: int(name == record.active) for name in names
    }
