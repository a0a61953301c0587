"""The resolution of names to models: aliases, versions, splits, and models that cannot serve."""

import asyncio
from collections import Counter

import pytest
from structlog.testing import capture_logs

from mesh.statuses import Code
from mesh.wire import framing
from tests.support import fakecalls
from tests.support.fakecalls import FakeCall, StreamCall
from tests.support.waiting import until

OTHER = b"/some.Predictor/predict"
METADATA = b"/inference.GRPCInferenceService/ModelMetadata"
VERSIONS = {"7": "fraud@7", "8": "fraud@8"}


def by_header(core, name, header=b"mm-vmodel-id", method=OTHER):
    """Dispatches a call whose metadata names a model or a vmodel, and returns the call."""
    call = FakeCall(method, [(header, name.encode())], framing.pack(b""))
    core.dispatcher.dispatch(call)
    return call


async def model_of(core, pod="a"):
    """Answers the one call in flight, and returns the model to which it was sent."""
    await until(lambda: any(not sent.over for sent in core.sent(pod)), interval=0.001, why="the call is sent")
    (sent,) = [sent for sent in core.sent(pod) if not sent.over]
    sent.reply()
    return sent.headers[b"mm-model-id"].decode()


def series(core, name):
    """Returns the series of a metric by their labels, each with a counter's value or a histogram's count."""
    (metric,) = [one for one in core.counted.snapshot()["metrics"] if one["name"] == name]
    counts = ((tuple(labels), value) for labels, value in metric["series"])
    return {labels: sum(value[0]) if isinstance(value, list) else value for labels, value in counts}


# --- which name is meant ---


async def test_a_hit_by_an_alias_reads_nothing_and_carries_its_names(core):
    """A call by an alias goes to the active model, and carries the alias and the version for the reply. It needs
    neither a read of etcd nor a task."""
    core.resident("fraud@8")
    core.alias("fraud", "fraud@8", versions=VERSIONS)
    call = core.call("fraud")
    (sent,) = core.sent("a")
    assert sent.headers == {
        b"mesh-copy": b"i.7",
        b"mm-model-id": b"fraud@8",
        b"mm-model-id-bin": b"ZnJhdWRAOA",
        b"mesh-as": b"fraud/8",
    }
    assert sent.frame is call.frame
    sent.reply()
    assert call.code is Code.OK
    assert core.etcd.reads == 0
    assert len(core.forwarder.tasks) == 0


async def test_a_name_in_a_message_is_the_alias_and_in_a_header_what_the_header_says(core):
    """If a model and an alias have the same name, `mm-model-id` means the model, and `mm-vmodel-id` and messages mean
    the alias."""
    core.resident("fraud")
    core.resident("fraud@8")
    core.alias("fraud", "fraud@8")
    core.call("fraud")
    assert await model_of(core) == "fraud@8"
    by_header(core, "fraud")
    assert await model_of(core) == "fraud@8"
    by_header(core, "fraud", b"mm-model-id")
    assert await model_of(core) == "fraud"


async def test_a_call_with_a_vmodel_header_is_answered_under_the_models_id(core):
    """As in ModelMesh, the model server does not learn about the alias, so the reply has the model's own id."""
    core.resident("fraud@8")
    core.alias("fraud", "fraud@8", versions=VERSIONS)
    by_header(core, "fraud")
    (sent,) = core.sent("a")
    assert b"mesh-as" not in sent.headers
    assert b"mm-vmodel-id" not in sent.headers
    assert sent.headers[b"mm-model-id"] == b"fraud@8"
    sent.reply()


async def test_an_alias_without_versions_answers_with_its_models_own(core):
    """An alias of ModelMesh has no versions, so the reply has the version from the active model's folder."""
    core.resident("m", path="s3://models/fraud/3/model.onnx")
    core.alias("fraud", "m")
    core.call("fraud")
    assert core.sent("a")[0].headers[b"mesh-as"] == b"fraud/3"
    await model_of(core)


