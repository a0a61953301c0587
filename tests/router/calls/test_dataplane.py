"""The data-plane configuration: what is accepted, and which methods and ids follow from it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.pb import inference_pb2
from mesh.statuses import Code, MeshError, Reason
from mesh.wire import framing
from router.calls import dataplane, routes
from router.calls.dataplane import Rule
from router.calls.dispatch import Dispatcher
from tests.support.exampleproto import PredictRequest
from tests.support.fakecalls import FakeCall

PREDICT = b"/mmesh.ExamplePredictor/predict"
OTHER = b"/mmesh.ExamplePredictor/other"
INFER = b"/inference.GRPCInferenceService/ModelInfer"
CONTROLLERS = {
    "rpcConfigs": {
        "inference.GRPCInferenceService/ModelInfer": {"idExtractionPath": [1], "vModelId": True},
        "inference.GRPCInferenceService/ModelMetadata": {"idExtractionPath": [1], "vModelId": True},
        "tensorflow.serving.PredictionService/Predict": {"idExtractionPath": [1, 1], "vModelId": True},
        "org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions": {
            "idExtractionPath": [1],
            "vModelId": True,
        },
    },
    "allowOtherRpcs": True,
}
"""The document that ModelMesh's controller writes."""


def config(rules: dict, *, others: bool | None = None) -> str:
    return json.dumps({"rpcConfigs": rules} | ({} if others is None else {"allowOtherRpcs": others}))


def adopted(document: str | None) -> routes.Routes:
    known = routes.Routes()
    known.adopt(None if document is None else dataplane.parse(document))
    return known


def asked(known: routes.Routes, method: bytes, message, headers=()):
    call = FakeCall(method, list(headers), framing.pack(message.SerializeToString()))
    return known.asked(call, known.method(method), call.frame)[:2]


def test_the_document_of_modelmeshs_controller_is_understood() -> None:
    """The controller's document gives each of its methods a path, and allows all others."""
    parsed = dataplane.parse(json.dumps(CONTROLLERS))
    assert parsed.others
    assert parsed.methods[INFER] == Rule((1,), vmodel=True)
    assert parsed.methods[b"/tensorflow.serving.PredictionService/Predict"] == Rule((1, 1), vmodel=True)
    assert len(parsed.methods) == 4


@pytest.mark.parametrize(
    ("document", "methods", "others"),
    [
        pytest.param("{}", {}, False, id="empty"),
        pytest.param('{"rpcConfigs": null, "allowOtherRpcs": null}', {}, False, id="nulls"),
        pytest.param(config({"a.B/c": {}}), {b"/a.B/c": Rule()}, False, id="headers only"),
        pytest.param(
            config({"a.B/c": {"idExtractionPath": None, "vModelId": None}}),
            {b"/a.B/c": Rule()},
            False,
            id="rule of nulls",
        ),
        pytest.param(config({"a.B/c": {"idExtractionPath": [3, 7]}}), {b"/a.B/c": Rule((3, 7))}, False, id="path"),
        pytest.param(config({}, others=True), {}, True, id="others"),
    ],
)
def test_defaults(document: str, methods: dict, others: bool) -> None:
    """By default, a listed method has its id in the metadata, an id in a message is a model's id, and unlisted methods
    are refused."""
    parsed = dataplane.parse(document)
    assert (dict(parsed.methods), parsed.others) == (methods, others)


