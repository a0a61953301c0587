"""Management on a real etcd: ModelMesh's semantics and texts, lists, bulk operations, and copies of former
registrations."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace

import pytest

from mesh.etcd import Etcd, KeyValue
from mesh.etcd.ranges import after_prefix
from mesh.pb import modelmesh_pb2 as pb
from mesh.schema.keys import Keys
from mesh.schema.records import LOADED, LOADING, CopyRecord, Failure, ModelRecord, PodRecord, Reload
from mesh.statuses import Code, MeshError, Reason
from mesh.telemetry import metrics
from mesh.wire import framing
from placement.copies import CopyLimits
from router.access.audit import Audit
from router.calls.dispatch import Dispatcher
from router.calls.forwarder import Forwarder
from router.calls.meter import Meter
from router.calls.routes import Routes
from router.fencing.tombstones import Tombstones
from router.loads.coldstart import ColdStart
from router.management.handlers import Management
from router.management.requests import Item
from router.services import modelmesh
from router.settings import RouterSettings
from router.state.registry import Registry
from router.state.view import View
from router.state.vmodels import Vmodels
from tests.support import fakecalls
from tests.support.access import open_guard
from tests.support.asked import Asked
from tests.support.fakecalls import FakeAgents, FakeCall, FakePool
from tests.support.waiting import until

NOW = 1_700_000_000_000
HOUR = 3_600_000


@dataclass
class Desk:
    """A management with fake agents, and a view that the test fills."""

    management: Asked
    etcd: Etcd
    keys: Keys
    agents: FakeAgents
    view: View
    dispatcher: Dispatcher
    listeners: list[Callable[[str], None]] = field(default_factory=list)  # of changes of vmodels
    noted: list[tuple[str, KeyValue | None, int]] = field(default_factory=list)  # vmodels as read and written

    def changed(self, vmodel: str) -> None:
        """Reports a change of a vmodel, as the feed does."""
        for listener in self.listeners:
            listener(vmodel)

    async def record(self, model_id: str = "m") -> ModelRecord:
        """Returns the model's record in etcd."""
        kv = await self.etcd.get(self.keys.model(model_id))
        assert kv is not None
        return ModelRecord.decode(kv.value)

    async def change(self, model_id: str = "m", **more: object) -> None:
        """Changes the model's record in etcd, as agents do."""
        record = replace(await self.record(model_id), **more)  # type: ignore[arg-type]
        await self.etcd.put(self.keys.model(model_id), record.encode())

    async def created(self, model_id: str = "m") -> int:
        """Returns the create revision of the model's record."""
        kv = await self.etcd.get(self.keys.model(model_id))
        assert kv is not None
        return kv.create_revision

    def pod(self, name: str = "a", **more: object) -> None:
        """Puts a pod into the view."""
        record = PodRecord("i", f"{name}:1", f"{name}:2", capacity_bytes=1 << 30, **more)  # type: ignore[arg-type]
        self.view.delta(1, [(self.keys.pod(name), record.encode())])

    async def copy(self, model_id: str, pod: str, state: str = LOADED, *, created: int = 0) -> None:
        """Puts a copy into etcd."""
        since = NOW - 5000  # the last use is a separate time
        record = CopyRecord("i", created or await self.created(model_id), state, 1000, 24, 777_000, since_ms=since)
        await self.etcd.put(self.keys.copy(model_id, pod), record.encode())

    async def call(self, method: str, request: object, **more: object) -> FakeCall:
        """Makes a gRPC call, and returns the call once it is answered."""
        frame = framing.pack(request.SerializeToString())  # type: ignore[attr-defined]
        call = FakeCall(method.encode(), frame=frame, **more)  # type: ignore[arg-type]
        self.dispatcher.dispatch(call)
        await until(lambda: bool(call.answers), interval=0.001)
        return call


@pytest.fixture
async def desk(etcd: Etcd, keys: Keys) -> AsyncIterator[Desk]:
    settings = RouterSettings("r", unload_wait=0.5, registry_timeout=2.0)
    view = View(keys, FakePool)  # type: ignore[arg-type]
    agents = FakeAgents()
    registry = Registry(etcd, keys, timeout=2.0)
    meter = Meter(metrics.Registry())
    coldstart = ColdStart(view=view, registry=registry, agents=agents, meter=meter, settings=settings, wall=lambda: NOW)
    forwarder = Forwarder(
        view=view,
        coldstart=coldstart,
        registry=registry,
        meter=meter,
        counted=metrics.Registry(),
        vmodels=Vmodels(keys),
        settings=settings,
    )
    dispatcher = Dispatcher(forwarder, Routes())
    listeners: list[Callable[[str], None]] = []
    noted: list[tuple[str, KeyValue | None, int]] = []
    management = Management.of(
        etcd=etcd,
        keys=keys,
        registry=registry,
        view=view,
        coldstart=coldstart,
        agents=agents,
        tombstones=Tombstones(etcd, keys, agents),
        settings=settings,
        listen=listeners.append,
        note=lambda *noted_: noted.append(noted_),
        wall=lambda: NOW,
    )
    dispatcher.serve(modelmesh.methods(management, meter.managed, open_guard(), Audit("off")))
    yield Desk(Asked(management), etcd, keys, agents, view, dispatcher, listeners, noted)
    await management.vmodels.close()
    await coldstart.close()
    await forwarder.close()
    await registry.close()