@pytest.mark.parametrize("kind", ["message", "header"])
async def test_an_alias_that_the_feed_has_not_delivered_is_read(core, kind):
    """A vmodel is callable through any worker as soon as its creation has returned."""
    core.resident("fraud@8")
    core.alias("fraud", "fraud@8", feed=False)
    call = core.call("fraud") if kind == "message" else by_header(core, "fraud")
    assert await model_of(core) == "fraud@8"
    assert call.code is Code.OK
    reads = core.etcd.reads
    core.call("fraud")
    assert await model_of(core) == "fraud@8"
    assert core.etcd.reads == reads, "what the read found is remembered"


async def test_an_alias_that_hides_a_cold_model_is_found_by_the_read_for_its_load(core):
    """An alias takes precedence over a model of the same name."""
    core.resident("fraud@8")
    core.register("fraud")
    core.alias("fraud", "fraud@8", feed=False)
    core.call("fraud")
    assert await model_of(core) == "fraud@8"


@pytest.mark.parametrize("kind", ["message", "header"])
async def test_a_name_that_is_neither_is_not_found_after_one_read_for_all(core, kind):
    """A hundred callers of an unknown name share their reads of its keys. At most two reads happen."""
    calls = [core.call("fraud") if kind == "message" else by_header(core, "fraud") for _ in range(100)]
    for call in calls:
        await core.answered(call)
        assert (call.code, call.text) == (
            Code.NOT_FOUND,
            "model not found" if kind == "message" else "vmodel not found",
        )
    assert core.etcd.reads <= 2


async def test_a_vmodel_that_cannot_be_read_is_no_unknown_one(core):
    """While etcd is unavailable, a vmodel that the worker does not know is not reported as unknown, because it may
    exist."""
    core.etcd.away = True
    call = await core.answered(by_header(core, "fraud"))
    assert call.code is Code.UNAVAILABLE


async def test_a_caller_that_goes_away_while_its_name_is_read_is_forgotten(core):
    """Nothing is sent for a call that was cancelled before its vmodel was known."""
    core.resident("fraud@8")
    core.alias("fraud", "fraud@8", feed=False)
    core.etcd.gate.clear()
    call = by_header(core, "fraud")
    await until(lambda: core.etcd.reads == 1)
    call.cancel()
    core.etcd.gate.set()
    await until(lambda: len(core.forwarder.tasks) == 0)
    assert core.sent("a") == []


async def test_a_deadline_ends_the_read_of_a_name(core):
    core.etcd.gate.clear()
    when = asyncio.get_running_loop().time() + 0.01
    call = FakeCall(OTHER, [(b"mm-vmodel-id", b"fraud")], framing.pack(b""), deadline=when)
    core.dispatcher.dispatch(call)
    assert (await core.answered(call)).code is Code.DEADLINE_EXCEEDED


async def test_streams_go_by_alias_too(core):
    """A stream is resolved from its first message, and carries the same names as a unary call."""
    core.resident("fraud@8")
    core.alias("fraud", "fraud@8", versions=VERSIONS)
    call = StreamCall(messages=[core.frame("fraud")])
    core.dispatcher.dispatch(call)
    sent = await core.reaches("a")
    assert sent.headers[b"mesh-as"] == b"fraud/8"
    sent.reply()
    assert (await core.answered(call)).code is Code.OK
    await until(lambda: series(core, "mesh_alias_milliseconds") == {("fraud", "fraud@8"): 1})


# --- a model that is gone ---


async def test_an_alias_that_has_moved_unseen_is_read_again(core):
    """If the feed still names a model that has been removed, the record is read from etcd and names the model that
    serves now."""
    core.resident("fraud@8")
    core.alias("fraud", "fraud@7")
    core.alias("fraud", "fraud@8", feed=False)
    call = core.call("fraud")
    assert await model_of(core) == "fraud@8"
    assert call.code is Code.OK


async def test_an_alias_whose_active_model_is_gone_is_served_by_its_target(core):
    """If the active model is unregistered during a move, the target takes over."""
    core.resident("fraud@8")
    core.alias("fraud", "fraud@7", target="fraud@8")
    call = by_header(core, "fraud")
    assert await model_of(core) == "fraud@8"
    assert call.code is Code.OK


@pytest.mark.parametrize("targets", [("fraud@7", "fraud@7"), ("fraud@7", "fraud@8")])
async def test_an_alias_without_an_existing_model_is_an_internal_error(core, targets):
    """A call by an alias without an existing model fails with ModelMesh's code and text."""
    core.world.pod("a")
    core.alias("fraud", targets[0], target=targets[1])
    call = await core.answered(core.call("fraud"))
    assert (call.code, call.text) == (Code.INTERNAL, f"Target model {targets[1]} of vmodel fraud not found")


