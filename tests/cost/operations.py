"""The operations whose cost is stored: each step of a call, run with the tests' fakes.

Each context manager yields a function that performs the operation once, with the same work every time.
"""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from mesh.pb import inference_pb2 as pb
from mesh.pb import modelruntime_pb2 as runtime_pb
from mesh.runtime.port.copies import Copies
from mesh.runtime.relay.calls import RelayPort
from mesh.runtime.relay.envoyegress import EnvoyEgress
from mesh.runtime.relay.journal import Journal
from mesh.runtime.relay.methods import Methods
from mesh.runtime.relay.table import RelayedCopy, Table
from mesh.runtime.server.calls.dataport import DataPort
from mesh.runtime.server.calls.runs import Runs
from mesh.runtime.server.calls.watch import CallWatch
from mesh.runtime.server.loads.loader import Loader, Order
from mesh.runtime.server.onnx import device
from mesh.runtime.server.v2.intake import Intake
from mesh.runtime.server.v2.reply import ReplyWriter
from mesh.runtime.server.v2.tensors import Tensor
from mesh.runtime.sharedmemory.board import OPEN_ENDED, Board
from mesh.telemetry import metrics
from mesh.v2.datatypes import DATATYPES
from mesh.wire import (
    budget,
    client,
    clientconnection,
    framing,
    headers,
    plainconnection,
    plainserver,
    server,
    serverconnection,
)
from mesh.wire.call import Call, Head
from mesh.wire.client import Reply
from placement.fence import Mode
from router.access.guard import Guard
from router.calls.dispatch import Dispatcher
from router.calls.forwarder import Forwarder
from router.calls.meter import Meter
from router.calls.routes import Routes
from router.inference.models import Models
from router.loads.coldstart import ColdStart
from router.rest import documents
from router.rest.conversions import Conversions
from router.rest.inference import Inference
from router.rest.pieces import Body
from router.rest.plain import PlainInference
from router.settings import RouterSettings
from router.state.registry import Registry
from router.state.vmodels import Vmodels
from tests.router.conftest import FakeEtcd
from tests.support import models
from tests.support.access import guard_of
from tests.support.fakecalls import FakeAgents, FakeCall, FakePool
from tests.support.onnxserver import SERVICE, request
from tests.support.wire import Transport
from tests.support.wire import request as http_request
from tests.support.worlds import World

Operation = Callable[[], object]

METHOD = SERVICE + b"ModelInfer"
KEY = "mesh_" + "k" * 43
LIMIT = 16 << 20
SMALL = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 64)
LARGE = np.linspace(-1, 1, 25600, dtype=np.float32).reshape(1, 25600)  # 100 KiB
HEADERS = [(b"user-agent", b"grpc-python-asyncio/1.81.0"), (b"mm-model-id", b"m"), (b"mesh-copy", b"agent-1.7")]
FP32 = next(kind for kind in DATATYPES if kind.name == "FP32")


class _Sink(Transport):
    """A transport that discards all writes."""

    def write(self, data: bytes) -> None:
        pass


# -- the wire


@asynccontextmanager
async def wire_request(folder: Path, *, known: bool) -> AsyncIterator[Operation]:
    """Yields an operation that reads a request and writes its reply. With `known`, the request's head is the same each
    time; otherwise it is new each time."""
    answer = framing.pack(bytes(150))

    def reply(call: Call) -> None:
        call.reply(answer)

    connection = serverconnection.ServerConnection(server.Server(reply, max_message=LIMIT), asyncio.get_running_loop())
    connection.connection_made(_Sink())  # type: ignore[arg-type]
    frame = framing.pack(request("m", x=SMALL))
    numbers = itertools.repeat(0) if known else itertools.count()
    requests = (
        http_request(frame, method=METHOD, headers=[*HEADERS, (b"traceparent", b"%08d" % number)]) for number in numbers
    )
    yield lambda: connection.data_received(next(requests))
    connection.connection_lost(None)


class _Outcome:
    """A sink that discards replies."""

    takes_pieces = False

    def on_beginning(self) -> None:
        pass

    def on_reply(self, reply: Reply) -> None:
        assert reply.code == 0

    def on_stream(self, stream: client.ReplyStream) -> None:
        raise AssertionError("a unary reply came in pieces")

    def on_lost(self, lost: client.Lost) -> None:
        raise AssertionError(lost.why)


