"""Calls to models in a mesh that identifies its callers: unary calls, streams and foreign methods."""

import dataclasses
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.access.grants import decide
from mesh.access.principals import Principal
from mesh.access.verbs import Verb
from mesh.statuses import Code
from mesh.wire import framing
from router.calls.dispatch import Dispatcher
from router.calls.routes import Routes
from tests.support.access import SlowTokens, guard_of
from tests.support.fakecalls import FakeCall, StreamCall
from tests.support.onnxserver import request
from tests.support.tokens import FakeIssuer, by_hand, by_hmac, known_tokens
from tests.support.waiting import until

KEY, OTHER = "mesh_" + "k" * 43, "mesh_" + "o" * 43
BEARER = (b"authorization", b"Bearer " + KEY.encode())
FOREIGN = b"/some.Predictor/predict"
ISSUER = FakeIssuer()
TOKEN_OF_K, TOKEN_OF_O = ISSUER.token("k"), ISSUER.token("o")


@pytest.fixture
def guarded(core):
    """Returns the core with a guard: the key `k` may call `m`, `live` and `late/*`, and the key `o` nothing."""
    guard = guard_of("required", {"k": KEY, "o": OTHER}, {"k": ("infer", ["m", "live", "late/*"], ["key:k"])})
    dispatcher = Dispatcher(core.forwarder, Routes(), guard)
    core.resident("m")
    core.resident("secret")
    return dataclasses.replace(core, dispatcher=dispatcher)


def answer_of(call):
    ((code, text, *_),) = call.answers
    return Code(code), text


async def test_a_call_without_a_key_is_refused_before_it_is_read(guarded):
    call = FakeCall(frame=b"\0\0\0\0\x05nonsense")
    guarded.dispatcher.dispatch(call)
    code, text = answer_of(call)
    assert code is Code.UNAUTHENTICATED
    assert "authorization: Bearer KEY" in text
    assert not guarded.sent("a")


async def test_the_key_reaches_the_dispatcher_and_never_the_model_server(guarded):
    call = guarded.call("m", headers=[BEARER, (b"x-forwarded-client-cert", b"URI=x"), (b"x-trace", b"1")])
    (sent,) = guarded.sent("a")
    assert b"authorization" not in sent.headers
    assert b"x-forwarded-client-cert" not in sent.headers
    assert sent.headers[b"x-trace"] == b"1"
    sent.reply()
    assert call.code is Code.OK


async def test_credentials_are_not_passed_on_by_an_open_mesh_either(core):
    core.resident("m")
    core.call("m", headers=[BEARER])
    (sent,) = core.sent("a")
    assert b"authorization" not in sent.headers
    sent.reply()


@pytest.mark.parametrize("name", ["secret", "missing", "M", "m ", "m@", "%6d", "late", "m/../secret"])
async def test_a_refusal_does_not_tell_whether_a_model_exists(guarded, name):
    allowed = name == "m@"  # a version of m
    call = guarded.call(name, headers=[BEARER])
    if allowed:
        assert not call.answers
        await guarded.answered(call)
        assert call.code is Code.NOT_FOUND
        return
    code, text = answer_of(call)
    assert code is Code.PERMISSION_DENIED
    assert text == f"key:k has no grant of infer or admin on {name}. An admin can give one: mesh grants add"
    assert guarded.etcd.reads == 0


async def test_a_known_caller_without_grants_may_call_nothing(guarded):
    call = guarded.call("m", headers=[(b"authorization", b"Bearer " + OTHER.encode())])
    assert answer_of(call)[0] is Code.PERMISSION_DENIED


async def test_a_grant_on_an_alias_covers_its_model_only_by_that_name(guarded):
    guarded.alias("live", "secret", versions={"7": "secret"})
    call = guarded.call("live", headers=[BEARER])
    guarded.sent("a")[-1].reply()
    assert call.code is Code.OK
    call = guarded.call("live", version="7", headers=[BEARER])
    guarded.sent("a")[-1].reply()
    assert call.code is Code.OK
    assert answer_of(guarded.call("secret", headers=[BEARER]))[0] is Code.PERMISSION_DENIED