# --- registering ---


async def test_a_model_is_registered(desk):
    status = await desk.management.register("m", "onnx", "file:///m", "k")
    assert (status.status, status.created, status.copies) == ("NOT_LOADED", True, ())
    record = await desk.record()
    assert (record.type, record.path, record.key, record.last_used_ms) == ("onnx", "file:///m", "k", NOW - 6 * HOUR)
    again = await desk.management.register("m", "onnx", "file:///m", "k")
    assert (again.status, again.created) == ("NOT_LOADED", False)


@pytest.mark.parametrize("special", ["***LOGCACHE***", "***GETSTATE***"])
async def test_modelmeshs_special_ids_are_ordinary_ids(desk, special):
    """ModelMesh answers a status request for these ids with its state, or logs the state. Here they name no model until
    one is registered."""
    ask = pb.GetStatusRequest(modelId=special)
    seen = []
    for _ in range(2):
        call = await desk.call("/mmesh.ModelMesh/getModelStatus", ask)
        seen.append(pb.ModelStatusInfo.FromString(call.answers[0][2][framing.PREFIX :]))
        await desk.management.register(special, "onnx", "p")
    assert [(info.status, list(info.errors)) for info in seen] == [
        (pb.ModelStatusInfo.NOT_FOUND, []),
        (pb.ModelStatusInfo.NOT_LOADED, []),
    ]


@pytest.mark.parametrize("other", [("onnx2", "p", "k"), ("onnx", "p2", "k"), ("onnx", "p", "k2")])
async def test_other_attributes_are_a_conflict(desk, other):
    await desk.management.register("m", "onnx", "p", "k")
    with pytest.raises(MeshError) as error:
        await desk.management.register("m", *other)
    assert error.value.reason is Reason.CONFLICT
    assert error.value.text == "Model already exists with different attribute values"
    names = [
        name for name, one, two in zip(("type", "path", "key"), ("onnx", "p", "k"), other, strict=True) if one != two
    ]
    assert error.value.details == {"differs": ",".join(names)}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        pytest.param(("", "onnx"), "must provide non-empty modelId", id="no-id"),
        pytest.param(("m", ""), "Must provide non-empty model type string", id="no-type"),
        pytest.param(("m" * 2000, "onnx"), "longer than", id="long-id"),
        pytest.param(("a\0b", "onnx"), "characters", id="nul"),
        pytest.param(("m", "on\ud800nx"), "valid Unicode", id="surrogate"),
    ],
)
async def test_what_cannot_be_registered(desk, arguments, text):
    with pytest.raises(MeshError, match=text) as error:
        await desk.management.register(*arguments)
    assert error.value.reason is Reason.BAD_REQUEST


DIGEST = "ab" * 32


async def test_a_digest_is_part_of_a_registration_that_names_it(desk):
    """A digest in a registration is recorded in lower case. Registering again without a digest changes nothing. Another
    digest is refused. A first digest for an existing registration is refused too, because nothing would check it."""
    await desk.management.register("m", "onnx", "p", sha256=DIGEST.upper())
    assert (await desk.record()).sha256 == DIGEST
    assert not (await desk.management.register("m", "onnx", "p")).created
    assert not (await desk.management.register("m", "onnx", "p", sha256=DIGEST)).created
    with pytest.raises(MeshError) as error:
        await desk.management.register("m", "onnx", "p", sha256="cd" * 32)
    assert error.value.reason is Reason.CONFLICT
    await desk.management.register("without", "onnx", "p")
    with pytest.raises(MeshError):
        await desk.management.register("without", "onnx", "p", sha256=DIGEST)
    fates = await desk.management.register_many([Item("n", "onnx", "p", "", DIGEST), Item("o", "onnx", "p", "", "abc")])
    assert fates[0] is None
    assert isinstance(fates[1], MeshError)
    assert "sha256sum" in fates[1].text
    assert (await desk.record("n")).sha256 == DIGEST


@pytest.mark.parametrize(
    ("given", "load_now", "expected"),
    [
        pytest.param(0, False, NOW - 6 * HOUR, id="default"),
        pytest.param(0, True, NOW - HOUR, id="default-load-now"),
        pytest.param(NOW - 5, False, NOW - 5, id="given"),
        pytest.param(NOW + 5, False, NOW, id="in-the-future"),
    ],
)
async def test_the_recency_of_a_new_model(desk, given, load_now, expected):
    desk.pod()
    desk.agents.answers["a"] = fakecalls.loaded()
    await desk.management.register("m", "onnx", load_now=load_now, last_used_ms=given)
    assert (await desk.record()).last_used_ms == expected


