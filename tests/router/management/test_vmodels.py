"""Virtual models through management, on a real etcd: ModelMesh's semantics, reference counts, and waits."""

import asyncio
import json
from collections import Counter
from dataclasses import replace

import pytest

from mesh.pb import modelmesh_pb2 as pb
from mesh.schema import vmodels
from mesh.schema.lives import Tombstone
from mesh.schema.records import Failure, ModelRecord
from mesh.statuses import Code, MeshError, Reason
from placement.vmodels.changes import SetVModel
from placement.vmodels.record import Mirror, VModelRecord
from router.management import vmodels as handlers
from router.management.requests import Item, MoveVModel
from router.vmodels import store
from tests.router.management.test_management import HOUR, NOW, Desk
from tests.router.management.test_management import desk as desk
from tests.support import fakecalls
from tests.support.waiting import until

SERVICE = "/mmesh.ModelMesh/"


async def put(desk: Desk, name: str, **fields: object) -> None:
    """Writes the record of a vmodel as another program would."""
    await desk.etcd.put(desk.keys.vmodel(name), json.dumps(fields).encode())


async def record_of(desk: Desk, name: str = "v") -> VModelRecord | None:
    """Returns the vmodel's record in etcd."""
    kv = await desk.etcd.get(desk.keys.vmodel(name))
    return None if kv is None else vmodels.decode(kv.value)


async def call(desk: Desk, method: str, request: object, response: type) -> object:
    """Makes a gRPC call that succeeds, and returns its reply."""
    call = await desk.call(SERVICE + method, request)
    assert call.code is Code.OK, call.text
    return response.FromString(call.answers[0][2][5:])


async def set_vmodel(desk: Desk, **fields: object) -> pb.VModelStatusInfo:
    return await call(desk, "setVModel", pb.SetVModelRequest(**{"vModelId": "v", **fields}), pb.VModelStatusInfo)


async def status(desk: Desk, **fields: object) -> pb.VModelStatusInfo:
    request = pb.GetVModelStatusRequest(**{"vModelId": "v", **fields})
    return await call(desk, "getVModelStatus", request, pb.VModelStatusInfo)


async def refused(desk: Desk, method: str = "setVModel", **fields: object) -> tuple[Code, str]:
    message = {"setVModel": pb.SetVModelRequest, "unregisterModel": pb.UnregisterModelRequest}[method]
    call = await desk.call(SERVICE + method, message(**fields))
    return call.code, call.text


async def register(desk: Desk, *models: str, **more: object) -> None:
    for model in models:
        await desk.management.register(model, "onnx", f"/{model}")
        if more:
            await desk.change(model, **more)


async def serve(desk: Desk, model: str, *pods: str) -> None:
    """Puts the pods into the view, and copies of the model in these pods into etcd."""
    for pod in pods:
        desk.pod(pod)
        desk.agents.answers.setdefault(pod, fakecalls.loaded())
        await desk.copy(model, pod)


# --- creating ---


async def test_a_vmodel_is_created_on_a_registered_model(desk):
    """A new vmodel has one model as active and target, and no owner. The model counts the reference and cannot be
    unregistered."""
    await register(desk, "a")
    info = await set_vmodel(desk, targetModelId="a")
    assert (info.status, info.activeModelId, info.targetModelId, info.owner) == (1, "a", "a", "")
    assert info.activeModelStatus.status == pb.ModelStatusInfo.NOT_LOADED
    assert not info.HasField("targetModelStatus")
    assert await status(desk) == info
    assert (await desk.etcd.get(desk.keys.vmodel("v"))).value == b'{"amid":"a","tmid":"a"}'
    assert (await desk.record("a")).refs == 1
    assert await refused(desk, "unregisterModel", modelId="a") == (
        Code.FAILED_PRECONDITION,
        "Model a has referents: move or delete the aliases that name it",
    )