@pytest.mark.parametrize(("kind", "text"), [("message", "model not found"), ("header", "vmodel not found")])
async def test_an_alias_that_was_deleted_unseen_is_not_found(core, kind, text):
    """An alias that was deleted in etcd together with its model is not found, although the feed still has it."""
    core.world.pod("a")
    core.alias("fraud", "fraud@7")
    core.remove_alias("fraud", feed=False)
    call = await core.answered(core.call("fraud") if kind == "message" else by_header(core, "fraud"))
    assert (call.code, call.text) == (Code.NOT_FOUND, text)


async def test_a_stream_follows_an_alias_that_has_moved(core):
    core.resident("fraud@8")
    core.alias("fraud", "fraud@7")
    core.alias("fraud", "fraud@8", feed=False)
    call = StreamCall(messages=[core.frame("fraud")])
    core.dispatcher.dispatch(call)
    assert (await core.reaches("a")).headers[b"mm-model-id"] == b"fraud@8"
    assert await model_of(core) == "fraud@8"
    assert (await core.answered(call)).code is Code.OK


# --- versions ---


async def test_a_version_is_called_whichever_is_active(core):
    """A reply names the version that served the call."""
    core.resident("fraud@7")
    core.resident("fraud@8")
    core.alias("fraud", "fraud@8", versions=VERSIONS)
    for version in ("7", "8"):
        core.call("fraud", version=version)
        assert core.sent("a")[-1].headers[b"mesh-as"] == f"fraud/{version}".encode()
        assert await model_of(core) == f"fraud@{version}"


async def test_versions_may_share_a_model(core):
    """If versions share a model, the reply has the requested version, or the latest if none was requested."""
    core.resident("m")
    core.alias("fraud", "m", versions={"1": "m", "2": "m"})
    for version, served in (("1", b"fraud/1"), ("2", b"fraud/2"), ("", b"fraud/2")):
        core.call("fraud", version=version)
        assert core.sent("a")[-1].headers[b"mesh-as"] == served
        await model_of(core)


async def test_a_version_that_does_not_exist_is_not_found_and_the_others_are_named(core):
    core.resident("fraud@8")
    core.alias("fraud", "fraud@8", versions=VERSIONS)
    call = core.call("fraud", version="99")
    assert (call.code, call.text) == (Code.NOT_FOUND, "fraud has no version 99; its versions: 7, 8")
    assert core.sent("a") == []


@pytest.mark.parametrize("alias", [False, True], ids=["model", "alias"])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize(("path", "own"), [("s3://models/fraud/3/model.onnx", "3"), ("s3://models/fraud.onnx", "1")])
async def test_a_model_has_the_version_of_its_folder(core, alias, warm, path, own):
    """A plain model, or an alias that lists no versions, has one version: the one that its folder names, or else 1."""
    core.world.pod("a")
    core.agents.answers["a"] = fakecalls.loaded()
    if warm:
        core.resident("m", path=path)
    else:
        core.register("m", path=path)
    name = "fraud" if alias else "m"
    if alias:
        core.alias("fraud", "m")
    call = core.call(name, version=own)
    assert await model_of(core) == "m"
    assert call.code is Code.OK
    wrong = await core.answered(core.call(name, version="99"))
    assert (wrong.code, wrong.text) == (Code.NOT_FOUND, f"{name} has no version 99; its versions: {own}")


async def test_a_hit_that_names_the_models_own_version_reads_nothing(core):
    """A call that names the model's own version needs no read, because the copy's record has the version."""
    core.resident("m", path="s3://models/fraud/3/model.onnx")
    core.call("m", version="3")
    assert core.sent("a")[0].headers.get(b"mesh-as") is None
    await model_of(core)
    assert core.etcd.reads == 0


async def test_a_version_of_an_unknown_name_is_an_unknown_model(core):
    call = await core.answered(core.call("fraud", version="1"))
    assert (call.code, call.text) == (Code.NOT_FOUND, "model not found")