async def test_an_existing_model_only_becomes_much_more_recent(desk):
    """An existing model's last use is rewritten only if the new time is later by more than an hour."""
    await desk.management.register("m", "onnx", last_used_ms=NOW - 5 * HOUR)
    await desk.management.register("m", "onnx", last_used_ms=NOW - 4 * HOUR)
    assert (await desk.record()).last_used_ms == NOW - 5 * HOUR
    await desk.management.register("m", "onnx", last_used_ms=NOW - 4 * HOUR + 1)
    assert (await desk.record()).last_used_ms == NOW - 4 * HOUR + 1
    await desk.management.register("m", "onnx")
    assert (await desk.record()).last_used_ms == NOW - 4 * HOUR + 1


async def test_fifty_registrations_of_one_id_at_once_create_it_once(desk):
    statuses = await asyncio.gather(*(desk.management.register("m", "onnx") for _ in range(50)))
    assert sum(status.created for status in statuses) == 1


async def test_unknown_attributes_survive(desk):
    """Attributes that ModelMesh or a later version of Mesh has written into a record survive."""
    await desk.etcd.put(desk.keys.model("m"), b'{"type":"onnx","new":{"x":[1]},"mesh":{"later":2},"lu":5}')
    await desk.management.register("m", "onnx", last_used_ms=NOW)
    await desk.management.release("m")
    kv = await desk.etcd.get(desk.keys.model("m"))
    assert b'"new":{"x":[1]}' in kv.value
    assert b'"later":2' in kv.value


async def test_copies_of_a_former_life_are_withdrawn_first(desk):
    """The agents unload the copies of the former registration. The new registration waits until etcd has no keys of
    these copies."""
    await desk.management.register("m", "onnx")
    desk.pod("a")
    await desk.copy("m", "a")
    await desk.etcd.delete(desk.keys.model("m"))
    registering = asyncio.create_task(desk.management.register("m", "onnx", "new"))
    await until(lambda: desk.agents.unloads)
    assert desk.agents.unloads == [("a", "m")]
    assert not registering.done()
    await desk.etcd.delete(desk.keys.copy("m", "a"))
    assert (await registering).created


async def test_copies_of_a_former_life_that_stay_refuse_the_registration(desk):
    await desk.management.register("m", "onnx")
    await desk.copy("m", "stuck")
    await desk.etcd.delete(desk.keys.model("m"))
    with pytest.raises(MeshError, match="stuck") as error:
        await desk.management.register("m", "onnx")
    assert error.value.reason is Reason.FORMER_LIFE
    assert error.value.retry_after
    assert await desk.etcd.get(desk.keys.model("m")) is None


async def test_an_id_that_begins_like_another_is_another(desk):
    """The keys of `a/b` are not in the range of `a`."""
    await desk.management.register("a", "onnx")
    await desk.copy("a", "p")
    assert (await desk.management.register("a/b", "onnx")).created
    await desk.management.unregister("a")
    assert await desk.record("a/b")


# --- unregistering ---


async def test_a_model_is_unregistered_and_its_copies_withdrawn(desk):
    await desk.management.register("m", "onnx")
    for name in ("a", "b"):
        desk.pod(name)
        await desk.copy("m", name)
    assert await desk.management.unregister("m") is True
    assert sorted(desk.agents.unloads) == [("a", "m"), ("b", "m")]
    assert await desk.etcd.get(desk.keys.model("m")) is None
    assert await desk.management.unregister("m") is False


async def test_the_copies_of_suspects_are_withdrawn_too(desk):
    """A suspect pod has no keys in etcd any more, but its copies may still answer."""
    await desk.management.register("m", "onnx")
    desk.pod("a")
    record = CopyRecord("i", await desk.created(), LOADED)
    desk.view.delta(2, [(desk.keys.copy("m", "a"), record.encode())])
    desk.view.delta(3, [(desk.keys.copy("m", "a"), None), (desk.keys.pod("a"), None)])
    assert desk.view.pods["a"].suspect
    await desk.management.unregister("m")
    assert desk.agents.unloads == [("a", "m")]
    assert not desk.view.copies


async def test_a_model_with_referents_stays(desk):
    await desk.management.register("m", "onnx")
    await desk.change(refs=1)
    with pytest.raises(MeshError) as error:
        await desk.management.unregister("m")
    assert (error.value.reason, error.value.text) == (
        Reason.PRECONDITION,
        "Model m has referents: move or delete the aliases that name it",
    )
    assert await desk.record()


# --- status ---


async def test_the_status_of_a_model(desk):
    """The status is read from etcd, because this router's view may not show the latest changes yet."""
    management = desk.management
    assert (await management.status("m")).status == "NOT_FOUND"
    await management.register("m", "onnx")
    assert (await management.status("m")).status == "NOT_LOADED"
    await desk.copy("m", "a", LOADING)
    status = await management.status("m")
    assert (status.status, [(info.pod, info.status) for info in status.copies]) == ("LOADING", [("a", "LOADING")])
    await desk.copy("m", "b")
    status = await management.status("m")
    assert status.status == "LOADED"
    assert {(info.pod, info.status, info.bytes) for info in status.copies} >= {("b", "LOADED", 1024)}