async def test_a_vmodel_is_created_with_its_model(desk):
    """The transaction that creates a vmodel also registers its model, flagged for automatic deletion."""
    info = pb.ModelInfo(type="onnx", path="/a", key="k")
    await set_vmodel(desk, targetModelId="a", modelInfo=info, autoDeleteTargetModel=True, owner="me")
    record = await desk.record("a")
    assert (record.type, record.path, record.key, record.refs, record.auto_delete) == ("onnx", "/a", "k", 1, True)
    assert record.last_used_ms == NOW - 6 * HOUR
    assert await record_of(desk) == VModelRecord("a", "a", "me")
    await set_vmodel(desk, vModelId="w", targetModelId="a", modelInfo=info)
    record = await desk.record("a")
    assert (record.refs, record.auto_delete) == (2, True), "an existing model keeps its flag"


INVALID = [
    ({"vModelId": "", "targetModelId": "a"}, Code.INVALID_ARGUMENT, "Must provide vModelId"),
    ({"vModelId": "v"}, Code.INVALID_ARGUMENT, "Must provide targetModelId"),
    (
        {"vModelId": "v" * 2000, "targetModelId": "a"},
        Code.INVALID_ARGUMENT,
        "vmodel id is longer than 1024 bytes: choose a shorter one",
    ),
    (
        {"vModelId": "v", "targetModelId": "b", "modelInfo": pb.ModelInfo(path="/b")},
        Code.INVALID_ARGUMENT,
        "Must provide non-empty model type string",
    ),
    ({"vModelId": "v", "targetModelId": "b", "updateOnly": True}, Code.NOT_FOUND, "Target model b not found"),
    ({"vModelId": "w", "targetModelId": "a", "updateOnly": True}, Code.NOT_FOUND, "vmodel w not found"),
    (
        {"vModelId": "v", "targetModelId": "a", "modelInfo": pb.ModelInfo(type="other")},
        Code.ALREADY_EXISTS,
        "Model already exists with different attribute values",
    ),
    (
        {"vModelId": "v", "targetModelId": "a", "owner": "you"},
        Code.ALREADY_EXISTS,
        'vmodel v already exists with different owner "me"',
    ),
    (
        {"vModelId": "v", "targetModelId": "c", "expectedTargetModelId": "b"},
        Code.FAILED_PRECONDITION,
        "Existing target model a does not match expected b",
    ),
]


@pytest.mark.parametrize(("fields", "code", "text"), INVALID)
async def test_what_is_refused_has_modelmeshs_code_and_text(desk, fields, code, text):
    """A refused request changes nothing in etcd."""
    await register(desk, "a", "c")
    await set_vmodel(desk, targetModelId="a", owner="me")
    before = [kv async for kv in desk.etcd.scan(desk.keys.base.encode())]
    assert await refused(desk, **fields) == (code, text)
    assert [kv async for kv in desk.etcd.scan(desk.keys.base.encode())] == before


async def test_a_model_info_without_attributes_counts_as_absent(desk):
    """An empty model info counts as none, so the target must exist."""
    assert await refused(desk, vModelId="v", targetModelId="a", modelInfo=pb.ModelInfo()) == (
        Code.NOT_FOUND,
        "Target model a not found",
    )


async def test_owners(desk):
    """A request that names an owner must name the recorded owner. A request without an owner may change the vmodel
    too."""
    await register(desk, "a", "b")
    await set_vmodel(desk, targetModelId="a", owner="me")
    assert (await set_vmodel(desk, targetModelId="b", force=True)).owner == "me"
    assert (await set_vmodel(desk, targetModelId="a", force=True, owner="me")).activeModelId == "a"
    assert await status(desk, owner="you") == pb.VModelStatusInfo()
    assert (await status(desk, owner="me")).activeModelId == "a"
    await call(desk, "deleteVModel", pb.DeleteVModelRequest(vModelId="v", owner="you"), pb.DeleteVModelResponse)
    assert await record_of(desk) is not None
    await call(desk, "deleteVModel", pb.DeleteVModelRequest(vModelId="v", owner="me"), pb.DeleteVModelResponse)
    assert await record_of(desk) is None
    assert await status(desk) == pb.VModelStatusInfo()