@pytest.mark.parametrize("header", [b"mm-model-id", b"mm-vmodel-id", b"tas-model-id"])
async def test_a_foreign_method_is_decided_by_the_name_in_its_metadata(guarded, header):
    call = FakeCall(FOREIGN, [BEARER, (header, b"secret")], framing.pack(b"payload"))
    guarded.dispatcher.dispatch(call)
    assert answer_of(call)[0] is Code.PERMISSION_DENIED
    assert not guarded.sent("a")


async def test_a_foreign_method_with_a_grant_is_forwarded(guarded):
    call = FakeCall(FOREIGN, [BEARER, (b"mm-model-id", b"m")], framing.pack(b"payload"))
    guarded.dispatcher.dispatch(call)
    guarded.sent("a")[-1].reply()
    assert call.code is Code.OK


async def test_the_name_in_the_message_decides_not_the_one_in_the_metadata(guarded):
    """The router calls the model in the message, so a permitted name in the metadata does not help."""
    call = guarded.call("secret", headers=[BEARER, (b"mm-model-id", b"m")])
    assert answer_of(call)[0] is Code.PERMISSION_DENIED


@pytest.mark.parametrize(
    ("headers", "frame", "code"),
    [
        ([], framing.pack(request("m")), Code.UNAUTHENTICATED),
        ([BEARER], framing.pack(request("secret")), Code.PERMISSION_DENIED),
        ([BEARER, (b"mm-model-id", b"m")], framing.pack(request("secret")), Code.PERMISSION_DENIED),
    ],
)
async def test_a_stream_is_decided_by_its_first_message(guarded, headers, frame, code):
    call = StreamCall(headers=headers, messages=[frame])
    guarded.dispatcher.dispatch(call)
    await guarded.answered(call)
    assert call.code is code
    assert not guarded.sent("a")


async def test_a_stream_of_a_foreign_method_is_decided_by_its_metadata(guarded):
    call = StreamCall(FOREIGN, [BEARER, (b"mm-model-id", b"secret")], [framing.pack(b"x")])
    guarded.dispatcher.dispatch(call)
    await guarded.answered(call)
    assert call.code is Code.PERMISSION_DENIED


@pytest.mark.parametrize("ids", [(b"m", b"secret"), (b"secret", b"m"), (b"secret", b"secret"), (b"m", b"missing")])
@pytest.mark.parametrize("arrives", ["whole", "as a stream"])
async def test_a_call_of_several_models_needs_the_right_to_each(guarded, ids, arrives):
    headers = [BEARER, *((b"mm-model-id", one) for one in ids)]
    frame = framing.pack(b"payload")
    call = FakeCall(FOREIGN, headers, frame) if arrives == "whole" else StreamCall(FOREIGN, headers, [frame])
    guarded.dispatcher.dispatch(call)
    await guarded.answered(call)
    assert call.code is Code.PERMISSION_DENIED


@pytest.mark.parametrize("arrives", ["whole", "as a stream"])
async def test_several_ids_in_the_metadata_do_not_hide_the_one_in_the_message(guarded, arrives):
    headers = [BEARER, (b"mm-model-id", b"m"), (b"mm-model-id", b"live")]
    frame = framing.pack(request("secret"))
    call = (
        FakeCall(headers=headers, frame=frame) if arrives == "whole" else StreamCall(headers=headers, messages=[frame])
    )
    guarded.dispatcher.dispatch(call)
    await guarded.answered(call)
    assert call.code is Code.PERMISSION_DENIED
    assert not guarded.sent("a")


async def test_methods_that_are_never_forwarded_need_a_known_caller_too(guarded):
    for headers, code in (([], Code.UNAUTHENTICATED), ([BEARER], Code.UNIMPLEMENTED)):
        call = FakeCall(b"/mmesh.ModelRuntime/loadModel", headers, framing.pack(b""))
        guarded.dispatcher.dispatch(call)
        assert call.code is code


# -- callers who cannot be identified at once


@pytest.fixture
def slow(core):
    """Returns the core with a guard that must wait to identify callers, and the authenticator."""
    slow = SlowTokens()
    guard = guard_of("required", {}, {"a": ("infer", ["m"], ["user:anna"])}, others=[slow])
    core.resident("m")
    core.resident("secret")
    return dataclasses.replace(core, dispatcher=Dispatcher(core.forwarder, Routes(), guard)), slow