async def test_copies_of_a_former_life_do_not_count(desk):
    await desk.management.register("m", "onnx")
    await desk.copy("m", "a", created=1)
    assert (await desk.management.status("m")).status == "NOT_LOADED"


async def test_the_watch_may_be_ahead_of_the_read(desk, monkeypatch):
    """If the watch learns something during a status read, such as the end of a load, it is newer than the read and
    counts."""
    await desk.management.register("m", "onnx")
    desk.pod()
    await desk.copy("m", "a", "loading")
    transaction = desk.etcd.txn

    async def slow(*arguments, **more):
        result = await transaction(*arguments, **more)
        loaded = CopyRecord("i", await desk.created(), LOADED, 1000)
        desk.view.delta(result.revision + 1, [(desk.keys.copy("m", "a"), loaded.encode())])
        return result

    monkeypatch.setattr(desk.etcd, "txn", slow)
    assert (await desk.management.status("m")).status == "LOADED"


async def test_failures_are_told_newest_first_until_they_expire(desk):
    await desk.management.register("m", "onnx")
    failures = (Failure("b", NOW - 10, "second"), Failure("a", NOW - 20, "first"), Failure("c", NOW - HOUR, "expired"))
    await desk.change(failures=failures)
    status = await desk.management.status("m")
    assert (status.status, status.errors) == ("LOADING_FAILED", ("second", "first"))
    assert [(info.pod, info.status, info.time_ms) for info in status.copies] == [
        ("b", "LOADING_FAILED", NOW - 10),
        ("a", "LOADING_FAILED", NOW - 20),
    ]
    await desk.copy("m", "d")
    assert (await desk.management.status("m")).status == "LOADED"
    assert (await desk.management.status("m")).errors == ("second", "first")


async def test_quarantine_is_told_and_released(desk):
    await desk.management.register("m", "onnx")
    await desk.change(killed=("died on Monday", "died on Tuesday"), failures=(Failure("a", NOW, "x"),))
    status = await desk.management.status("m")
    assert status.status == "LOADING_FAILED"
    assert "Monday" in status.errors[0]
    assert desk.management.errors(await desk.record()) == status.errors
    assert (await desk.management.release("m")).status == "NOT_LOADED"
    assert not (await desk.record()).killed
    with pytest.raises(MeshError) as error:
        await desk.management.release("nobody")
    assert error.value.reason is Reason.UNKNOWN_MODEL


@pytest.mark.parametrize("path", [".", "..", "./m.onnx", "../models/m.onnx", "~/m.onnx"])
async def test_a_path_relative_to_no_folder_is_refused(desk, path):
    """Relative paths are refused for one model and for many, because there is no folder to resolve them against."""
    with pytest.raises(MeshError) as error:
        await desk.management.register("m", "onnx", path)
    assert error.value.reason is Reason.BAD_REQUEST
    assert "relative" in error.value.text
    (fate,) = await desk.management.register_many([Item("m", "onnx", path)])
    assert isinstance(fate, MeshError)
    assert (await desk.management.status("m")).status == "NOT_FOUND"


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("https://user:hunter2@host/m.onnx", ""),
        ("https://host/m.onnx?sig=hunter2", ""),
        ("m.onnx", '{"storage_params": {"type": "s3", "secret_access_key": "hunter2"}}'),
    ],
)
async def test_a_secret_in_a_registration_is_refused_and_its_place_told(desk, path, key):
    """A secret is refused for one model, for many, and over gRPC. The error says where secrets belong, and does not
    repeat the secret."""
    with pytest.raises(MeshError) as error:
        await desk.management.register("m", "onnx", path, key)
    assert error.value.reason is Reason.BAD_REQUEST
    assert "hunter2" not in error.value.text
    for part in ("--storage-config", "storage_key", "docs/storage.md"):
        assert part in error.value.text
    (fate,) = await desk.management.register_many([Item("m", "onnx", path, key)])
    assert isinstance(fate, MeshError)
    request = pb.RegisterModelRequest(modelId="m", modelInfo=pb.ModelInfo(type="onnx", path=path, key=key))
    call = await desk.call("/mmesh.ModelMesh/registerModel", request)
    assert call.code is Code.INVALID_ARGUMENT
    assert await desk.etcd.get(desk.keys.model("m")) is None


async def test_a_key_that_is_nested_too_deeply_is_refused_as_such(desk):
    key = '{"a":' * 2000 + '{"password":"hunter2"}' + "}" * 2000
    with pytest.raises(MeshError, match="nested too deeply to be searched for secrets: give a key with") as error:
        await desk.management.register("m", "onnx", "m.onnx", key)
    assert error.value.reason is Reason.BAD_REQUEST