@asynccontextmanager
async def wire_call(folder: Path, *, known: bool) -> AsyncIterator[Operation]:
    """Yields an operation that sends a call and reads its reply. With `known`, the reply's head is the same each time;
    otherwise it is new each time."""
    pool = client.Pool("unix:/nowhere", max_connections=1, max_message=LIMIT)
    connection = clientconnection.ClientConnection(pool, LIMIT, 60)
    connection.connection_made(_Sink())  # type: ignore[arg-type]
    pool._connections.add(connection)
    pool.release(connection)
    frame = framing.pack(request("m", x=SMALL))
    numbers = itertools.repeat(0) if known else itertools.count()
    message = framing.pack(bytes(150))
    outcome = _Outcome()

    def one() -> None:
        pool.send(METHOD, HEADERS, frame, outcome)
        connection.data_received(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/grpc\r\nmesh-load: 0\r\nx-trace: %08d\r\n"
            b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\ngrpc-status: 0\r\n\r\n"
            % (next(numbers), len(message), message)
        )

    yield one
    pool.close()


# -- the router


class _Forgetful(FakePool):
    """A pool that remembers only its last call."""

    def send(self, *args: Any, **more: Any) -> Any:
        self.sent.clear()
        return super().send(*args, **more)


@asynccontextmanager
async def _core(
    copies: int, alias: str = "", guard: Guard | None = None
) -> AsyncIterator[tuple[World, Forwarder, Dispatcher]]:
    world, etcd, agents = World(), FakeEtcd(), FakeAgents()
    world.view._connect = _Forgetful  # type: ignore[assignment]
    for number in range(copies):
        world.pod(f"pod-{number}")
        world.copy("m", f"pod-{number}")
    settings = RouterSettings("router")
    meter = Meter(metrics.Registry())
    vmodels = Vmodels(world.keys)
    if alias:
        record = {"amid": "m", "tmid": "m", "mesh": {"versions": {"1": "m"}}}
        vmodels.snapshot(1, [(world.keys.vmodel(alias), json.dumps(record).encode())])
    registry = Registry(etcd, world.keys, vmodels=vmodels)  # type: ignore[arg-type]
    coldstart = ColdStart(view=world.view, registry=registry, agents=agents, meter=meter, settings=settings)
    forwarder = Forwarder(
        view=world.view,
        coldstart=coldstart,
        registry=registry,
        meter=meter,
        counted=metrics.Registry(),
        vmodels=vmodels,
        settings=settings,
    )
    yield world, forwarder, Dispatcher(forwarder, Routes(), guard)
    await coldstart.close()
    await forwarder.close()
    await registry.close()


@asynccontextmanager
async def choice(folder: Path) -> AsyncIterator[Operation]:
    """Yields an operation that chooses one of four copies."""
    async with _core(4) as (world, forwarder, _):
        copies = world.view.copies["m"]
        yield lambda: forwarder.pick(copies)


@asynccontextmanager
async def forward(
    folder: Path, *, copies: int, deadline: bool, name: str = "m", key: bool = False
) -> AsyncIterator[Operation]:
    """Yields an operation that dispatches a call to a copy and passes the reply back. `name` is the name of a model or
    an alias. With `key`, the router authenticates callers, and the call has a key."""
    guard = guard_of("required", {"k": KEY}, {"k": ("infer", ["m"], ["key:k"])}) if key else None
    headers = [*HEADERS, (b"authorization", b"Bearer " + KEY.encode())] if key else HEADERS
    async with _core(copies, "" if name == "m" else name, guard) as (world, _, dispatcher):
        frame = framing.pack(request(name, x=SMALL))
        pools = [pod.pool for pod in world.view.pods.values()]
        later = asyncio.get_running_loop().time() + 3600

        head = Head(METHOD, headers, b"", True)

        def one() -> None:
            call = FakeCall(METHOD, headers, frame, deadline=later if deadline else None)
            call.head = head
            dispatcher.dispatch(call)
            (sent,) = [sent for pool in pools for sent in pool.sent if not sent.over]  # type: ignore[union-attr]
            sent.reply(headers=[(b"mesh-load", b"0")])

        yield one


# -- the model server


class _Quick:
    """A pace that treats every call as quick, so that no call is moved to a thread because the machine is busy."""

    inline = (True,) * 64

    def note(self, size: int, took_ns: int) -> None:
        pass


