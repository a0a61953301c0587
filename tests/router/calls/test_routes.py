"""The model that a call is for, by ModelMesh's rules and texts, and the metadata that passes in both
directions."""

import base64
import gzip

import pytest

from mesh.pb import inference_pb2
from mesh.statuses import MeshError, Reason
from mesh.wire import framing, headers
from mesh.wire.call import Head
from router.calls import routes
from tests.support.fakecalls import FakeCall

INFER = b"/inference.GRPCInferenceService/ModelInfer"
OTHER = b"/some.Predictor/predict"


def bin_(text: str) -> bytes:
    return base64.b64encode(text.encode()).rstrip(b"=")


def model_of(method: bytes, headers=(), message: bytes = b"", frame: bytes | None = None, encoding: bytes = b"") -> str:
    known = routes.Routes()
    call = FakeCall(method, list(headers), framing.pack(message) if frame is None else frame, encoding=encoding)
    return known.asked(call, known.method(method), call.frame)[0]


def infer(name: str) -> bytes:
    return inference_pb2.ModelInferRequest(model_name=name, raw_input_contents=[b"x" * 50]).SerializeToString()


def test_the_message_beats_the_header():
    """For V2 methods, whose messages contain the id, the id in the message overrides the one in the header."""
    assert model_of(INFER, [(b"mm-model-id", b"header")], infer("body")) == "body"


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        pytest.param([(b"mm-model-id", b"a")], "a", id="plain"),
        pytest.param([(b"mm-model-id-bin", bin_("modèle"))], "modèle", id="binary"),
        pytest.param([(b"mm-model-id-bin", bin_("b")), (b"mm-model-id", b"a")], "a", id="plain-before-binary"),
        pytest.param([(b"tas-model-id", b"old")], "old", id="legacy"),
        pytest.param([(b"tas-model-id", b"old"), (b"mm-model-id", b"a")], "a", id="legacy-last"),
    ],
)
@pytest.mark.parametrize("method", [INFER, OTHER])
def test_ids_in_metadata(method, headers, expected):
    """An id in the metadata names the model, also for a V2 method whose message has no id."""
    assert model_of(method, headers, infer("") if method == INFER else b"\xff\xff") == expected


@pytest.mark.parametrize(
    ("headers", "reason", "text"),
    [
        pytest.param([], Reason.BAD_REQUEST, "must include mm-model-id header", id="none"),
        pytest.param(
            [(b"mm-model-id", b"a"), (b"mm-vmodel-id", b"v")],
            Reason.BAD_REQUEST,
            "must include only one of model id and vmodel id",
            id="both",
        ),
        pytest.param(
            [(b"mm-model-id", b"")], Reason.BAD_REQUEST, "provided model-id header must be non-empty", id="empty"
        ),
        pytest.param(
            [(b"mm-vmodel-id-bin", b"")],
            Reason.BAD_REQUEST,
            "provided vmodel-id header must be non-empty",
            id="empty-vmodel",
        ),
        pytest.param([(b"mm-model-id-bin", b"!")], Reason.BAD_REQUEST, "mm-model-id-bin is not base64", id="base64"),
        pytest.param([(b"mm-model-id", b"\xff")], Reason.BAD_REQUEST, "not UTF-8", id="not-text"),
        pytest.param(
            [(b"mm-model-id", b"a"), (b"mm-model-id", b"")],
            Reason.BAD_REQUEST,
            "provided model-id header must be non-empty",
            id="one-of-several-empty",
        ),
        pytest.param([(b"mm-model-id", b"a")] * 101, Reason.BAD_REQUEST, "at most 100 ids", id="too-many"),
        pytest.param(
            [(b"mm-vmodel-id-bin", b",".join([bin_("a")] * 101))],
            Reason.BAD_REQUEST,
            "at most 100 ids",
            id="too-many-joined",
        ),
    ],
)
def test_what_is_wrong_with_ids(headers, reason, text):
    with pytest.raises(MeshError, match=text) as error:
        model_of(OTHER, headers)
    assert error.value.reason is reason


@pytest.mark.parametrize(
    ("method", "text"),
    [
        ("RepositoryIndex", "the model repository extension is not supported: .*/mesh/v1/models"),
        ("ModelStatistics", "the statistics extension"),
        ("CudaSharedMemoryRegister", "the shared memory extension"),
        ("ModelStreamInfer", "inference by streams .* use ModelInfer"),
        ("NeverHeardOf", "no method NeverHeardOf"),
    ],
)
def test_extensions_of_v2_are_refused_as_what_they_are(method, text):
    """V2 extensions are refused by name, unless the metadata names a model, whose server may support them. A name in
    the message does not count."""
    name = b"/inference.GRPCInferenceService/" + method.encode()
    with pytest.raises(MeshError, match=text) as error:
        model_of(name, message=infer("a"))
    assert error.value.reason is Reason.UNSUPPORTED
    assert model_of(name, [(b"mm-model-id", b"a")]) == "a"