async def test_the_default_owner_is_an_option(desk):
    """Vmodels that are created without an owner belong to the configured default owner. Vmodels with an owner keep
    theirs."""
    desk.management.handlers.vmodels._default_owner = "us"
    await register(desk, "a")
    assert (await set_vmodel(desk, targetModelId="a")).owner == "us"
    assert (await set_vmodel(desk, vModelId="w", targetModelId="a", owner="me")).owner == "me"


async def test_deleting_a_vmodel_that_is_not_there_succeeds(desk):
    for name in ("", "v"):
        await call(desk, "deleteVModel", pb.DeleteVModelRequest(vModelId=name), pb.DeleteVModelResponse)


# --- moving ---


async def test_a_move_is_left_to_the_leader_while_the_active_model_serves(desk):
    """While the active model is loaded, a new target is only recorded. Reply and status say that the move is under
    way."""
    await register(desk, "a", "b")
    await set_vmodel(desk, targetModelId="a")
    await serve(desk, "a", "p")
    info = await set_vmodel(desk, targetModelId="b", expectedTargetModelId="a")
    assert (info.status, info.activeModelId, info.targetModelId) == (2, "a", "b")
    assert info.activeModelStatus.status == pb.ModelStatusInfo.LOADED
    assert info.targetModelStatus.status == pb.ModelStatusInfo.LOADING
    assert await status(desk) == info
    assert await set_vmodel(desk, targetModelId="b", expectedTargetModelId="a") == info, "repeating it is no conflict"
    assert [(await desk.record(model)).refs for model in ("a", "b")] == [1, 1]


async def test_a_target_takes_over_the_place_of_the_active_model(desk):
    """A target takes over the last use of the model that it replaces, so it is not evicted first. A target with a later
    last use keeps its own."""
    await register(desk, "a", last_used_ms=NOW - 10)
    await register(desk, "b", last_used_ms=NOW - 10 * HOUR)
    await set_vmodel(desk, targetModelId="a")
    await set_vmodel(desk, targetModelId="b")
    assert (await desk.record("b")).last_used_ms == NOW - 10
    await set_vmodel(desk, targetModelId="c", modelInfo=pb.ModelInfo(type="onnx"))
    assert (await desk.record("c")).last_used_ms == NOW - 10
    await register(desk, "d", last_used_ms=NOW)
    await set_vmodel(desk, targetModelId="d")
    assert (await desk.record("d")).last_used_ms == NOW


async def test_a_vmodel_whose_active_model_has_no_copies_moves_at_once(desk):
    """If the active model has no copies, the write that sets a target also moves the vmodel. The former model can then
    be unregistered."""
    await register(desk, "a", "b")
    await set_vmodel(desk, targetModelId="a")
    info = await set_vmodel(desk, targetModelId="b")
    assert (info.status, info.activeModelId) == (1, "b")
    assert [(await desk.record(model)).refs for model in ("a", "b")] == [0, 1]
    assert await desk.management.unregister("a")


async def test_the_target_is_loaded_at_once_where_it_serves_at_once(desk):
    """A target that becomes active at once is loaded if `loadNow` is set, or if the former model was loaded."""
    await register(desk, "a", "b", "c")
    await set_vmodel(desk, targetModelId="a")
    desk.pod("p")
    desk.agents.answers["p"] = fakecalls.loaded()
    await set_vmodel(desk, targetModelId="b")
    assert desk.agents.loads == []
    info = await set_vmodel(desk, targetModelId="a", loadNow=True, sync=True)
    assert [request.model_id for _, request in desk.agents.loads] == ["a"]
    assert info.activeModelStatus.status == pb.ModelStatusInfo.LOADED
    await desk.copy("a", "p")
    await set_vmodel(desk, targetModelId="c", force=True)
    assert [request.model_id for _, request in desk.agents.loads] == ["a", "c"]


