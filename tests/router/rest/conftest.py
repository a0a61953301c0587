import contextlib
import dataclasses
import socket
import subprocess
import tempfile
import time
import types
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from mesh.access.verbs import Verb
from mesh.envoy import config
from mesh.pb import inference_pb2 as pb
from mesh.process import find_binary, free_port, tethered
from mesh.schema import records
from mesh.schema.keys import Keys
from mesh.schema.modelstatus import ModelStatus
from mesh.statuses import MeshError, Reason
from mesh.telemetry import metrics
from mesh.wire import framing
from mesh.wire.budget import Budget
from mesh.wire.plainserver import PlainServer
from router.access.audit import Audit
from router.access.authority import Authority
from router.access.guard import OFF, Guard
from router.calls import answers
from router.inference.models import Models
from router.inference.server import V2Server
from router.management.explanation import Explanation
from router.management.requests import Item, Register
from router.management.status import CopyInfo, Page, StatusInfo
from router.management.vmodels import VModelInfo, VModelPage
from router.rest import app
from router.rest.bodies import Bodies
from router.rest.conversions import Conversions
from router.rest.inference import Inference
from router.rest.plain import PlainInference
from router.settings import RouterSettings
from router.state.differing import DifferentError

METHOD = b"/inference.GRPCInferenceService/"


@dataclass
class FakeDispatcher:
    """A dispatcher that fails calls with `error`, or lets `answer` answer them. Without either, an inference returns
    its inputs as outputs."""

    calls: list = field(default_factory=list)
    error: MeshError | None = None
    answer: object = None  # a function that answers the call
    metadata: pb.ModelMetadataResponse = field(default_factory=pb.ModelMetadataResponse)

    def dispatch(self, call):
        self.calls.append(call)
        if self.error is not None:
            answers.fail(call, self.error)
        elif self.answer is not None:
            self.answer(call)
        else:
            method = call.method.removeprefix(METHOD).decode()
            reply = getattr(self, method)(framing.unpack(call.frame, limit=1 << 30))
            call.reply(framing.pack(reply.SerializeToString()))

    def ModelInfer(self, message):
        request = pb.ModelInferRequest.FromString(message)
        response = pb.ModelInferResponse(model_name=request.model_name, model_version="1", id=request.id)
        wanted = {output.name for output in request.outputs}
        for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
            if not wanted or tensor.name in wanted:
                response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
                response.raw_output_contents.append(raw)
        return response

    def ModelMetadata(self, message):
        self.metadata.name = pb.ModelMetadataRequest.FromString(message).name
        return self.metadata

    def ModelReady(self, _):
        return pb.ModelReadyResponse(ready=True)

    def request(self, index=-1):
        """Returns the message of an inference call, by default of the last one."""
        return pb.ModelInferRequest.FromString(framing.unpack(self.calls[index].frame, limit=1 << 30))


class FakeTuning:
    """Settings that are kept in a dictionary."""

    def __init__(self):
        self.texts = {"type_constraints": "", "type_limits": ""}

    async def read(self):
        return self.texts

    async def write(self, name, text):
        self.texts[name] = text


class FakeStatus:
    """The status of the models in `FakeManagement`."""

    def __init__(self, models):
        self._models = models

    async def of(self, model_id, *, created=False):
        record = self._models.get(model_id)
        return StatusInfo(
            status=ModelStatus.NOT_FOUND if record is None else ModelStatus.LOADED,
            errors=("an old failure",),
            copies=(CopyInfo("pod-0", ModelStatus.LOADED, 1, 2),),
            record=record,
            created=created,
        )

    async def page(self, *, prefix="", after="", limit=100):
        ids = sorted(i for i in self._models if i.startswith(prefix) and i > after)
        page, rest = ids[:limit], ids[limit:]
        return Page(models=[(i, self._models[i]) for i in page], next=page[-1] if rest else None)

    def untaken(self, model_type):
        return f"no pod accepts models of type {model_type}" if model_type.startswith("odd") else ""

    def errors(self, record):
        return tuple(failure.text for failure in record.failures) + record.killed


@dataclass(frozen=True)
class FakePod:
    pod: str


class FakePods:
    """A source of pods with one pod."""

    def published(self):
        return [FakePod("pod-0")]

    def open_lives(self):
        return []

    async def describe(self, pod):
        return FakePod(pod)