@pytest.mark.parametrize(
    ("document", "says"),
    [
        pytest.param("", "not JSON", id="empty"),
        pytest.param("{", "not JSON", id="cut"),
        pytest.param("[" * 100_000, "not JSON", id="deep"),
        pytest.param("[]", "it is not a JSON object", id="list"),
        pytest.param(
            '{"rpcConfig": {}}', "unknown property 'rpcConfig'; known properties: rpcConfigs, allow", id="unknown"
        ),
        pytest.param('{"rpcConfigs": []}', "rpcConfigs is not an object", id="methods"),
        pytest.param('{"allowOtherRpcs": "true"}', "allowOtherRpcs is neither true nor false", id="others"),
        pytest.param(config({"predict": {}}), "'predict' is not a method's name", id="no service"),
        pytest.param(config({"/a.B/c": {}}), "'/a.B/c' is not a method's name", id="leading slash"),
        pytest.param(config({"a.B/c": []}), "a.B/c is not a JSON object", id="rule"),
        pytest.param(config({"a.B/c": {"path": [1]}}), "a.B/c has an unknown property 'path'", id="unknown in rule"),
        pytest.param(config({"a.B/c": {"idExtractionPath": 1}}), "a.B/c: idExtractionPath is not a list", id="number"),
        pytest.param(config({"a.B/c": {"idExtractionPath": [0]}}), "field numbers", id="field 0"),
        pytest.param(config({"a.B/c": {"idExtractionPath": [1 << 29]}}), "field numbers", id="field too high"),
        pytest.param(config({"a.B/c": {"idExtractionPath": [True]}}), "field numbers", id="true"),
        pytest.param(config({"a.B/c": {"idExtractionPath": [1] * 33}}), "more than 32", id="too long a path"),
        pytest.param(config({"a.B/c": {"vModelId": 1}}), "a.B/c: vModelId is neither", id="flag"),
        pytest.param('{"rpcConfigs": {"\\ud800.B/c": {}}}', "half of a surrogate pair", id="surrogate"),
        pytest.param(" " * (1 << 20) + "{}", "longer than the limit", id="too long"),
    ],
)
def test_what_is_wrong_is_said(document: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        dataplane.parse(document)


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(("rpcConfigs", "allowOtherRpcs", "idExtractionPath", "vModelId", "a.B/c", "x")),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@given(ANY.map(json.dumps) | st.text(max_size=50) | st.binary(max_size=50))
def test_any_content_is_parsed_or_refused_with_a_value_error(document: str | bytes) -> None:
    """Any content is either a configuration or refused with ValueError, so no file can stop the watch."""
    try:
        parsed = dataplane.parse(document)
    except ValueError:
        return
    routes.Routes().adopt(parsed)


def test_without_a_configuration_every_method_is_allowed() -> None:
    """Without a configuration, the id of a method outside V2 is in the metadata."""
    known = adopted(None)
    assert not known.method(OTHER).refused
    assert asked(known, PREDICT, PredictRequest(model_name="body"), [(b"mm-model-id", b"header")]) == (
        "header",
        routes.MODEL,
    )


def test_a_listed_method_has_its_id_at_the_path() -> None:
    """The id at the path takes precedence over a header. If the field is missing, the headers count."""
    known = adopted(config({PREDICT[1:].decode(): {"idExtractionPath": [3, 7]}}))
    header = [(b"mm-model-id", b"header")]
    inner = PredictRequest(inner={"model_name": "body"}, model_name="of no interest")
    assert asked(known, PREDICT, inner, header) == ("body", routes.MODEL)
    assert asked(known, PREDICT, PredictRequest(inner={"note": "n"}), header) == ("header", routes.MODEL)
    assert asked(known, PREDICT, PredictRequest(), [(b"mm-vmodel-id", b"v")]) == ("v", routes.VMODEL)
    with pytest.raises(MeshError, match="must include mm-model-id header"):
        asked(known, PREDICT, PredictRequest())


def test_an_empty_id_in_the_message_is_refused() -> None:
    """A field that is present but empty counts as an empty id, even if a header names a model."""
    known = adopted(config({PREDICT[1:].decode(): {"idExtractionPath": [1]}}))
    call = FakeCall(PREDICT, [(b"mm-model-id", b"header")], framing.pack(b"\x0a\0"))
    with pytest.raises(MeshError, match="non-empty") as error:
        known.asked(call, known.method(PREDICT), call.frame)
    assert error.value.reason is Reason.BAD_REQUEST


@pytest.mark.parametrize(("flag", "kind"), [(True, routes.NAME), (False, routes.MODEL)], ids=["vmodel", "model"])
def test_the_configuration_says_what_an_id_in_a_message_means(flag: bool, kind: int) -> None:
    """With `vModelId`, an id in a message may be an alias's name. Without this setting, it is a model's id."""
    rule = {"idExtractionPath": [1], "vModelId": flag}
    known = adopted(config({PREDICT[1:].decode(): rule, INFER[1:].decode(): rule}))
    assert asked(known, PREDICT, PredictRequest(model_name="a")) == ("a", kind)
    assert asked(known, INFER, inference_pb2.ModelInferRequest(model_name="a")) == ("a", kind)


def test_methods_that_are_not_listed_are_refused_unless_others_are_allowed() -> None:
    """V2's methods must be listed too, if `allowOtherRpcs` is not set."""
    rules = {PREDICT[1:].decode(): {}}
    closed, open_ = adopted(config(rules)), adopted(config(rules, others=True))
    for name in (OTHER, INFER):
        text = f"Method not found or not permitted: {name[1:].decode()}"
        assert closed.method(name).refused == text
        assert not open_.method(name).refused
    assert not closed.method(PREDICT).refused
    assert open_.method(INFER).path == (1,)


def test_no_configuration_opens_the_servers_own_management() -> None:
    """A method of a model server's management API stays refused, even if the configuration lists it or allows other
    methods."""
    unload = "mmesh.ModelRuntime/unloadModel"
    for known in (adopted(config({unload: {}})), adopted(config({}, others=True))):
        assert known.method(b"/" + unload.encode()).refused == f"Method not found or not permitted: {unload}"


def test_v2_keeps_its_versions_under_a_configuration() -> None:
    """A V2 method that the configuration lists with its usual path still has its version, and its calls may still be
    sent again."""
    known = adopted(json.dumps(CONTROLLERS))
    method = known.method(INFER)
    assert method.safe
    assert method.versioned
    frame = framing.pack(inference_pb2.ModelInferRequest(model_name="a", model_version="7").SerializeToString())
    assert known.asked(FakeCall(INFER, [], frame), method, frame) == ("a", routes.NAME, "7")


def test_a_configuration_that_goes_leaves_no_rule_behind() -> None:
    known = adopted(config({PREDICT[1:].decode(): {"idExtractionPath": [1]}}))
    assert known.method(OTHER).refused
    known.adopt(None)
    assert known.method(PREDICT).path == ()
    assert not known.method(OTHER).refused
    assert known.method(INFER).path == (1,)


async def test_a_refused_method_fails_before_its_request_is_read(core) -> None:
    """A call of an unlisted method gets UNIMPLEMENTED, although its message cannot be decoded and its metadata names no
    model."""
    call = FakeCall(OTHER, [], framing.pack(b"\xff"))
    Dispatcher(core.forwarder, adopted(config({}))).dispatch(call)
    assert call.code is Code.UNIMPLEMENTED
    assert call.text == "Method not found or not permitted: mmesh.ExamplePredictor/other"