async def test_a_model_that_is_to_be_deleted_automatically_goes_with_its_last_reference(desk, monkeypatch):
    """A model that is deleted with its last reference leaves a tombstone until its copies are unloaded a moment later.
    Then its id can be registered with other attributes."""
    monkeypatch.setattr(store, "FAREWELL", 0.05)
    info = pb.ModelInfo(type="onnx", path="/a")
    for name in ("v", "w"):
        await set_vmodel(desk, vModelId=name, targetModelId="a", modelInfo=info, autoDeleteTargetModel=True)
    await register(desk, "b")
    await serve(desk, "a", "p")
    created = await desk.created("a")
    await set_vmodel(desk, targetModelId="b", force=True)
    assert (await desk.record("a")).refs == 1
    await set_vmodel(desk, vModelId="w", targetModelId="b", force=True)
    assert await desk.etcd.get(desk.keys.model("a")) is None
    assert Tombstone.decode((await desk.etcd.get(desk.keys.tombstone("a"))).value).path == "/a"
    await until(lambda: desk.agents.unloads, why="its copy is unloaded")
    assert desk.agents.unloads == [("p", "a")]
    assert created
    await desk.etcd.delete(desk.keys.copy("a", "p"))
    assert (await desk.management.register("a", "onnx", "/other")).created


async def test_deleting_a_vmodel_releases_both_of_its_models(desk):
    """Deleting a vmodel in the middle of a move releases both of its models. The model that was registered for the
    vmodel is deleted."""
    await register(desk, "a")
    await set_vmodel(desk, targetModelId="a")
    await serve(desk, "a", "p")
    await set_vmodel(desk, targetModelId="b", modelInfo=pb.ModelInfo(type="onnx"), autoDeleteTargetModel=True)
    await call(desk, "deleteVModel", pb.DeleteVModelRequest(vModelId="v"), pb.DeleteVModelResponse)
    assert (await desk.record("a")).refs == 0
    assert await desk.etcd.get(desk.keys.model("b")) is None
    assert await status(desk) == pb.VModelStatusInfo()


async def test_a_failed_move_says_why(desk):
    """After a failed move, the target has the status of a failed load. The leader's reason comes before those of the
    pods."""
    await register(desk, "a", "b")
    await desk.change("b", failures=(Failure("p", NOW - 1, "bad file"),), refs=1)
    await desk.change("a", refs=1)
    await serve(desk, "a", "p")
    await put(desk, "v", amid="a", tmid="b", failed=True, mesh={"why": "no room"})
    info = await status(desk)
    assert info.status == pb.VModelStatusInfo.TRANSITION_FAILED
    assert info.targetModelStatus.status == pb.ModelStatusInfo.LOADING_FAILED
    assert list(info.targetModelStatus.errors) == ["no room", "bad file"]
    assert [copy.location for copy in info.targetModelStatus.modelCopyInfos] == ["p"]
    await set_vmodel(desk, targetModelId="a")
    assert await record_of(desk) == VModelRecord("a", "a")


async def test_a_vmodel_that_moved_between_two_reads_is_read_again(desk):
    """If the active model is gone when a vmodel's status is read, the vmodel is read once more."""
    await register(desk, "b", refs=1)
    await put(desk, "v", amid="gone", tmid="gone")
    reporter, read = desk.management.handlers.status, desk.management.handlers.status.of

    async def of(model_id):
        if model_id == "gone":
            await put(desk, "v", amid="b", tmid="b")
        return await read(model_id)

    desk.management.handlers.vmodels._status = type("Reporter", (), {"of": staticmethod(of)})()
    assert (await status(desk)).activeModelId == "b"
    desk.management.handlers.vmodels._status = reporter
    await put(desk, "v", amid="gone", tmid="gone")
    info = await status(desk)
    assert (info.status, info.activeModelStatus.status) == (1, pb.ModelStatusInfo.NOT_FOUND)


# --- waiting ---