@pytest.mark.parametrize(
    ("token", "model", "code"),
    [
        (b"slow-anna", "m", Code.OK),
        (b"slow-anna", "secret", Code.PERMISSION_DENIED),
        (b"slow-bob", "m", Code.PERMISSION_DENIED),
        (b"slow-bad", "m", Code.UNAUTHENTICATED),
    ],
)
async def test_a_call_waits_until_its_caller_is_identified(slow, token, model, code):
    core, authenticator = slow
    call = core.call(model, headers=[(b"authorization", b"Bearer " + token)])
    await until(lambda: authenticator.waiting, why="the call waits")
    assert not call.answers
    assert not core.sent("a")
    authenticator.known.set()
    if code is Code.OK:
        await until(lambda: core.sent("a"), why="the call is forwarded")
        core.sent("a")[-1].reply()
    await core.answered(call)
    assert call.code is code


async def test_a_stream_waits_until_its_caller_is_identified(slow):
    core, authenticator = slow
    call = StreamCall(headers=[(b"authorization", b"Bearer slow-bad")], messages=[framing.pack(request("m"))])
    core.dispatcher.dispatch(call)
    authenticator.known.set()
    await core.answered(call)
    assert call.code is Code.UNAUTHENTICATED


async def test_a_caller_who_leaves_while_it_is_identified_makes_no_call(slow):
    core, authenticator = slow
    call = core.call("m", headers=[(b"authorization", b"Bearer slow-anna")])
    await until(lambda: authenticator.waiting, why="the call waits")
    call.cancel()
    authenticator.known.set()
    await until(lambda: not core.forwarder.tasks, why="the task has ended")
    assert not core.sent("a")


async def test_the_wait_for_a_caller_ends_at_the_deadline(slow):
    core, _ = slow
    headers = [(b"authorization", b"Bearer slow-anna")]
    call = FakeCall(headers=headers, deadline=core.forwarder.loop.time() + 0.001)
    core.dispatcher.dispatch(call)
    await core.answered(call)
    assert call.code is Code.DEADLINE_EXCEEDED


# -- tokens


@pytest.mark.parametrize("way", ["unary", "stream", "several", "shadow"])
async def test_a_token_never_reaches_a_model_server(core, way):
    """No model server gets the token, whether the call is unary or a stream, goes to several models, or is mirrored to
    a shadow."""
    grants = {"k": ("infer", ["*"], ["user:k"])}
    guard = guard_of("required", {}, grants, others=[known_tokens(ISSUER)], wall=time.time)
    guarded = dataclasses.replace(core, dispatcher=Dispatcher(core.forwarder, Routes(), guard))
    core.resident("m")
    core.resident("n")
    core.alias("live", "m", mirror={"target": "n", "share": 100})
    headers = [(b"authorization", b"Bearer " + TOKEN_OF_K.encode()), (b"x-trace", b"1")]
    frame = framing.pack(b"payload")
    match way:
        case "unary" | "shadow":
            call = guarded.call("m" if way == "unary" else "live", headers=headers)
        case "stream":
            call = StreamCall(FOREIGN, [*headers, (b"mm-model-id", b"m")], [frame])
            guarded.dispatcher.dispatch(call)
        case "several":
            call = FakeCall(FOREIGN, [*headers, (b"mm-model-id", b"m"), (b"mm-model-id", b"n")], frame)
            guarded.dispatcher.dispatch(call)
    if way == "shadow":
        core.sent("a")[-1].reply()
    await core.reaches("a", 2 if way in ("several", "shadow") else 1)
    for sent in core.sent("a"):
        assert sent.headers[b"x-trace"] == b"1"
        assert b"authorization" not in sent.headers
        assert TOKEN_OF_K.encode() not in b"".join([*sent.headers.values(), sent.frame or b"", *sent.messages])
    call.cancel()


# -- tricks

SCHEMES = st.sampled_from([b"Bearer ", b"bearer ", b"Basic ", b"", b"Bearer\t", b"Bearer "])


def _mixed(first, second):
    """Returns a token with the claims of the first and the signature of the second."""
    return first.rpartition(".")[0] + "." + second.rpartition(".")[2]