async def test_a_version_of_an_alias_that_the_feed_has_not_delivered(core):
    """The read for a model of this name also finds an alias that the feed has not delivered."""
    core.resident("fraud@7")
    core.alias("fraud", "fraud@8", versions=VERSIONS, feed=False)
    core.call("fraud", version="7")
    assert await model_of(core) == "fraud@7"


async def test_metadata_lists_the_versions(core):
    """Metadata of an alias lists the versions that it keeps. Metadata of a model, by its id, has the model's own
    version."""
    core.resident("fraud@8", path="s3://models/fraud/8/model.onnx")
    core.alias("fraud", "fraud@8", versions=VERSIONS)
    for name, listed, named in (("fraud", b"7/8", b"fraud/8"), ("fraud@8", b"8", None)):
        call = FakeCall(METADATA, frame=core.frame(name))
        core.dispatcher.dispatch(call)
        sent = core.sent("a")[-1]
        assert (sent.headers[b"mesh-versions"], sent.headers.get(b"mesh-as")) == (listed, named)
        sent.reply()


# --- splits ---


async def test_calls_are_split_by_weight(core):
    """If the canary has 10 %, its part of 2,000 calls is 200, give or take four standard deviations."""
    core.resident("fraud@7")
    core.resident("fraud@8")
    core.alias("fraud", "fraud@7", versions=VERSIONS, weights={"fraud@7": 90, "fraud@8": 10})
    got = Counter()
    for _ in range(2000):
        core.call("fraud")
        got[await model_of(core)] += 1
    assert 146 <= got["fraud@8"] <= 254
    assert series(core, "mesh_alias_milliseconds") == {("fraud", model): count for model, count in got.items()}


async def test_a_sticky_key_keeps_its_model(core):
    """Each user gets the same model in every call, and all users together get both models."""
    core.resident("fraud@7")
    core.resident("fraud@8")
    core.alias("fraud", "fraud@7", weights={"fraud@7": 1, "fraud@8": 1}, sticky="X-User")
    got: dict[int, set[str]] = {}
    for number in range(200):
        core.call("fraud", headers=[(b"x-user", b"%d" % (number % 20))])
        got.setdefault(number % 20, set()).add(await model_of(core))
    assert all(len(models) == 1 for models in got.values())
    assert len(set().union(*got.values())) == 2


async def test_a_model_of_a_split_that_is_not_loaded_costs_no_wait(core):
    """Calls drawn for a model that is not loaded go to the loaded one, and cause a load. The log says so once."""
    core.resident("fraud@7", "a")
    core.world.pod("b")
    core.agents.answers["b"] = fakecalls.loaded()
    core.world.view.pods["a"].failed_at = 0.0
    core.register("fraud@8")
    core.alias("fraud", "fraud@7", weights={"fraud@7": 1, "fraud@8": 99})
    core.agents.answers = {pod: fakecalls.failed("bad file") for pod in ("a", "b")}
    with capture_logs() as lines:
        calls = [core.call("fraud") for _ in range(50)]
        assert len(core.sent("a")) == 50
        for sent in core.sent("a"):
            sent.reply()
        await until(lambda: core.agents.loads)
        await until(lambda: not core.coldstart.loading("fraud@8"))
    assert {call.code for call in calls} == {Code.OK}
    assert {request.model_id for _, request in core.agents.loads} == {"fraud@8"}
    assert series(core, "mesh_alias_diverted")["fraud", "fraud@8"] > 30
    said = [line for line in lines if line["event"] == "a model of an alias cannot serve; its calls go to others"]
    assert [(line["alias"], line["model"]) for line in said] == [("fraud", "fraud@8")]


@pytest.mark.parametrize("stream", [False, True], ids=["unary", "stream"])
async def test_a_sticky_model_that_cannot_be_loaded_costs_no_call(core, stream):
    """Callers with a sticky key wait for the load of their model. If the load fails, another model answers them."""
    core.resident("fraud@7", "a")
    core.alias("fraud", "fraud@7", weights={"fraud@8": 99}, sticky="x-user")
    core.register("fraud@8")
    core.agents.answers["a"] = fakecalls.failed("bad file")
    user = [(b"x-user", b"1")]
    if stream:
        call = StreamCall(headers=user, messages=[core.frame("fraud")])
        core.dispatcher.dispatch(call)
    else:
        call = core.call("fraud", headers=user)
    assert await model_of(core) == "fraud@7"
    assert (await core.answered(call)).code is Code.OK
    assert series(core, "mesh_alias_diverted")["fraud", "fraud@8"] == 1