async def test_sync_waits_for_the_end_of_a_move(desk):
    """A request with `sync` waits until the move has ended or failed, the vmodel has another target, or the vmodel is
    deleted."""
    await register(desk, "a", "b", "c")
    await set_vmodel(desk, targetModelId="a")
    await serve(desk, "a", "p")
    for end, expected in (
        ({"amid": "b", "tmid": "b"}, (1, "b")),
        ({"amid": "a", "tmid": "b", "failed": True}, (3, "b")),
        ({"amid": "a", "tmid": "c"}, (2, "c")),
        (None, (0, "")),
    ):
        await put(desk, "v", amid="a", tmid="a")
        waits = asyncio.create_task(set_vmodel(desk, targetModelId="b", sync=True))
        await until(lambda: desk.management.handlers.vmodels._waiting, why="the request waits")
        assert not waits.done()
        if end is None:
            await desk.etcd.delete(desk.keys.vmodel("v"))
        else:
            await put(desk, "v", **end)
        desk.changed("v")
        info = await waits
        assert (info.status, info.targetModelId) == expected
    assert not desk.management.handlers.vmodels._waiting


async def test_a_wait_is_bounded(desk):
    """A request with `sync` that waits too long fails with DEADLINE, but its change has been made."""
    await register(desk, "a", "b")
    await set_vmodel(desk, targetModelId="a")
    await serve(desk, "a", "p")
    with pytest.raises(MeshError, match=r"has not moved to model b within 0\.05 s; the move continues") as error:
        await desk.management.handlers.vmodels.set(MoveVModel("v", SetVModel(target="b"), sync=True, wait=0.05))
    assert error.value.reason is Reason.DEADLINE
    assert await record_of(desk) == VModelRecord("a", "b")


async def test_no_more_requests_wait_than_a_worker_allows(desk, monkeypatch):
    """If too many requests wait already, a further one is refused before it changes anything."""
    monkeypatch.setattr(handlers, "MAX_WAITS", 1)
    await register(desk, "a", "b", "c")
    await set_vmodel(desk, targetModelId="a")
    await serve(desk, "a", "p")
    waits = asyncio.create_task(set_vmodel(desk, targetModelId="b", sync=True))
    await until(lambda: desk.management.handlers.vmodels._waiting, why="the request waits")
    code, text = await refused(desk, vModelId="v", targetModelId="c", sync=True)
    assert (code, "1 requests are already waiting for moves" in text) == (Code.RESOURCE_EXHAUSTED, True)
    assert (await record_of(desk)).target == "b"
    await set_vmodel(desk, targetModelId="a")
    await waits


async def test_a_cancelled_call_ends_its_wait(desk):
    await register(desk, "a", "b")
    await set_vmodel(desk, targetModelId="a")
    await serve(desk, "a", "p")
    frame = pb.SetVModelRequest(vModelId="v", targetModelId="b", sync=True).SerializeToString()
    call = fakecalls.FakeCall(b"/mmesh.ModelMesh/setVModel", frame=b"\0" + len(frame).to_bytes(4, "big") + frame)
    desk.dispatcher.dispatch(call)
    await until(lambda: desk.management.handlers.vmodels._waiting, why="the request waits")
    call.cancel()
    await until(lambda: not desk.management.handlers.vmodels._waiting, why="the wait ends")


async def test_what_a_reply_says_is_known_to_its_worker_before_the_feed_reports_it(desk):
    """Management passes each vmodel that it has read or written to its worker, so calls through this worker follow the
    reply even if the feed lags."""
    await register(desk, "a", "b")
    await set_vmodel(desk, targetModelId="a")
    name, kv, revision = desk.noted[-1]
    assert (name, kv.value) == ("v", b'{"amid":"a","tmid":"a"}')
    assert revision == (await desk.etcd.get(desk.keys.vmodel("v"))).mod_revision
    await put(desk, "v", amid="b", tmid="b")
    await status(desk)
    assert vmodels.decode(desk.noted[-1][1].value).active == "b"
    await call(desk, "deleteVModel", pb.DeleteVModelRequest(vModelId="v"), pb.DeleteVModelResponse)
    assert desk.noted[-1][:2] == ("v", None)


# --- versions, splits ---


async def set_version(desk: Desk, version: str, **more: object) -> handlers.VModelInfo:
    """Registers a version in the way the command line does."""
    item = Item(f"v@{version}", "onnx", f"/{version}")
    change = SetVModel(target=item.model_id, version=version, **more)
    return await desk.management.handlers.vmodels.set(MoveVModel("v", change, item, auto_delete=True))


