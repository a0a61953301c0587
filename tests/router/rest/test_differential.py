"""The same request through every carrier of REST and through gRPC, with the same status, tensors and reason.

REST requests go to both of REST's carriers, alone and behind Envoy, and gRPC calls to Mesh's own server. A real ONNX
server answers them, or a fake that returns its inputs.
"""

import asyncio
import contextlib
import gzip
import json
import math
import tempfile
import urllib.parse
from dataclasses import dataclass, field

import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from mesh.pb import inference_pb2 as pb
from mesh.process.tasks import Tasks
from mesh.statuses import MeshError, Reason
from mesh.v2.datatypes import OF_NAME
from mesh.wire import framing
from mesh.wire.client import Pool
from mesh.wire.localcall import LocalAnswer
from mesh.wire.server import Server
from router.calls import answers
from router.rest import errors
from router.settings import RouterSettings
from tests.router.rest.conftest import CARRIERS, METHOD, FakeWorker
from tests.support import models
from tests.support.examples import examples
from tests.support.onnxserver import OnnxServer

LIMIT = 16 << 20
ODD = "a/b \xe4%2F"
EXAMPLES = settings(
    max_examples=examples(60),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Door:
    """The port of one carrier, with a connection that is kept open."""

    def __init__(self, port):
        self.port = port
        self.writer = None

    async def post(self, path, headers, body, *, chunked=False):
        """Sends a POST request, and returns the status, headers and body of the answer."""
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        lines = [f"POST {path} HTTP/1.1", "Host: a", *(f"{name}: {value}" for name, value in headers)]
        lines.append("Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}")
        if chunked:
            cut = len(body) // 2
            body = (
                b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:cut], body[cut:]) if part)
                + b"0\r\n\r\n"
            )
        self.writer.write("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body)
        async with asyncio.timeout(30):
            head = await self.reader.readuntil(b"\r\n\r\n")
            status, *fields = head.decode("latin-1").split("\r\n")[:-2]
            found = {name.lower(): value for name, _, value in (line.partition(": ") for line in fields)}
            content = await self.reader.readexactly(int(found["content-length"]))
        if found.get("connection") == "close":
            self.close()
        return int(status.split()[1]), found, content

    def close(self):
        if self.writer is not None:
            self.writer.close()
            self.writer = None


@contextlib.asynccontextmanager
async def doors(worker, request):
    """Serves the worker through every carrier, and yields the doors by carrier."""
    async with contextlib.AsyncExitStack() as stack:
        found = {}
        for name, carrier in CARRIERS.items():
            found[name] = Door(await stack.enter_async_context(carrier(worker, request)))
            stack.callback(found[name].close)
        yield found
    assert worker.budget.held == 0


def told(status, headers, content):
    """Returns the part of an answer that must be the same from every carrier."""
    document, length = content, headers.get("inference-header-content-length")
    if length is not None:
        document = content[: int(length)]
    names = ("content-type", "retry-after")
    return status, {name: headers.get(name) for name in names}, orjson.loads(document), content[len(document) :]


async def everywhere(doors, path, headers, body, *, chunked=False):
    """Sends a request through every carrier, checks that all answers are alike, and returns the answer."""
    found = {name: told(*await door.post(path, headers, body, chunked=chunked)) for name, door in doors.items()}
    first = found["aiohttp"]
    for name, other in found.items():
        assert other == first, (name, path, headers, body)
    return first


# --- against gRPC, in front of a real model server ---


class Forwarding:
    """A dispatcher to one ONNX server that does only what these tests need."""

    def __init__(self, server, known):
        self.server = server
        self.known = known
        self.tasks = Tasks()

    def dispatch(self, call):
        try:
            model_id = pb.ModelInferRequest.FromString(framing.unpack(call.frame, limit=LIMIT)).model_name
            if model_id not in self.known:
                raise MeshError(Reason.UNKNOWN_MODEL, f"model {model_id} is not registered", details={"model": "x"})
        except MeshError as error:
            answers.fail(call, error)
            return
        self.tasks.start(self.forward(call), "call")

    async def forward(self, call):
        reply = await self.server.pool.call(call.method, [], call.frame, timeout=30)
        if reply.code:
            call.fail(reply.code, reply.text, reply.headers, reply.trailers)
        else:
            call.reply(reply.frame, reply.headers, reply.trailers)


@dataclass
class Wanted:
    """An inference, independent of any protocol."""

    model: str = "FP32"
    datatype: str = "FP32"
    shape: tuple = (1,)
    raw: bytes = bytes(4)
    data: object = field(default_factory=lambda: [0.0])  # for JSON; None: JSON cannot hold it
    name: str = "x"
    version: str = ""
    request_id: str = ""
    outputs: tuple = ()
    parameters: dict = field(default_factory=dict)
    binary_in: bool = False
    binary_out: bool = False
    compressed: bool = False
    chunked: bool = False

    def rest(self):
        """Returns the path, headers and body of the REST request."""
        item = {"name": self.name, "shape": list(self.shape), "datatype": self.datatype}
        if self.binary_in:
            item["parameters"] = {"binary_data_size": len(self.raw)}
        else:
            item["data"] = self.data
        document = {"inputs": [item]}
        if self.request_id:
            document["id"] = self.request_id
        if self.outputs:
            document["outputs"] = [{"name": name} for name in self.outputs]
        parameters = self.parameters | ({"binary_data_output": True} if self.binary_out else {})
        if parameters:
            document["parameters"] = parameters
        body, headers = json.dumps(document).encode(), [("Content-Type", "application/json")]
        if self.binary_in:
            headers = [("Inference-Header-Content-Length", len(body))]
            body += self.raw
        if self.compressed:
            body = gzip.compress(body)
            headers.append(("Content-Encoding", "gzip"))
        path = f"/v2/models/{urllib.parse.quote(self.model, safe='')}"
        if self.version:
            path += f"/versions/{self.version}"
        return f"{path}/infer", headers, body

    def grpc(self):
        """Returns the gRPC message."""
        message = pb.ModelInferRequest(model_name=self.model, model_version=self.version, id=self.request_id)
        message.inputs.add(name=self.name, datatype=self.datatype, shape=self.shape)
        message.raw_input_contents.append(self.raw)
        for name in self.outputs:
            message.outputs.add(name=name)
        for name, value in self.parameters.items():
            message.parameters[name].int64_param = value
        return message


def strings(values):
    return b"".join(len(value).to_bytes(4, "little") + value for value in values)


@st.composite
def wanted(draw):
    """Draws an inference, which is valid in most cases."""
    rarely = st.integers(0, 9).map(lambda value: value == 0)
    datatype = draw(st.sampled_from(sorted(OF_NAME)))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    count = math.prod(shape)
    if draw(rarely):
        count += draw(st.sampled_from([-1, 1]))
    count = max(count, 0)
    kind = OF_NAME[datatype]
    if datatype == "BYTES":
        values = draw(
            st.lists(st.sampled_from([b"", b"a", "\xe4\U0001f600".encode(), b"\xff"]), min_size=count, max_size=count)
        )
        raw = strings(values)
        data = None if b"\xff" in values else [value.decode() for value in values]
    else:
        raw = draw(st.binary(min_size=count * kind.size, max_size=count * kind.size))
        if datatype == "BOOL":
            raw = bytes(value & 1 for value in raw)
        array = np.frombuffer(raw, kind.dtype)
        held = bool(kind.field) and (array.dtype.kind != "f" or bool(np.isfinite(array).all()))
        data = array.tolist() if held else None
    if data is not None and len(shape) > 1 and math.prod(shape) == count > 0 and draw(st.booleans()):
        data = np.array(data, object).reshape(shape).tolist()
    return Wanted(
        model=draw(st.sampled_from([datatype] * 12 + ["FP32", ODD, "missing"])),
        datatype=datatype,
        shape=shape,
        raw=raw,
        data=data,
        name=draw(st.sampled_from(["x"] * 15 + ["z", "\xe4"])),
        request_id=draw(st.sampled_from(["", "7", "\xe4"])),
        outputs=draw(st.sampled_from([()] * 6 + [("y",), ("nope",)])),
        parameters=draw(st.sampled_from([{}, {"priority": 3}])),
        binary_in=data is None or draw(st.booleans()),
        binary_out=draw(st.booleans()),
        compressed=draw(rarely),
        chunked=draw(st.booleans()),
    )


def carried(datatype, raw):
    """Returns whether JSON can represent the tensor."""
    kind = OF_NAME[datatype]
    if datatype == "BYTES":
        return b"\xff" not in raw
    return bool(kind.field) and (kind.dtype.kind != "f" or bool(np.isfinite(np.frombuffer(raw, kind.dtype)).all()))


def raw_of(output, blobs):
    """Returns the raw contents of an output of REST, and the blobs that remain for the outputs after it."""
    size = output.get("parameters", {}).get("binary_data_size")
    if size is not None:
        return bytes(blobs[:size]), blobs[size:]
    if output["datatype"] == "BYTES":
        return strings([value.encode() for value in output["data"]]), blobs
    return np.array(output["data"], OF_NAME[output["datatype"]].dtype).tobytes(), blobs


@pytest.fixture
async def real(request, tmp_path):
    """Starts a worker in front of an ONNX server, and yields its doors and a pool of gRPC connections to it."""
    names = [*sorted(OF_NAME), ODD]
    async with OnnxServer(tmp_path) as server:
        for name in names:
            datatype = "FP32" if name == ODD else name
            await server.load(name, server.write(f"m{names.index(name)}", models.identity(datatype, None)))
        dispatcher = Forwarding(server, names)
        worker = FakeWorker(settings=RouterSettings(name="t", max_message=LIMIT), dispatcher=dispatcher)
        serving = Server(dispatcher.dispatch, max_message=LIMIT)
        with tempfile.TemporaryDirectory(prefix="md", dir="/tmp") as folder:
            await serving.listen_unix(f"{folder}/grpc")
            pool = Pool(f"unix:{folder}/grpc", max_connections=4)
            async with doors(worker, request) as opened:
                yield opened, pool
            pool.close()
            await serving.close(1)
        await dispatcher.tasks.close()
        await worker.conversions.close()


@EXAMPLES
@given(one=wanted())
async def test_rest_and_grpc_answer_alike(real, one):
    """An inference gives the same tensors over REST and gRPC, or both refuse it. Only REST refuses an answer that JSON
    cannot represent."""
    event(await alike(real, one))


NUMBERS = np.random.default_rng(18)
NAN = np.where(np.arange(30_000) % 7 == 0, np.nan, 1.5).astype("<f4")
LARGE = [
    # JSON of one integer has 22 bytes: the first tensor is converted in the worker, the second beside it.
    ("INT64", np.full(2_950, -(1 << 62), "<i8"), {}),
    ("INT64", np.full(3_000, -(1 << 62), "<i8"), {}),
    ("INT64", NUMBERS.integers(-(1 << 63), (1 << 63) - 1, 5_000), {"compressed": True}),
    ("UINT64", np.full(10_000, (1 << 64) - 1, "<u8"), {"compressed": True, "chunked": True}),
    ("FP32", NAN, {"binary_in": True}),
    ("FP32", NAN, {"binary_in": True, "binary_out": True}),
    ("FP32", NAN, {"binary_in": True, "binary_out": True, "chunked": True}),
    ("FP64", NUMBERS.random(20_000), {"binary_in": True, "compressed": True}),
    ("BOOL", NUMBERS.integers(0, 2, 20_000).astype(bool), {"binary_out": True}),
]
"""Tensors near the size above which JSON is converted beside the worker, and larger ones."""

LARGEST = [
    ("FP64", NUMBERS.random(520_000), {}),
    ("FP64", NUMBERS.random(520_000), {"binary_in": True}),
    ("FP64", NUMBERS.random(520_000), {"binary_out": True, "compressed": True}),
]
"""Tensors with 10 MB of JSON."""

LONG = [pytest.mark.long, pytest.mark.timeout(600)]


@pytest.mark.parametrize(
    ("tensors", "ids"), [(LARGE, "ab"), pytest.param(LARGEST, "a", marks=LONG)], ids=["100 KB", "10 MB"]
)
async def test_large_tensors_are_answered_alike(real, tensors, ids):
    """Large tensors are answered alike, whether their JSON is converted in the worker or beside it. Those of 100 KB are
    sent twice, because the second request finds its form known."""
    for name, array, form in tensors:
        for again in ids:
            data = None if form.get("binary_in") else array.tolist()
            one = Wanted(name, name, array.shape, array.tobytes(), data, request_id=again, **form)
            carries = form.get("binary_out") or carried(name, one.raw)
            assert await alike(real, one) == ("answered" if carries else "not for JSON")


async def alike(real, one):
    """Makes an inference over REST and over gRPC, and checks that the answers agree. Returns the kind of answer."""
    opened, pool = real
    status, _, document, blobs = await everywhere(opened, *one.rest(), chunked=one.chunked)
    frame = framing.pack(one.grpc().SerializeToString())
    reply = await pool.call(METHOD + b"ModelInfer", [], frame, timeout=30)
    if reply.code:
        expected, body = errors.of_answer(LocalAnswer(reply.code, reply.text, None, reply.headers, reply.trailers))
        if document["reason"] == "BAD_REQUEST":  # REST found it first, and says so in its own words
            assert status == 400
            assert expected == 400 or one.model == "missing"
        else:
            assert (status, document) == (expected, body)
        return "refused"
    response = pb.ModelInferResponse.FromString(framing.unpack(reply.frame, limit=LIMIT))
    (output,), (raw,) = response.outputs, response.raw_output_contents
    if not one.binary_out and not carried(output.datatype, raw):
        assert (status, document["reason"]) == (400, "BAD_REQUEST")
        assert "binary_data" in document["error"]
        return "not for JSON"
    assert status == 200, document
    (shown,) = document["outputs"]
    found, rest = raw_of(shown, blobs)
    assert (shown["name"], shown["datatype"], shown["shape"]) == (output.name, output.datatype, list(output.shape))
    assert (found, rest) == (raw, b"")
    assert document["model_name"] == response.model_name
    assert document.get("id", "") == response.id == one.request_id
    return "answered"


# --- among the carriers, with anything for a request ---

GOOD = json.dumps(
    {"id": "7", "inputs": [{"name": "x", "shape": [2, 2], "datatype": "INT32", "data": [[1, 2], [3, 4]]}]}
)
HEAD = json.dumps({"inputs": [{"name": "x", "shape": [2], "datatype": "FP16", "parameters": {"binary_data_size": 4}}]})
TOKENS = [
    "",
    "1.0",
    "true",
    "null",
    "NaN",
    "1e999",
    "-0",
    "18446744073709551616",
    '"a"',
    "[",
    "]",
    "{}",
    ",",
    "\\ud800",
    "\xe4",
]


@st.composite
def anything(draw):
    """Draws a request that is valid, or has replaced pieces in its body, odd headers, or an odd path."""
    text = draw(st.sampled_from([GOOD, GOOD, HEAD + "abcd"]))
    body = text.encode()
    headers = [("Inference-Header-Content-Length", str(len(HEAD)))] if text.startswith(HEAD) else []
    for _ in range(draw(st.integers(0, 2))):
        at, size = draw(st.integers(0, len(body))), draw(st.integers(0, 6))
        body = body[:at] + draw(st.sampled_from(TOKENS)).encode() + body[at + size :]
    if draw(st.integers(0, 5)) == 0:
        body = draw(st.binary(max_size=30))
    odd = {
        "Inference-Header-Content-Length": ["0", "3", "9999", "-1", "x", str(len(body))],
        "Content-Encoding": ["gzip", "deflate", "identity", "br", "gzip, gzip"],
        "X-Request-Timeout": ["1", "0", "soon", "1e3"],
        "grpc-timeout": ["1S", "1", "99999999H"],
        "Content-Type": ["text/plain", "application/json; charset=latin-1"],
        "x-mine": ["a", "\t b"],
    }
    names = draw(st.lists(st.sampled_from(sorted(odd)), max_size=2, unique=True))
    headers += [(name, draw(st.sampled_from(odd[name]))) for name in names]
    path = draw(
        st.sampled_from(
            ["/v2/models/m/infer"] * 10
            + ["/v2/models/m/versions/3/infer?a=b", "/v2/models/a%2Fb/infer", "/v2/models//infer", "/v2/models/m"]
            + ["/v2/models/%ff/infer", "/v2/models/m/infer/", "/v2/models/m/generate", "/v2/models/a/../b/infer"]
        )
    )
    if draw(st.integers(0, 9)) == 0:
        body = gzip.compress(body, mtime=0)
    return path, headers, body, draw(st.booleans())


@pytest.fixture
async def fake(request):
    """Starts a worker whose models return their inputs, and yields its doors and the worker."""
    worker = FakeWorker(settings=RouterSettings(name="t", max_message=LIMIT))
    worker.dispatcher.metadata.inputs.add(name="x", datatype="FP32", shape=[-1])
    async with doors(worker, request) as opened:
        yield opened, worker
    await worker.conversions.close()


@settings(EXAMPLES, max_examples=examples(150))
@given(sent=anything())
async def test_carriers_answer_alike_whatever_is_sent(fake, sent):
    """A request gets the same answer from every carrier. If it reaches a model, it does so as the same message and
    headers."""
    opened, worker = fake
    path, headers, body, chunked = sent
    worker.dispatcher.calls.clear()
    status, *_ = await everywhere(opened, path, headers, body, chunked=chunked)
    event(f"status {status}")
    inferences = [call for call in worker.dispatcher.calls if call.method.endswith(b"ModelInfer")]
    assert len({call.frame for call in inferences}) <= 1
    assert len({tuple(call.headers) for call in inferences}) <= 1
    assert len(inferences) in (0, len(opened))