async def test_a_reload_begins_a_generation_and_is_left_to_the_leader(desk):
    """The digest, the failures and the deaths of the old content are forgotten. The footprint and the copies stay."""
    await desk.management.register("m", "onnx", "/m")
    failure = (Failure("a", NOW, "x"),)
    await desk.change(digest="one", digest_ms=5, killed=("died", "again"), failures=failure, host_bytes=7, refs=1)
    await desk.copy("m", "a")
    status = await desk.management.reload("m")
    assert status.reload == Reload(1)
    assert status.errors == ()
    record = await desk.record()
    assert (record.generation, record.digest, record.killed, record.host_bytes) == (1, "", (), 7)
    assert [(info.generation, info.digest) for info in status.copies] == [(0, "")]
    assert (await desk.management.reload("m")).reload == Reload(2)
    assert (await desk.management.register("m", "onnx", "/m")).created is False
    told = await desk.management.explain("m")
    assert any("generation 2" in line for line in told.lines)
    await desk.change(refs=0)
    await desk.etcd.delete(desk.keys.copy("m", "a"))
    await desk.management.unregister("m")
    assert await desk.etcd.get(desk.keys.reload("m")) is None


async def test_what_cannot_be_reloaded_says_why(desk):
    """A reload is refused with a reason if the registration has a digest, which admits no other content, or if the id
    is not registered."""
    await desk.management.register("m", "onnx", sha256="a" * 64)
    with pytest.raises(MeshError) as error:
        await desk.management.reload("m")
    assert error.value.reason is Reason.PRECONDITION
    assert "sha256" in error.value.text
    assert (await desk.record()).generation == 0
    with pytest.raises(MeshError) as error:
        await desk.management.reload("nobody")
    assert error.value.reason is Reason.UNKNOWN_MODEL


async def test_other_content_than_the_registrations_is_told(desk):
    """If a model's content differs from the registered content, the status reports it with the way out for as long as
    it would report a failure. The difference counts against no pod."""
    await desk.management.register("m", "onnx")
    await desk.change(digest="one", digest_ms=NOW - HOUR, changed="two", changed_ms=NOW)
    status = await desk.management.status("m")
    assert status.status == "LOADING_FAILED"
    assert status.copies == ()
    for part in ("one", "two", "mesh reload"):
        assert part in status.errors[0]
    await desk.copy("m", "d")
    assert (await desk.management.status("m")).status == "LOADED"
    await desk.change(changed_ms=NOW - HOUR)
    assert (await desk.management.status("m")).errors == ()


# --- loading ---


async def test_ensuring_an_unknown_model(desk):
    with pytest.raises(MeshError) as error:
        await desk.management.ensure_loaded("m")
    assert (error.value.reason, error.value.text) == (Reason.UNKNOWN_MODEL, "model not found")


async def test_ensuring_without_waiting_says_loading(desk):
    await desk.management.register("m", "onnx")
    desk.pod()
    event = asyncio.Event()

    async def load(request):
        await desk.copy("m", "a", LOADING)
        await event.wait()
        await desk.copy("m", "a")
        return fakecalls.loaded()

    desk.agents.answers["a"] = load
    assert (await desk.management.ensure_loaded("m")).status == "LOADING"
    waiting = asyncio.create_task(desk.management.ensure_loaded("m", sync=True))
    event.set()
    assert (await waiting).status == "LOADED"
    assert len(desk.agents.loads) == 1
    assert (await desk.management.ensure_loaded("m")).status == "LOADED"
    assert (await desk.record()).last_used_ms == NOW


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        pytest.param(fakecalls.failed("bad file"), "bad file", id="failed"),
        pytest.param(fakecalls.refused("NO_ROOM", "full"), "full", id="no-room"),
    ],
)
async def test_a_load_that_fails_is_a_status_and_not_an_error(desk, answer, text):
    desk.pod()
    desk.agents.answers["a"] = answer
    status = await desk.management.register("m", "onnx", load_now=True, sync=True)
    assert (status.status, status.created) == ("LOADING_FAILED", True)
    (error,) = status.errors
    assert error.startswith(text)


async def test_where_a_load_cannot_be_placed_it_says_so_even_without_waiting(desk):
    desk.pod("a", used_bytes=1 << 30, oldest_idle_ms=10)
    await desk.management.register("m", "onnx")
    await desk.change(host_bytes=1000)
    status = await desk.management.ensure_loaded("m", last_used_ms=NOW - 24 * HOUR)
    assert status.status == "LOADING_FAILED"
    assert "Nowhere available to load" in status.errors[0]


# --- lists and bulk ---


async def test_models_are_listed_page_by_page(desk):
    names = sorted([*(f"p-{number:03}" for number in range(25)), "p", "p/q", "pé", "q"])
    for name in names:
        await desk.management.register(name, "onnx")
    found, after = [], ""
    while after is not None:
        page = await desk.management.page(prefix="p", after=after, limit=10)
        assert len(page.models) <= 10
        found += [model_id for model_id, _ in page.models]
        after = page.next
    assert found == [name for name in names if name.startswith("p")]
    assert (await desk.management.page(prefix="p", after="z")).models == []
    assert (await desk.management.page(prefix="none")).models == []
    assert len((await desk.management.page(limit=10**9)).models) == len(names)