async def test_versions_are_kept_and_dropped_with_their_models(desk):
    """A vmodel keeps the last two versions before the present one. The models of older versions are unregistered."""
    for version in ("5", "6", "7", "8"):
        info = await set_version(desk, version)
    assert dict(info.record.more.versions) == {"6": "v@6", "7": "v@7", "8": "v@8"}
    assert await desk.etcd.get(desk.keys.model("v@5")) is None
    assert [(await desk.record(f"v@{version}")).refs for version in ("6", "7", "8")] == [1, 1, 1]
    info = await desk.management.handlers.vmodels.set(MoveVModel("v", SetVModel(back=True)))
    assert info.record.active == "v@7"
    with pytest.raises(MeshError, match="v has no version 5: it has 6, 7, 8") as error:
        await desk.management.handlers.vmodels.set(MoveVModel("v", SetVModel(version="5")))
    assert error.value.reason is Reason.UNKNOWN_VERSION


async def test_a_new_target_must_be_permitted(desk):
    """The caller must be allowed to choose the target, even if the request names it by version or not at all. A refused
    request changes nothing, and a request that keeps the target needs no permission."""
    for version in ("5", "6"):
        await set_version(desk, version)
    asked = []

    def permit(target: str) -> None:
        asked.append(target)
        raise MeshError(Reason.FORBIDDEN, "not yours")

    vmodels = desk.management.handlers.vmodels
    for change in (SetVModel(back=True), SetVModel(version="5"), SetVModel(target="v@5")):
        with pytest.raises(MeshError, match="not yours"):
            await vmodels.set(MoveVModel("v", change), permit)
    assert asked == ["v@5"] * 3
    assert (await record_of(desk)).active == "v@6"
    await vmodels.set(MoveVModel("v", SetVModel(keep=1)), permit)
    await vmodels.set(MoveVModel("v", SetVModel(back=True)), asked.append)
    assert asked == ["v@5"] * 4
    assert (await record_of(desk)).active == "v@5"


async def test_a_dropped_version_may_come_back_with_another_file(desk):
    await set_version(desk, "1", keep=0)
    await set_version(desk, "2")
    await set_version(desk, "3")
    item = Item("v@1", "onnx", "/other")
    info = await desk.management.handlers.vmodels.set(
        MoveVModel("v", SetVModel(target="v@1", version="1"), item, auto_delete=True)
    )
    assert (info.record.active, (await desk.record("v@1")).path) == ("v@1", "/other")


async def test_a_target_waits_for_the_copies_of_its_ids_former_registration(desk):
    """If a target's id still has copies of a former registration, the target is registered once they are withdrawn."""
    desk.pod("p")
    await desk.etcd.put(desk.keys.copy("b", "p"), b"{}")
    waits = asyncio.create_task(set_vmodel(desk, targetModelId="b", modelInfo=pb.ModelInfo(type="onnx")))
    await until(lambda: desk.agents.unloads == [("p", "b")], why="the former copy is withdrawn")
    assert await record_of(desk) is None
    await desk.etcd.delete(desk.keys.copy("b", "p"))
    assert (await waits).activeModelId == "b"
    assert (await desk.record("b")).refs == 1