def test_compressed_requests_are_read():
    packed = gzip.compress(infer("squeezed"))
    frame = b"\x01" + len(packed).to_bytes(4, "big") + packed
    assert model_of(INFER, frame=frame, encoding=b"gzip") == "squeezed"


@pytest.mark.parametrize(
    ("frame", "encoding", "reason"),
    [
        pytest.param(framing.pack(b"\x08\x01"), b"", Reason.BAD_REQUEST, id="wrong-type"),
        pytest.param(framing.pack(b"\x0a\x05ab"), b"", Reason.BAD_REQUEST, id="cut"),
        pytest.param(framing.pack(b"\x0a\x00"), b"", Reason.BAD_REQUEST, id="empty-id"),
        pytest.param(framing.pack(b"\x0a\x01\xff"), b"", Reason.BAD_REQUEST, id="not-utf-8"),
        pytest.param(b"\x01\0\0\0\x03abc", b"gzip", Reason.BAD_REQUEST, id="not-gzip"),
        pytest.param(b"\x01\0\0\0\x03abc", b"brotli", Reason.BAD_REQUEST, id="unknown-encoding"),
    ],
)
def test_requests_that_cannot_be_read(frame, encoding, reason):
    with pytest.raises(MeshError) as error:
        model_of(INFER, frame=frame, encoding=encoding)
    assert error.value.reason is reason


@pytest.mark.parametrize(
    ("method", "headers", "message", "kind"),
    [
        pytest.param(INFER, [], infer("a"), routes.NAME, id="message"),
        pytest.param(INFER, [(b"mm-vmodel-id", b"v")], infer("a"), routes.NAME, id="message-before-header"),
        pytest.param(INFER, [(b"mm-model-id", b"a")], infer(""), routes.MODEL, id="header"),
        pytest.param(OTHER, [(b"mm-model-id-bin", bin_("a"))], b"", routes.MODEL, id="binary"),
        pytest.param(OTHER, [(b"tas-model-id", b"a")], b"", routes.MODEL, id="legacy"),
        pytest.param(OTHER, [(b"mm-vmodel-id", b"a")], b"", routes.VMODEL, id="vmodel"),
        pytest.param(INFER, [(b"mm-vmodel-id-bin", bin_("a"))], infer(""), routes.VMODEL, id="binary-vmodel"),
    ],
)
def test_where_a_name_stands_tells_what_it_means(method, headers, message, kind):
    """A header says whether it names a model or a vmodel. A name in a message may be either."""
    known = routes.Routes()
    call = FakeCall(method, headers, framing.pack(message))
    assert known.asked(call, known.method(method), call.frame) == ("a", kind, "")


@pytest.mark.parametrize("squeezed", [False, True], ids=["plain", "compressed"])
def test_the_version_is_read_wherever_the_name_is(squeezed):
    """The version in a V2 message counts even if a header names the model."""
    known = routes.Routes()
    for name, metadata in (("a", []), ("", [(b"mm-model-id", b"a")])):
        message = inference_pb2.ModelInferRequest(model_name=name, model_version="8", id="7").SerializeToString()
        frame, encoding = (compressed(message), b"gzip") if squeezed else (framing.pack(message), b"")
        call = FakeCall(INFER, metadata, frame, encoding=encoding)
        name, _, version = known.asked(call, known.method(INFER), call.frame)
        assert (name, version) == ("a", "8")


def compressed(message: bytes) -> bytes:
    packed = gzip.compress(message)
    return b"\x01" + len(packed).to_bytes(4, "big") + packed


def test_a_compressed_message_is_unpacked_no_further_than_its_id():
    """The id is read from the first 1,000 bytes of a frame whose message has 64 MiB."""
    frame = compressed(infer("m") + b"\x3a\x80\x80\x80\x20" + bytes(64 << 20))
    assert model_of(INFER, frame=frame[:1000], encoding=b"gzip") == "m"


def test_an_id_is_not_looked_for_beyond_the_first_mebibyte():
    """A call whose id comes after the first mebibyte of its message must name the model in its metadata."""
    frame = compressed(b"\x3a\x80\x80\x80\x01" + bytes(2 << 20) + infer("m"))
    assert model_of(INFER, [(b"mm-model-id", b"header")], frame=frame, encoding=b"gzip") == "header"
    with pytest.raises(MeshError) as error:
        model_of(INFER, frame=frame, encoding=b"gzip")
    assert error.value.reason is Reason.BAD_REQUEST


@pytest.mark.parametrize("field", [b"\x10\0", b"\x12\0"], ids=["numbers", "empty texts"])
def test_a_flood_of_small_fields_before_the_id_is_refused(field):
    assert model_of(INFER, message=field * 9_999 + infer("m")) == "m"
    with pytest.raises(MeshError) as error:
        model_of(INFER, message=field * 10_001 + infer("m"))
    assert error.value.reason is Reason.BAD_REQUEST