async def test_many_are_registered_in_few_transactions(desk, monkeypatch):
    txn, count = desk.etcd.txn, 0

    def counted(*arguments, **more):
        nonlocal count
        count += 1
        return txn(*arguments, **more)

    monkeypatch.setattr(desk.etcd, "txn", counted)
    items = [Item(f"m{number}", "onnx", f"file:///{number}") for number in range(500)]
    assert await desk.management.register_many(items) == [None] * 500
    assert await desk.management.register_many(items) == ["existing"] * 500
    assert count == 9 + 2 * 9, "a batch that fails is looked up in a transaction of its own"
    assert (await desk.record("m499")).path == "file:///499"


async def test_many_are_unregistered_in_few_transactions(desk, monkeypatch):
    """Models without copies are unregistered many at a time, with all of their keys. Other ids stay."""
    names = [f"m/{number}" for number in range(100)]
    await desk.management.register_many([Item(name, "onnx", limits=CopyLimits(1)) for name in names])
    await desk.management.register("m", "onnx")
    calls = []
    transact = desk.etcd.txn

    async def counted(*arguments, **more):
        calls.append(arguments)
        return await transact(*arguments, **more)

    monkeypatch.setattr(desk.etcd, "txn", counted)
    assert await desk.management.unregister_many([*names, "none", names[0]]) == [None] * 100 + ["missing"] * 2
    assert len(calls) == 6  # three batches, each read and deleted
    assert [model_id for model_id, _ in (await desk.management.page(limit=10)).models] == ["m"]
    page = await desk.etcd.page(desk.keys.wanted, after_prefix(desk.keys.wanted), limit=10)
    assert page.kvs == ()


async def test_each_of_many_is_unregistered_by_its_own_rules(desk):
    """A model with references stays. Copies are unloaded, even those that only the view shows. An invalid id is
    refused, and the other models are removed."""
    desk.pod("a")
    for name in ("free", "named", "loaded", "suspect"):
        await desk.management.register(name, "onnx")
    await desk.change("named", refs=1)
    await desk.copy("loaded", "a")
    copy = CopyRecord("i", await desk.created("suspect"), LOADED, 1000)
    desk.view.delta(1, [(desk.keys.copy("suspect", "a"), copy.encode())])
    named, loaded, suspect, bad, free = await desk.management.unregister_many(
        ["named", "loaded", "suspect", "x" * 2000, "free"]
    )
    assert (named.reason, named.text) == (
        Reason.PRECONDITION,
        "Model named has referents: move or delete the aliases that name it",
    )
    assert (loaded, suspect, free) == (None, None, None)
    assert bad.reason is Reason.BAD_REQUEST
    assert sorted(model for _, model in desk.agents.unloads) == ["loaded", "suspect"]
    assert [model_id for model_id, _ in (await desk.management.page(limit=10)).models] == ["named"]


async def test_a_model_that_changes_while_many_are_unregistered_is_looked_at_alone(desk, monkeypatch):
    """If another write happens between the read and the deletion of a batch, each model of the batch is unregistered
    separately."""
    await desk.management.register_many([Item(name, "onnx") for name in ("a", "b")])
    transact = desk.etcd.txn

    async def disturbed(compares, ops, *more):
        if len(compares) == 4:
            await desk.change("b", refs=1)
        return await transact(compares, ops, *more)

    monkeypatch.setattr(desk.etcd, "txn", disturbed)
    gone, stays = await desk.management.unregister_many(["a", "b"])
    assert gone is None
    assert stays.reason is Reason.PRECONDITION


async def test_a_pod_that_is_cut_off_while_many_are_unregistered_leaves_tombstones(desk, monkeypatch):
    """A life that appears between the read and the deletion of a batch belongs to a pod that may still answer for these
    models."""
    await desk.management.register_many([Item(name, "onnx") for name in ("a", "b")])
    transact = desk.etcd.txn

    async def disturbed(compares, ops, *more):
        if len(compares) == 4:
            await desk.etcd.put(desk.keys.lives + b"pod/1", b"{}")
        return await transact(compares, ops, *more)

    monkeypatch.setattr(desk.etcd, "txn", disturbed)
    assert await desk.management.unregister_many(["a", "b"]) == [None, None]
    assert [await desk.etcd.get(desk.keys.tombstone(name)) is not None for name in ("a", "b")] == [True, True]