async def test_a_split_counts_in_all_its_models(desk):
    """A split and a mirror count as references to all of their models, and release them when they end."""
    await register(desk, "a", "b", "c")
    change = SetVModel(weights={"a": 90, "b": 10}, mirror=Mirror("c", 5.0), sticky="x-user")
    info = await desk.management.handlers.vmodels.set(MoveVModel("v", change))
    assert (info.record.active, info.created) == ("a", True)
    assert [(await desk.record(model)).refs for model in "abc"] == [1, 1, 1]
    await desk.management.handlers.vmodels.set(MoveVModel("v", SetVModel(weights={}, no_mirror=True)))
    assert [(await desk.record(model)).refs for model in "abc"] == [1, 0, 0]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (SetVModel(target="a", version="a b"), "a version is 1 to 64"),
        (SetVModel(sticky="X-User"), "sticky names a header in lower case"),
        (SetVModel(mirror=Mirror("a", 0.0)), "a percentage above 0"),
        (SetVModel(weights={"a": -1}), "a whole number from 0"),
        (SetVModel(weights={"a": 0}), "add up to 0"),
        (SetVModel(target="b", weights={"a": 1}), "has no weight"),
        (SetVModel(weights={"": 1, "a": 1}, target="a"), "must provide non-empty modelId"),
    ],
)
async def test_what_a_request_may_not_say(desk, change, text):
    with pytest.raises(MeshError, match=text) as error:
        await desk.management.handlers.vmodels.set(MoveVModel("v", change))
    assert error.value.reason is Reason.BAD_REQUEST


# --- counts ---


async def test_reference_counts_stay_right_while_others_write(desk):
    """Reference counts stay right while eight callers move eight vmodels among three models and others change the
    models' records."""
    await register(desk, "a", "b", "c")

    async def wander(number: int) -> None:
        for step in range(6):
            target = "abc"[(number + step) % 3]
            await set_vmodel(desk, vModelId=f"v{number}", targetModelId=target, force=step % 2 == 0)

    async def disturb(model: str) -> None:
        for step in range(20):
            await desk.management.handlers.registration._registry.change(
                model, lambda record, step=step: replace(record, load_ms=step)
            )

    await asyncio.gather(*map(wander, range(8)), *map(disturb, "abc"))
    named = Counter()
    async for kv in desk.etcd.scan(desk.keys.vmodels):
        named.update(vmodels.decode(kv.value).names())
    assert {model: (await desk.record(model)).refs for model in "abc"} == named


async def test_records_that_name_missing_models_can_be_deleted(desk):
    """A vmodel that names models that are not registered, as after a restore, has a status and can be deleted."""
    await put(desk, "v", amid="gone", tmid="away", mesh={"weights": {"nowhere": 1}})
    assert (await status(desk)).activeModelId == "gone"
    await call(desk, "deleteVModel", pb.DeleteVModelRequest(vModelId="v"), pb.DeleteVModelResponse)
    assert await record_of(desk) is None


async def test_a_record_that_cannot_be_read_is_an_internal_error(desk):
    """The status of a vmodel whose record cannot be read is an error that names the vmodel. A list leaves it out."""
    await desk.etcd.put(desk.keys.vmodel("v"), b"[]")
    call_ = await desk.call(SERVICE + "getVModelStatus", pb.GetVModelStatusRequest(vModelId="v"))
    assert (call_.code, "the record of vmodel v in etcd cannot be read" in call_.text) == (Code.INTERNAL, True)
    await put(desk, "w", amid="a", tmid="a")
    page = await desk.management.handlers.vmodels.page()
    assert [name for name, _ in page.vmodels] == ["w"]


UNREADABLE = {
    "no JSON": (b"\xff\0", set()),
    "no object": (b"[]", set()),
    "no model": (b"{}", set()),
    "a bad weight": (b'{"amid":"a","mesh":{"weights":{"a":1,"b":-1}}}', {"a", "b"}),
    "a bad version": (b'{"tmid":"a","mesh":{"versions":{"1":"b","2":7,"3":null}}}', {"a", "b"}),
    "a bad mirror": (b'{"amid":"a","tmid":"b","mesh":{"mirror":{"target":"c","share":101}}}', {"a", "b", "c"}),
    "bad names": (b'{"amid":"\\ud800","tmid":7,"mesh":{"versions":{"1":"a\\u0000","2":"\\udfff","3":"c"}}}', {"c"}),
}