class FakeVModels:
    """Vmodels whose records a test sets, and the requests made for them."""

    def __init__(self):
        self.records = {}
        self.requests = []
        self.deleted = []

    async def set(self, request, permit=lambda _: None):
        if request.change.back:
            permit(self.records[request.vmodel_id].active)
        self.requests.append(request)
        return dataclasses.replace(await self.status(request.vmodel_id), created=not request.change.update_only)

    async def status(self, vmodel_id, owner=""):
        record = self.records.get(vmodel_id)
        target = StatusInfo(ModelStatus.LOADING, ("no room",)) if record is not None and record.moving else None
        return VModelInfo(vmodel_id, record, StatusInfo(ModelStatus.LOADED), target)

    async def delete(self, vmodel_id, owner=""):
        self.deleted.append((vmodel_id, owner))
        return vmodel_id in self.records

    async def page(self, *, prefix="", after="", limit=100):
        names = sorted(name for name in self.records if name.startswith(prefix) and name > after)
        return VModelPage([(name, self.records[name]) for name in names[:limit]], None)


class FakeManagement:
    """A management that keeps its models in a dictionary."""

    def __init__(self):
        self.models = {}
        self.batches = []
        self.error = None
        self.loaded = []
        self.status = FakeStatus(self.models)
        self.pods = FakePods()
        self.tuning = FakeTuning()
        self.vmodels = FakeVModels()
        self.registration = self.loading = self.inspection = self

    async def add(self, model_id, type, path, key):
        """Registers a model without a request over REST."""
        return await self.register(Register(Item(model_id, type, path, key)))

    async def register(self, request):
        model_id, type, path, key, sha256, limits = request.item
        record = records.ModelRecord(type=type, path=path, key=key, sha256=sha256, limits=limits)
        known = self.models.get(model_id)
        if known is not None and not known.same_registration(record):
            raise DifferentError(model_id, known, record)
        self.models[model_id] = record
        if request.load_now:
            self.loaded.append((model_id, request.sync))
        return await self.status.of(model_id, created=known is None)

    async def unregister(self, model_id):
        return self.models.pop(model_id, None) is not None

    async def unregister_many(self, model_ids):
        if self.error is not None:
            raise self.error
        referred = MeshError(Reason.PRECONDITION, "it has referents")
        return [
            referred if one == "referred" else None if self.models.pop(one, None) else "missing" for one in model_ids
        ]

    def _known(self, model_id):
        if model_id not in self.models:
            raise MeshError(Reason.UNKNOWN_MODEL, f"model {model_id} is not registered")
        return self.models[model_id]

    async def ensure(self, request):
        self._known(request.model_id)
        self.loaded.append((request.model_id, request.sync))
        return await self.status.of(request.model_id)

    async def release(self, model_id):
        pass

    async def reload(self, model_id):
        self.models[model_id] = self._known(model_id).reloaded()
        return await self.status.of(model_id)

    async def set_limits(self, model_id, change):
        record = self._known(model_id)
        self.models[model_id] = dataclasses.replace(record, limits=change(record.limits))
        return await self.status.of(model_id)

    async def explain(self, model_id, readable=lambda _: True):
        lines = ["it is so", *(f"{one} is evicted for it" for one in ("team/y", "other") if readable(one))]
        return Explanation(model_id, ModelStatus.LOADED, tuple(lines), (), (), ())

    async def register_many(self, items):
        if self.error is not None:
            raise self.error
        self.batches.append(len(items))
        fates = []
        for model_id, type, path, key, sha256, limits in items:
            if not model_id or type == "refused":
                fates.append(MeshError(Reason.CONFLICT, "it is another one"))
            elif model_id in self.models:
                fates.append("existing")
            else:
                self.models[model_id] = records.ModelRecord(type=type, path=path, key=key, sha256=sha256, limits=limits)
                fates.append(None)
        return fates


@dataclass
class FakeWorker:
    settings: RouterSettings
    dispatcher: FakeDispatcher = field(default_factory=FakeDispatcher)
    management: FakeManagement = field(default_factory=FakeManagement)
    view: object = field(
        default_factory=lambda: types.SimpleNamespace(
            copies={}, pods={"pod-0": types.SimpleNamespace(record=types.SimpleNamespace(state="ready"))}
        )
    )
    registry: metrics.Registry = field(default_factory=metrics.Registry)
    reason: str | None = None
    guard: Guard = field(default_factory=lambda: Guard(Authority(Keys("mm/t")), mode=OFF))
    audit: Audit = field(default_factory=lambda: Audit("off"))
    authstore: object = None
    budget: Budget = field(default_factory=lambda: Budget(256 << 20))

    plain: PlainServer | None = None

    def __post_init__(self):
        self.bodies = Bodies(self.budget, limit=self.settings.max_message, least=self.settings.min_body_rate)
        self.conversions = Conversions(max_message=self.settings.max_message)
        self.server = V2Server(self.view, lambda: self.reason)
        self.models = Models(self.dispatcher.dispatch, max_message=self.settings.max_message)
        self.inference = Inference(self.models, self.conversions, max_message=self.settings.max_message)

    @property
    def slow(self):
        """Returns the number of bodies and replies that were given up because they were sent or read too slowly."""
        return self.bodies.slow + (self.plain.slow if self.plain else 0)

    async def snapshots(self):
        return self.registry.snapshot()

    def grants_file(self):
        return None

    def dataplane(self):
        return None