async def test_each_of_many_gets_its_own_answer(desk):
    await desk.management.register("taken", "onnx", "other")
    await desk.management.register("same", "onnx", "p")
    await desk.management.register("lingering", "onnx")
    await desk.copy("lingering", "stuck")
    await desk.etcd.delete(desk.keys.model("lingering"))
    items = [
        Item("new", "onnx", "p"),
        Item("taken", "onnx", "p"),
        Item("", "onnx", "p"),
        Item("same", "onnx", "p"),
        Item("no-type", "", "p"),
        Item("lingering", "onnx", "p"),
        Item("new", "onnx", "p"),
        Item("new", "onnx", "else"),
        Item("last", "onnx", "p"),
    ]
    results = await desk.management.register_many(items)
    reasons = [result.reason if isinstance(result, MeshError) else result for result in results]
    assert reasons == [
        None,
        Reason.CONFLICT,
        Reason.BAD_REQUEST,
        "existing",
        Reason.BAD_REQUEST,
        Reason.FORMER_LIFE,
        "existing",
        Reason.CONFLICT,
        None,
    ]
    assert await desk.record("last")


async def test_models_too_large_for_one_transaction_are_registered_one_by_one(desk):
    items = [Item(f"m{number}", "onnx", "x" * 60_000) for number in range(40)]
    assert await desk.management.register_many(items) == [None] * 40


async def test_registering_while_etcd_is_away_fails_at_once_for_all(own_etcd, keys):
    """While etcd is unavailable, a bulk registration fails at once for all models, instead of timing out for each."""
    async with Etcd(replace(own_etcd.settings, timeout=0.5)) as etcd:
        registry, view, agents, settings = Registry(etcd, keys), View(keys, FakePool), FakeAgents(), RouterSettings("r")
        meter = Meter(metrics.Registry())
        management = Management.of(
            etcd=etcd,
            keys=keys,
            registry=registry,
            view=view,
            coldstart=ColdStart(view=view, registry=registry, agents=agents, meter=meter, settings=settings),
            agents=agents,
            tombstones=Tombstones(etcd, keys, agents),
            settings=settings,
        )
        creation = management.registration._creation
        management = Asked(management)
        await management.register("first", "onnx")
        own_etcd.kill9()
        began = time.monotonic()
        results = await management.register_many([Item(f"m{number}", "onnx") for number in range(500)])
        assert {result.reason for result in results} == {Reason.REGISTRY_AWAY}
        asked = []
        create = creation._create_one

        async def count(index, *more):
            asked.append(index)
            return await create(index, *more)

        creation._create_one = count
        results = await management.register_many([Item(f"m{number % 3}", "onnx") for number in range(300)])
        assert {result.reason for result in results} == {Reason.REGISTRY_AWAY}
        assert asked == [], "duplicate ids cause no further waiting"
        assert time.monotonic() - began < 20
        with pytest.raises(MeshError) as error:
            await management.status("first")
        assert error.value.reason is Reason.REGISTRY_AWAY
        await registry.close()


# --- looking around ---


async def test_a_model_is_explained(desk):
    desk.pod("a")
    desk.pod("b")
    await desk.management.register("m", "onnx")
    await desk.copy("m", "a")
    told = await desk.management.explain("m")
    assert told.id == "m"
    assert any("loaded in a" in line for line in told.lines)
    assert {entry.pod for entry in told.ranking} == {"a", "b"}
    assert [copy.pod for copy in told.copies] == ["a"]
    with pytest.raises(MeshError):
        await desk.management.explain("nobody")


async def test_it_is_told_why_a_copy_is_there_and_why_one_went(desk):
    """The explanation uses the agents' newest decisions of each kind, and omits decisions that only mention the model.
    It does not name models that the caller may not read."""
    desk.pod("a")
    desk.pod("b")
    await desk.management.register("m", "onnx")
    await desk.copy("m", "a")

    def decision(what: str, *models: str, ago: int) -> str:
        return json.dumps({"what": what, "models": models, "why": f"because of {ago}", "ago_ms": ago})

    desk.agents.decisions = {
        "a": [
            decision("load", "m", ago=3000),
            decision("evict", "m", "old", ago=9000),
            decision("load", "m", ago=9500),
        ],
        "b": [decision("evict", "other", "m", ago=1), decision("evict", "m", "x", ago=5000), "no json"],
    }
    lines = (await desk.management.explain("m")).lines
    assert "It was loaded in a 3 s ago: because of 3000." in lines
    assert "It was last evicted from b 5 s ago, for x: because of 5000." in lines
    assert not any("9000" in line or "9500" in line or "because of 1." in line for line in lines)
    hidden = await desk.management.handlers.inspection.explain("m", lambda model: model == "old")
    assert "It was last evicted from b 5 s ago, for another model: because of 5000." in hidden.lines
    assert [one.decision["models"] for one in hidden.decisions if isinstance(one.decision, dict)][1:] == [
        ["m", "old"],
        ["m"],
        ["another model", "m"],
        ["m", "another model"],
    ]