@pytest.mark.parametrize("kind", UNREADABLE)
async def test_a_record_that_cannot_be_read_can_be_deleted(desk, kind):
    """The deletion releases all models whose ids can still be read in the record, so these models can be unregistered.
    A model that was registered with the alias is deleted with it. The status names this way out."""
    value, named = UNREADABLE[kind]
    await register(desk, "a", "b", "c")
    for model in named:
        await desk.change(model, refs=1, auto_delete=model == "b")
    await desk.etcd.put(desk.keys.vmodel("v"), value)
    call_ = await desk.call(SERVICE + "getVModelStatus", pb.GetVModelStatusRequest(vModelId="v"))
    assert (call_.code, "delete the vmodel, and set it again" in call_.text) == (Code.INTERNAL, True)
    await call(desk, "deleteVModel", pb.DeleteVModelRequest(vModelId="v"), pb.DeleteVModelResponse)
    assert await desk.etcd.get(desk.keys.vmodel("v")) is None
    left = {model: await desk.etcd.get(desk.keys.model(model)) for model in "abc"}
    assert {model for model, kv in left.items() if kv is None} == named & {"b"}
    assert all(ModelRecord.decode(kv.value).refs == 0 for kv in left.values() if kv is not None)
    await set_vmodel(desk, targetModelId="a")
    assert (await status(desk)).activeModelId == "a"


async def test_a_record_that_cannot_be_read_is_not_deleted_for_another_owner(desk):
    """A request that names an owner deletes the record only if the record's owner can be read and is the same."""
    for owner in (b'"me"', b"7"):
        await desk.etcd.put(desk.keys.vmodel("v"), b'{"o":%s,"amid":"","tmid":""}' % owner)
        request = pb.DeleteVModelRequest(vModelId="v", owner="other")
        await call(desk, "deleteVModel", request, pb.DeleteVModelResponse)
        assert await desk.etcd.get(desk.keys.vmodel("v")) is not None
    await desk.etcd.put(desk.keys.vmodel("v"), b'{"o":"me"}')
    await call(desk, "deleteVModel", pb.DeleteVModelRequest(vModelId="v", owner="me"), pb.DeleteVModelResponse)
    assert await desk.etcd.get(desk.keys.vmodel("v")) is None


async def test_a_model_whose_record_cannot_be_read_can_be_unregistered(desk):
    """Such a model can be unregistered alone, with others, or once the vmodel that names it is deleted."""
    await register(desk, "a", "b", "c", "d")
    await set_vmodel(desk, targetModelId="c")
    for model in "abc":
        await desk.etcd.put(desk.keys.model(model), b"damaged")
    call_ = await desk.call(SERVICE + "getModelStatus", pb.GetStatusRequest(modelId="a"))
    assert "unregister the model, and register it again" in call_.text
    assert await desk.management.unregister("a")
    assert await desk.management.handlers.registration.unregister_many(["b", "d"]) == [None, None]
    await call(desk, "deleteVModel", pb.DeleteVModelRequest(vModelId="v"), pb.DeleteVModelResponse)
    assert await desk.management.unregister("c")
    assert [kv async for kv in desk.etcd.scan(desk.keys.registry)] == []
    await register(desk, "a")


async def test_vmodels_are_listed_page_by_page(desk):
    for name in ("a1", "b1", "b2", "b3"):
        await put(desk, name, amid="m", tmid="m")
    page = await desk.management.handlers.vmodels.page(prefix="b", limit=2)
    assert ([name for name, _ in page.vmodels], page.next) == (["b1", "b2"], "b2")
    page = await desk.management.handlers.vmodels.page(prefix="b", after="b2")
    assert ([name for name, _ in page.vmodels], page.next) == (["b3"], None)


async def test_a_model_without_vmodels_keeps_modelmeshs_attributes(desk):
    """`refs` and `autoDel` are left out if they have their default values, and otherwise written as ModelMesh
    writes them."""
    await register(desk, "a")
    assert not {"refs", "autoDel"} & json.loads((await desk.record("a")).encode()).keys()
    info = pb.ModelInfo(type="onnx", path="/b")
    await set_vmodel(desk, targetModelId="b", modelInfo=info, autoDeleteTargetModel=True)
    fields = json.loads((await desk.etcd.get(desk.keys.model("b"))).value)
    assert (fields["refs"], fields["autoDel"]) == (1, True)
    assert ModelRecord.decode(json.dumps(fields).encode()).auto_delete