@pytest.mark.parametrize("where", ["message", "metadata", "binary"])
def test_an_id_longer_than_any_is_refused_without_being_repeated(where):
    long = "m" * 1025
    headers = {
        "message": [],
        "metadata": [(b"mm-model-id", long.encode())],
        "binary": [(b"mm-model-id-bin", bin_(long))],
    }
    with pytest.raises(MeshError) as error:
        model_of(OTHER if where != "message" else INFER, headers[where], infer(long))
    assert error.value.reason is Reason.BAD_REQUEST
    assert len(error.value.text) < 200


def test_what_clients_invent_is_not_remembered_without_bounds():
    known = routes.Routes()
    for number in range(3000):
        known.method(b"/some.Service/m%d" % number)
        routes.passes[b"x-%d-" % number + b"n" * (number % 2 * 300)]
    known.method(b"/" + b"n" * 60_000)
    assert len(known._methods) <= 1000
    assert max(map(len, known._methods)) <= 256
    assert max(map(len, routes.passes)) <= 256


def test_a_name_seen_before_is_the_same_again():
    """Messages that begin alike keep their own names and versions, although the worker remembers what it has read. Its
    memory is bounded."""
    known = routes.Routes()
    method = known.method(INFER)

    def asked(message: bytes) -> object:
        return known.asked(FakeCall(INFER, [], None), method, framing.pack(message))

    plain = b"\x0a\x01m\x2a\x00"
    for _ in range(2):
        assert asked(plain) == ("m", routes.NAME, "")
        assert asked(b"\x0a\x01m") == ("m", routes.NAME, "")
        assert asked(b"\x0a\x01m\x12\x00") == ("m", routes.NAME, "")
        assert asked(b"\x0a\x01m\x12\x017") == ("m", routes.NAME, "7")
        assert asked(b"\x0a\x02mm\x2a\x00") == ("mm", routes.NAME, "")
        assert asked(b"\x2a\x00" + plain) == ("m", routes.NAME, "")
        assert asked(b"\x12\x017\x0a\x01m") == ("m", routes.NAME, "")
        with pytest.raises(MeshError, match="longer than the rest of the message"):
            asked(b"\x0a\x05m")
        with pytest.raises(MeshError, match="non-empty"):
            asked(b"\x0a\x00\x2a\x00")
    for number in range(9000):
        asked(b"\x0a\x06%06d\x2a\x00" % number)
    assert len(known._names) <= 4000


def test_calls_with_the_same_head_share_the_headers_that_are_passed():
    """The headers that a server gets are the same for a call with a shared head and one without."""
    received = [(b"user-agent", b"x"), (b"mm-model-id", b"m"), (b"traceparent", b"1"), (b"mesh-copy", b"c")]
    alone, first, second = (FakeCall(INFER, received) for _ in range(3))
    first.head = second.head = Head(INFER, received, b"", True)
    assert routes.passed(first) == routes.passed(alone) == ((b"traceparent", b"1"),)
    assert routes.passed(second) is routes.passed(first)


@pytest.mark.parametrize(
    "name", [b"/mmesh.ModelRuntime/unloadModel", b"/mmesh.ModelMesh/noSuch", b"/mesh.agent.v1.Agent/Unload"]
)
def test_methods_that_are_never_forwarded(name):
    method = routes.Routes().method(name)
    assert "not permitted" in method.refused
    assert name.decode()[1:] in method.refused


def test_only_the_methods_known_to_be_safe_are_safe():
    known = routes.Routes()
    assert known.method(INFER).safe
    assert not known.method(OTHER).safe
    assert known.method(OTHER).label == "predict"


def test_unknown_methods_do_not_fill_the_memory():
    known = routes.Routes()
    for number in range(3000):
        known.method(b"/s/m%d" % number)
    assert len(known._methods) <= 1100


@pytest.mark.parametrize(
    ("name", "goes"),
    [
        (b"authorization", False),
        (b"x-forwarded-client-cert", False),
        (b"x-trace-bin", True),
        (b"mesh-copy", False),
        (b"mesh-not-here", False),
        (b"mm-model-id", False),
        (b"mm-balanced", False),
        (b"grpc-trace-bin", False),
        (b"tas-model-id", False),
        (b"content-type", False),
        (b"user-agent", False),
    ],
)
def test_what_of_a_clients_metadata_goes_on(name, goes):
    assert routes.passes[name] is goes


def test_our_own_headers_do_not_come_back():
    assert not routes.returns[b"mesh-load"]
    assert routes.returns[b"x-model"]


def test_what_a_copy_is_called_with():
    """A copy is called with the binary id, and also with the plain id if that is printable ASCII."""
    assert dict(headers.addressed("a b", b"inc.7")) == {
        b"mesh-copy": b"inc.7",
        b"mm-model-id": b"a b",
        b"mm-model-id-bin": bin_("a b"),
    }
    assert b"mm-model-id" not in dict(headers.addressed("é", b"inc.7"))
    assert b"mm-model-id" not in dict(headers.addressed("a\nb", b"inc.7"))