@asynccontextmanager
async def data_port(folder: Path, *, alike: bool, alias: bool = False) -> AsyncIterator[Operation]:
    """Yields an operation that answers a call of a regression model by its id or by an alias. With `alike`, the request
    equals the previous one; otherwise it has a parameter, so it must be parsed."""
    board, copies, watch = Board.private(8), Copies(), CallWatch()
    watch.close()  # while instructions are counted on a busy machine, it would end calls
    runs = Runs(board, threads=1)
    board.permit(OPEN_ENDED, Mode.PROVEN)
    loader = Loader(copies, board, runs, device.CPU, timeout=60.0, concurrency=1)
    port = DataPort(copies, board, runs, watch, max_message=LIMIT)
    path = folder / "model.onnx"
    path.write_bytes(models.logistic_regression(0, features=64))
    copy = await loader.load(Order("m", str(path), b"", None))
    copy.pace = _Quick()  # type: ignore[assignment]
    message = pb.ModelInferRequest.FromString(request("m", x=SMALL))
    if not alike:
        message.parameters["priority"].int64_param = 1  # requests like this are always parsed
    frame = framing.pack(message.SerializeToString())
    metadata = [*HEADERS, (headers.AS, headers.named_as("n", "1"))] if alias else HEADERS

    head = Head(METHOD, metadata, b"", True)

    def one() -> None:
        call = FakeCall(METHOD, metadata, frame)
        call.head = head
        port.handle(call)
        assert call.code == 0, call.answers

    yield one
    await port.close()
    await runs.close()
    await loader.purge()
    loader.close()


@asynccontextmanager
async def intake(folder: Path) -> AsyncIterator[Operation]:
    """Yields an operation that turns a parsed request with 100 KiB of raw contents into a model input."""
    taken = Intake({"x": Tensor("x", FP32, [-1, LARGE.size])})
    message = pb.ModelInferRequest.FromString(request("m", x=LARGE))
    inputs, raws = message.inputs, list(message.raw_input_contents)
    yield lambda: taken.decode(inputs, raws)


@asynccontextmanager
async def reply(folder: Path) -> AsyncIterator[Operation]:
    """Yields an operation that turns a model output of 100 KiB into a reply frame."""
    writer = ReplyWriter("m", [Tensor("y", FP32, [-1, LARGE.size])])
    yield lambda: writer.encode([LARGE], b"42", raw=True)


# -- the relay


@asynccontextmanager
async def relay_call(folder: Path) -> AsyncIterator[Operation]:
    """Yields an operation that passes a call of one message on to a foreign server, and the server's answer back. The
    message already contains the server's name for the model."""
    board = Board.private(1)
    board.permit(OPEN_ENDED, Mode.PROVEN)
    table = Table(board, Journal(None))
    copy = RelayedCopy("m", b"agent-1.7", table.row(None))
    table.copies.add(copy)
    up: Any = SimpleNamespace(is_up=True, epoch=0, control=SimpleNamespace(takes_versions=True))
    egress = EnvoyEgress(up, "/nowhere", max_message=LIMIT, budget=budget.Budget(LIMIT))
    egress._pool = pool = _Forgetful("unix:/nowhere")  # type: ignore[assignment]
    port = RelayPort(table, board, up, egress, max_message=LIMIT)
    methods = runtime_pb.RuntimeStatusResponse()
    methods.methodInfos[METHOD[1:].decode()].idInjectionPath.append(1)
    port.methods = Methods(methods)
    frame, answer = framing.pack(request("m", x=SMALL)), framing.pack(bytes(150))
    head = Head(METHOD, HEADERS, b"", True)

    def one() -> None:
        call = FakeCall(METHOD, HEADERS, frame)
        call.head = head
        port.handle(call)
        pool.sent[-1].reply(answer)
        assert call.code == 0, call.answers

    yield one


# -- REST


@asynccontextmanager
async def rest_request(folder: Path, *, values: np.ndarray, binary: bool) -> AsyncIterator[Operation]:
    """Yields an operation that turns a REST body into a message frame. The numbers are in the JSON, or in binary data
    after it."""
    one: dict[str, Any] = {"name": "x", "datatype": "FP32", "shape": list(values.shape)}
    if binary:
        one["parameters"] = {"binary_data_size": values.nbytes}
        head = json.dumps({"id": "42", "inputs": [one]}).encode()
        body, length = head + values.tobytes(), len(head)
    else:
        one["data"] = values.ravel().tolist()
        body, length = json.dumps({"id": "42", "inputs": [one]}).encode(), None

    def run() -> None:
        message, raws, _ = documents.decode_parts("m", "", Body([body]), length)
        documents.framed(message.SerializeToString(), raws)

    yield run