@pytest.fixture
def max_message():
    """Returns the size limit of a message, in bytes."""
    return 1 << 20


@pytest.fixture
async def worker(max_message):
    worker = FakeWorker(settings=RouterSettings(name="t", max_message=max_message, workers=2))
    yield worker
    await worker.conversions.close()


@asynccontextmanager
async def plain_server(worker):
    """Yields the plain HTTP server for a worker's inference, and closes it. The caller decides where it listens."""
    guard = worker.guard if worker.guard.asks(Verb.INFER) else None
    inference = PlainInference(worker.models, worker.inference, worker.budget, guard)
    worker.plain = server = PlainServer(
        inference.serve,
        inference.refusal,
        max_message=worker.settings.max_message,
        budget=worker.budget,
        min_rate=worker.settings.min_body_rate,
        opening=inference.opening,
    )
    yield server
    await server.close(1)
    await inference.close()
    assert server.errors == 0


@asynccontextmanager
async def by_aiohttp(worker, _):
    """Starts the aiohttp application alone, and yields its port."""
    runner = await app.serve_tcp(worker, "127.0.0.1", 0, grace=1)
    yield runner.addresses[0][1]
    await runner.cleanup()


@asynccontextmanager
async def by_plain_http(worker, _):
    """Starts the plain HTTP server alone, which accepts only inference, and yields its port."""
    async with plain_server(worker) as server:
        yield await server.listen_tcp("127.0.0.1", 0)


@asynccontextmanager
async def by_envoy(worker, request):
    """Starts the aiohttp application and the plain HTTP server behind Envoy, and yields Envoy's port."""
    envoy = request.getfixturevalue("envoy")
    runner = app.make_runner(worker, grace=1)
    await runner.setup()
    await web.UnixSite(runner, f"{envoy.folder}/rest").start()
    async with plain_server(worker) as server:
        await server.listen_unix(f"{envoy.folder}/infer")
        yield envoy.port
        await runner.cleanup()


CARRIERS = {"aiohttp": by_aiohttp, "plain": by_plain_http, "envoy": by_envoy}


@pytest.fixture(scope="session")
def envoy():
    """Starts one Envoy for all tests. Each test in turn listens on the sockets to which Envoy forwards."""
    with tempfile.TemporaryDirectory(prefix="mr", dir="/tmp") as folder:
        port = free_port()
        settings = config.EnvoySettings(
            host="127.0.0.1",
            port=port,
            admin_socket=f"{folder}/admin",
            grpc_sockets=(f"{folder}/grpc",),
            inference_sockets=(f"{folder}/infer",),
            rest_sockets=(f"{folder}/rest",),
        )
        Path(folder, "envoy.json").write_bytes(config.encode(settings))
        argv = [find_binary("envoy"), "-c", f"{folder}/envoy.json", "--disable-hot-restart", "--concurrency", "1"]
        argv += ["-l", "warning"]
        with subprocess.Popen(tethered(argv), stdin=subprocess.DEVNULL) as child:
            while True:
                with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", port)):
                    break
                assert child.poll() is None
                time.sleep(0.02)
            yield types.SimpleNamespace(folder=folder, port=port)
            child.terminate()


@pytest.fixture
def carrier():
    """Returns the carrier of requests to the worker, a key of `CARRIERS`. Modules override it to test other
    carriers."""
    return "aiohttp"


@pytest.fixture
async def served(worker, carrier, request):
    """Serves the worker, and yields the port."""
    async with CARRIERS[carrier](worker, request) as port:
        yield port
    assert worker.budget.held == 0, "every body gave its bytes back to the budget"


@pytest.fixture
async def http(served):
    ours = {"X-Mesh-Request": "test"}
    async with aiohttp.ClientSession(f"http://127.0.0.1:{served}", auto_decompress=False, headers=ours) as session:
        yield session