VALID = {KEY: "key:k", OTHER: "key:o", TOKEN_OF_K: "user:k", TOKEN_OF_O: "user:o"}
"""The valid credentials, each with its caller."""

_K, _O = TOKEN_OF_K, TOKEN_OF_O
_SECRETS = [ISSUER.jwks, json.dumps(json.loads(ISSUER.jwks)["keys"][0]).encode()]
INVALID = [
    *(KEY[:-1], "", "m", "*", "everyone", "user:k"),
    *(_mixed(_K, _O), _mixed(_O, _K), _K.upper(), _K[:-1], f"{_K}A", f"{_K}.", f".{_K}", f"{_K},{_O}", f"{KEY} {_K}"),
    *(_K.rpartition(".")[0] + ".", f"Bearer {_K}", _K.replace("ey", "e\u0443", 1)),
    *(by_hmac({"kid": ISSUER.current}, ISSUER.claims("k"), secret).decode() for secret in _SECRETS),
    by_hand({"alg": "none", "kid": ISSUER.current}, ISSUER.claims("k")).decode(),
    FakeIssuer().token("k", headers={"kid": ISSUER.current}),
    FakeIssuer("https://other.example").token("k"),
    *(ISSUER.token("k", **change) for change in ({"aud": "other"}, {"lifetime": -100}, {"nbf": 4e9}, {"iss": "x"})),
]
VALUES = st.sampled_from([one.encode() for one in (*VALID, *INVALID)])
NAMES = st.sampled_from(["m", "secret", "live", "late/x", "late/", "m@1", "m%2F", "*", "M", "late/*", "m\0", ""])
HEADERS = st.lists(
    st.one_of(
        st.tuples(st.just(b"authorization"), st.builds(bytes.__add__, SCHEMES, VALUES)),
        st.tuples(
            st.sampled_from([b"mm-model-id", b"mm-vmodel-id", b"tas-model-id", b"x-user", b"mesh-copy", b"mesh-as"]),
            st.sampled_from([b"m", b"secret", b"late/x", b"m,secret", b"*"]),
        ),
        st.tuples(st.just(b"mm-model-id-bin"), st.sampled_from([b"bQ", b"c2VjcmV0", b"bQ,c2VjcmV0", b"!"])),
    ),
    max_size=4,
)


@given(HEADERS, NAMES, st.booleans())
def test_no_trick_with_headers_turns_a_denial_into_a_call(headers, name, foreign):
    """Whatever headers a call has, the router looks for a copy of a model only if `decide` allows its name."""
    grants = {"k": ("infer", ["m", "late/*"], ["key:k", "user:k"])}
    guard = guard_of("required", {"k": KEY, "o": OTHER}, grants, others=[known_tokens(ISSUER)], wall=time.time)
    asked: list[str] = []
    several: list[str] = []

    class Aliases:
        def settled(self, call, wanted):
            asked.append(wanted[0])
            raise LookupError

    class Tasks:
        def start(self, work, what):
            work.close()
            several.append(what)

    class Forwarder:
        aliases = Aliases()
        tasks = Tasks()

        class meter:
            @staticmethod
            def call(*_):
                pass

    frame = framing.pack(b"payload") if foreign else framing.pack(b"\x0a" + bytes([len(name)]) + name.encode())
    call = FakeCall(FOREIGN, headers, frame) if foreign else FakeCall(headers=headers, frame=frame)
    try:
        Dispatcher(Forwarder(), Routes(), guard).dispatch(call)
    except LookupError:
        keys = {value for key, value in headers if key == b"authorization"}
        assert len(keys) == 1
        (given,) = keys
        assert given.lower().startswith(b"bearer ")
        caller = VALID[given[len(b"bearer ") :].strip().decode()]
        assert guard.known([(b"authorization", given)]).name == caller
        assert decide(guard.authority.grants, Principal(caller), Verb.INFER, asked[0]).allowed
        assert asked[0] == name or foreign
    else:
        if several:  # its calls come back to the dispatcher, one for each id, with the same credentials
            assert several in (["call several models"], ["identify a caller"])
            assert not call.answers
            return
        assert call.code in (Code.UNAUTHENTICATED, Code.PERMISSION_DENIED, Code.INVALID_ARGUMENT, Code.UNIMPLEMENTED)