@asynccontextmanager
async def rest_reply(folder: Path, *, values: np.ndarray, binary: bool) -> AsyncIterator[Operation]:
    """Yields an operation that turns a reply into a REST body. The numbers are in the JSON, or in binary data after
    it."""
    message = pb.ModelInferResponse(model_name="m", id="42")
    message.outputs.add(name="y", datatype="FP32", shape=values.shape)
    message.raw_output_contents.append(values.tobytes())
    form = documents.Form(binary=binary)
    yield lambda: documents.encode_parts(message, form)


@asynccontextmanager
async def rest_call(folder: Path) -> AsyncIterator[Operation]:
    """Yields an operation that reads a REST request of 64 numbers, dispatches it and writes the reply. The
    request's head is known from earlier requests."""
    message = pb.ModelInferResponse(model_name="m", model_version="1")
    message.outputs.add(name="y", datatype="FP32", shape=[1, 3])
    message.raw_output_contents.append(np.array([0.25, 0.5, 0.25], np.float32).tobytes())
    answer = framing.pack(message.SerializeToString())
    models_ = Models(lambda call: call.reply(answer), max_message=LIMIT)
    conversions = Conversions(max_message=LIMIT)
    handler = PlainInference(models_, Inference(models_, conversions, max_message=LIMIT), budget.UNBOUNDED)
    serving = plainserver.PlainServer(
        handler.serve, handler.refusal, max_message=LIMIT, budget=budget.UNBOUNDED, min_rate=0
    )
    connection = plainconnection.PlainConnection(serving, asyncio.get_running_loop())
    connection.connection_made(_Sink())  # type: ignore[arg-type]
    one = {"name": "x", "datatype": "FP32", "shape": [1, 64], "data": SMALL.ravel().tolist()}
    body = json.dumps({"inputs": [one]}).encode()
    data = b"POST /v2/models/m/infer HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    for _ in range(3):  # a head is known from its third time on
        connection.data_received(data)
    yield lambda: connection.data_received(data)


Maker = Callable[[Path], Any]

OPERATIONS: dict[str, Maker] = {
    "wire, request with a known head": lambda folder: wire_request(folder, known=True),
    "wire, request with a new head": lambda folder: wire_request(folder, known=False),
    "wire, call with a known reply": lambda folder: wire_call(folder, known=True),
    "wire, call with a new reply": lambda folder: wire_call(folder, known=False),
    "router, choice among 4 copies": choice,
    "router, forward to 1 copy": lambda folder: forward(folder, copies=1, deadline=False),
    "router, forward to 1 copy, by an alias": lambda folder: forward(folder, copies=1, deadline=False, name="n"),
    "router, forward to 1 copy, for a key": lambda folder: forward(folder, copies=1, deadline=False, key=True),
    "router, forward to 3 copies with a deadline": lambda folder: forward(folder, copies=3, deadline=True),
    "server, call like the last": lambda folder: data_port(folder, alike=True),
    "server, call like the last, by an alias": lambda folder: data_port(folder, alike=True, alias=True),
    "server, call to be parsed": lambda folder: data_port(folder, alike=False),
    "server, intake of 100 KiB": intake,
    "server, reply of 100 KiB": reply,
    "relay, call of one message": relay_call,
    "REST, call like the last": rest_call,
    "REST, request of 64 numbers": lambda folder: rest_request(folder, values=SMALL, binary=False),
    "REST, request of 100 KiB as JSON": lambda folder: rest_request(folder, values=LARGE, binary=False),
    "REST, request of 100 KiB as binary": lambda folder: rest_request(folder, values=LARGE, binary=True),
    "REST, reply of 64 numbers": lambda folder: rest_reply(folder, values=SMALL, binary=False),
    "REST, reply of 100 KiB as JSON": lambda folder: rest_reply(folder, values=LARGE, binary=False),
    "REST, reply of 100 KiB as binary": lambda folder: rest_reply(folder, values=LARGE, binary=True),
}
"""The operations, by their names in `figures.json`."""