async def test_a_load_that_hangs_leaves_half_of_the_callers_time_to_another_model(core):
    """A sticky caller with a deadline does not spend all of its time on a canary whose load hangs: another model
    answers in time."""
    core.resident("fraud@7", "a")
    core.alias("fraud", "fraud@7", weights={"fraud@7": 1, "fraud@8": 10**6}, sticky="x-user")
    core.register("fraud@8")
    hangs = asyncio.Event()

    async def hang(_):
        await hangs.wait()
        return fakecalls.failed()

    core.agents.answers["a"] = hang
    call = core.call("fraud", headers=[(b"x-user", b"1")], deadline=0.4)
    assert await model_of(core) == "fraud@7"
    assert call.code is Code.OK
    hangs.set()
    await until(lambda: not core.coldstart.loading("fraud@8"))


async def test_a_split_whose_models_all_fail_answers_with_the_last_error(core):
    core.world.pod("a")
    core.agents.answers["a"] = fakecalls.failed("bad file")
    for model in ("fraud@7", "fraud@8"):
        core.register(model)
    core.alias("fraud", "fraud@7", weights={"fraud@7": 1, "fraud@8": 1})
    call = await core.answered(core.call("fraud"))
    assert (call.code, "bad file" in call.text) == (Code.INTERNAL, True)
    assert {request.model_id for _, request in core.agents.loads} == {"fraud@7", "fraud@8"}


async def test_a_version_that_was_asked_for_is_not_replaced(core):
    """A caller that names a version of a split alias gets that version, or the error of that version."""
    core.resident("fraud@7", "a")
    core.register("fraud@8")
    core.agents.answers["a"] = fakecalls.failed("bad file")
    core.alias("fraud", "fraud@7", versions=VERSIONS, weights={"fraud@7": 1, "fraud@8": 1})
    call = await core.answered(core.call("fraud", version="8"))
    assert call.code is Code.INTERNAL
    assert core.sent("a") == []


async def test_an_error_of_the_model_itself_is_the_answer(core):
    """If the chosen model of a split fails a call, its error is the answer, because another version might answer
    something else."""
    core.resident("fraud@7", "a")
    core.resident("fraud@8", "a")
    core.alias("fraud", "fraud@7", weights={"fraud@8": 1})
    call = core.call("fraud")
    core.sent("a")[0].fail(Code.INTERNAL, "division by zero")
    assert (call.code, call.text) == (Code.INTERNAL, "division by zero")
    assert series(core, "mesh_alias_errors")["fraud", "fraud@8"] == 1


async def test_weights_that_change_apply_to_the_next_call(core):
    core.resident("fraud@7")
    core.resident("fraud@8")
    for model in ("fraud@7", "fraud@8", "fraud@7"):
        core.alias("fraud", "fraud@7", weights={model: 1})
        core.call("fraud")
        assert await model_of(core) == model


# --- counting ---


async def test_series_of_models_that_an_alias_no_longer_names_are_dropped(core):
    """If an alias no longer names a model, their series ends. A year of weekly releases does not inflate the
    metrics."""
    for number in range(1, 10):
        core.resident(f"fraud@{number}")
        core.alias("fraud", f"fraud@{number}")
        core.call("fraud")
        await model_of(core)
    assert series(core, "mesh_alias_milliseconds") == {("fraud", "fraud@9"): 1}
    core.remove_alias("fraud")
    assert series(core, "mesh_alias_milliseconds") == {}


async def test_beyond_a_number_of_pairs_aliases_are_counted_together(core):
    """Only 200 pairs of alias and model have series of their own, so the metrics of a mesh with thousands of aliases
    stay readable."""
    core.resident("m")
    for number in range(205):
        core.alias(f"alias-{number}", "m")
        core.call(f"alias-{number}")
        await model_of(core)
    found = series(core, "mesh_alias_milliseconds")
    assert len(found) == 201
    assert found["other", "other"] == 5