async def test_a_type_that_no_pod_takes_is_noted(desk):
    """A model whose type no pod's server accepts is registered. Its status and explanation say why nothing loads it."""
    desk.pod("a", types=("onnx",))
    management = desk.management
    status = await management.register("trees", "xgboost", "/m")
    assert status.created
    assert status.notes == ("no pod accepts models of type xgboost: the pods of this mesh accept onnx",)
    assert (await management.register("trees", "xgboost", "/m")).notes == status.notes
    lines = (await management.explain("trees")).lines
    assert any(line.startswith("It has no copy, and no call can load it: ") for line in lines)
    assert any("a takes only models of type onnx" in line for line in lines)
    assert f"Note: {status.notes[0]}." in lines
    assert not any("the first call loads it" in line for line in lines)
    assert (await management.register("net", "onnx:1", "/m")).notes == ()
    desk.pod("b", types=("xgboost",))
    assert (await management.register("trees", "xgboost", "/m")).notes == ()


async def test_pods_are_listed_and_described(desk):
    desk.pod("a", labels=("cpu",), zone="z")
    pods = desk.management.handlers.pods
    (pod,) = pods.published()
    assert (pod.pod, pod.state, pod.labels, pod.suspect) == ("a", "ready", ("cpu",), False)
    assert (await pods.describe("a")).incarnation == "i"
    desk.agents.answers["a"] = fakecalls.unreachable()
    with pytest.raises(MeshError) as away:
        await pods.describe("a")
    assert away.value.reason is Reason.UNAVAILABLE
    with pytest.raises(MeshError) as unknown:
        await pods.describe("nobody")
    assert unknown.value.reason is Reason.UNKNOWN_MODEL


# --- over gRPC ---


@pytest.mark.parametrize("service", ["/mmesh.ModelMesh/", "/com.ibm.watson.tas.proto.TasRuntime/"])
async def test_the_api_over_grpc_under_all_of_its_names(desk, service):
    request = pb.RegisterModelRequest(modelId="m", modelInfo=pb.ModelInfo(type="onnx", path="p"))
    for name in ("registerModel", "addModel"):
        call = await desk.call(service + name, request)
        info = pb.ModelStatusInfo.FromString(call.answers[0][2][framing.PREFIX :])
        assert info.status == pb.ModelStatusInfo.NOT_LOADED
    for name in ("unregisterModel", "deleteModel"):
        assert (await desk.call(service + name, pb.UnregisterModelRequest(modelId="m"))).code is Code.OK
    call = await desk.call(service + "getModelStatus", pb.GetStatusRequest(modelId="m"))
    assert pb.ModelStatusInfo.FromString(call.answers[0][2][5:]).status == pb.ModelStatusInfo.NOT_FOUND
    call = await desk.call(service + "ensureLoaded", pb.EnsureLoadedRequest(modelId="m"))
    assert (call.code, call.text) == (Code.NOT_FOUND, "model not found")
    assert (await desk.call(service + "other", pb.SetVModelRequest())).code is Code.UNIMPLEMENTED


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("registerModel", pb.RegisterModelRequest(modelInfo=pb.ModelInfo(type="t"))),
        ("unregisterModel", pb.UnregisterModelRequest()),
        ("getModelStatus", pb.GetStatusRequest()),
        ("ensureLoaded", pb.EnsureLoadedRequest()),
    ],
)
async def test_an_empty_id_over_grpc(desk, method, request_):
    call = await desk.call(f"/mmesh.ModelMesh/{method}", request_)
    assert (call.code, call.text) == (Code.INVALID_ARGUMENT, "must provide non-empty modelId")


async def test_copies_and_errors_over_grpc(desk):
    await desk.management.register("m", "onnx")
    await desk.change(failures=(Failure("b", NOW, "no memory"),))
    await desk.copy("m", "a")
    call = await desk.call("/mmesh.ModelMesh/getModelStatus", pb.GetStatusRequest(modelId="m"))
    info = pb.ModelStatusInfo.FromString(call.answers[0][2][framing.PREFIX :])
    assert (info.status, list(info.errors)) == (pb.ModelStatusInfo.LOADED, ["no memory"])
    assert [(c.location, c.copyStatus, c.time) for c in info.modelCopyInfos] == [
        ("b", pb.ModelStatusInfo.LOADING_FAILED, NOW),
        ("a", pb.ModelStatusInfo.LOADED, NOW - 5000),
    ]


async def test_a_sync_registration_ends_by_its_deadline_and_the_load_goes_on(desk):
    desk.pod()
    event = asyncio.Event()

    async def load(request):
        await event.wait()
        return fakecalls.loaded()

    desk.agents.answers["a"] = load
    request = pb.RegisterModelRequest(modelId="m", modelInfo=pb.ModelInfo(type="onnx"), loadNow=True, sync=True)
    deadline = asyncio.get_running_loop().time() + 0.2
    call = await desk.call("/mmesh.ModelMesh/registerModel", request, deadline=deadline)
    assert call.code is Code.DEADLINE_EXCEEDED
    event.set()
    await until(lambda: "m" in desk.view.copies)


async def test_garbage_over_grpc(desk):
    call = FakeCall(b"/mmesh.ModelMesh/registerModel", frame=framing.pack(b"\xff\xff\xff"))
    desk.dispatcher.dispatch(call)
    await until(lambda: bool(call.answers))
    assert call.code is Code.INVALID_ARGUMENT
