"""Shadows: the calls that they get, what is counted, and that callers are not affected."""

import itertools

import pytest

from mesh.pb import inference_pb2 as pb
from mesh.statuses import Code
from mesh.wire import framing
from mesh.wire.client import LostKind
from placement.vmodels.record import Mirror
from router.calls import mirror
from router.calls.mirror import BUSY, EACH, MAX_BYTES, MOST
from tests.support import fakecalls
from tests.support.fakecalls import FakeCall, StreamCall
from tests.support.waiting import until

SHADOW = {"target": "fraud@9", "share": 100}


def shadowed(core, *pods, name="fraud", **mesh):
    """Creates an alias with a shadow, whose copy is in a separate pod."""
    core.resident("fraud@8", *(pods or ("a",)))
    core.resident("fraud@9", "s")
    core.alias(name, "fraud@8", mirror=SHADOW, **mesh)


def reply_of(name="fraud", values=b"1234", id="7", version="8"):
    message = pb.ModelInferResponse(model_name=name, model_version=version, id=id, raw_output_contents=[values])
    message.outputs.add(name="y", datatype="FP32", shape=[1])
    return framing.pack(message.SerializeToString())


async def answered(core, frame=None, code=0, name="fraud", **more):
    """Makes a call, answers it in pod `a`, and returns it."""
    call = core.call(name, **more)
    (sent,) = [sent for sent in core.sent("a") if not sent.over]
    if code:
        sent.fail(code, "no")
    else:
        sent.reply(frame or reply_of())
    assert call.answers
    return call


async def mirrored(core, count=1):
    """Waits until the shadow has at least `count` calls in flight, and returns them."""
    open_ = lambda: [sent for sent in core.sent("s") if not sent.over]  # noqa: E731
    await until(lambda: len(open_()) >= count, interval=0.001, why=f"{count} calls reach the shadow")
    return open_()


async def settled(core):
    """Waits until no call is about to be sent to a shadow."""
    mirrors = core.forwarder.mirrors
    sent = lambda: sum(call.mirrored.size for call in mirrors._running)  # noqa: E731
    await until(lambda: mirrors._held == sent(), interval=0.001, why="every offered call is sent or shed")


def counts(core):
    """Returns the numbers of the shadow's calls by outcome."""
    (metric,) = [one for one in core.counted.snapshot()["metrics"] if one["name"] == "mesh_mirror_calls"]
    return {labels[2]: value for labels, value in metric["series"] if value}


def clean(core):
    """Checks that no memory is reserved for shadows and that no shadow call counts as in flight."""
    mirrors = core.forwarder.mirrors
    assert (mirrors._held, mirrors._running, mirrors._in_flight) == (0, set(), {})
    assert core.forwarder.budget.held == 0
    assert not any(pod.in_flight for pod in core.world.view.pods.values())


async def test_a_shadow_gets_the_call_after_its_caller_was_answered(core):
    """A shadow gets the caller's bytes and headers, addressed to the shadow's copy. Its answer is compared and
    dropped."""
    shadowed(core, versions={"8": "fraud@8"})
    call = core.call("fraud", headers=[(b"x-trace", b"1")])
    assert core.sent("s") == []
    core.sent("a")[0].reply(reply_of())
    assert call.code is Code.OK
    (sent,) = await mirrored(core)
    assert sent.frame is call.frame
    assert sent.headers == {
        b"x-trace": b"1",
        b"mesh-as": b"fraud/8",
        b"mesh-copy": b"i.7",
        b"mm-model-id": b"fraud@9",
        b"mm-model-id-bin": b"ZnJhdWRAOQ",
    }
    assert sent.timeout == b"10000000u"
    sent.reply(reply_of())
    assert counts(core) == {"equal": 1}
    assert len(call.answers) == 1
    clean(core)


@pytest.mark.parametrize(
    ("primary", "shadow", "outcome"),
    [
        pytest.param(reply_of(), reply_of("fraud@9", version="", id=""), "equal", id="names"),
        pytest.param(reply_of(), reply_of(values=b"1235"), "different", id="values"),
        pytest.param(reply_of(), framing.pack(b"\xff\xff"), "different", id="garbage"),
        pytest.param(b"\1" + reply_of()[1:], b"\1" + reply_of(id="8")[1:], "different", id="compressed"),
        pytest.param(reply_of(), Code.INTERNAL, "failed", id="shadow-fails"),
        pytest.param(Code.INVALID_ARGUMENT, Code.INVALID_ARGUMENT, "equal", id="both-fail"),
        pytest.param(Code.INVALID_ARGUMENT, reply_of(), "different", id="caller-fails"),
    ],
)
async def test_answers_are_compared_by_outputs_and_codes(core, primary, shadow, outcome):
    """Answers are compared by their values, not by names, versions and ids. Compressed answers are compared byte by
    byte, and failures by their codes."""
    shadowed(core)
    if isinstance(primary, Code):
        await answered(core, code=primary)
    else:
        await answered(core, primary)
    (sent,) = await mirrored(core)
    if isinstance(shadow, Code):
        sent.fail(shadow, "no")
    else:
        sent.reply(shadow)
    assert counts(core) == {outcome: 1}
    clean(core)


async def test_the_share_is_what_the_record_says(core):
    """With a share of 25 %, one call in four is mirrored if the draws are evenly spread."""
    shadowed(core)
    core.alias("fraud", "fraud@8", mirror={"target": "fraud@9", "share": 25})
    numbers = itertools.cycle([0.1, 0.3, 0.5, 0.9])
    core.forwarder.mirrors._uniform = lambda: next(numbers)
    for _ in range(12):
        await answered(core)
        for sent in [sent for sent in core.sent("s") if not sent.over]:
            sent.reply(reply_of())
        await settled(core)
    for sent in [sent for sent in core.sent("s") if not sent.over]:
        sent.reply(reply_of())
    assert counts(core) == {"equal": 3}


async def test_a_shadow_that_hangs_gets_a_few_calls_and_then_a_pause(core, monkeypatch):
    """If a shadow hangs, callers are still answered. The shadow gets a few calls and the rest are shed. After the
    timeout all are shed for a while."""
    monkeypatch.setattr(mirror, "TIMEOUT", 0.05)
    shadowed(core)
    for _ in range(EACH + 3):
        await answered(core)
    hanging = await mirrored(core, EACH)
    assert counts(core) == {"shed": 3}
    await until(lambda: all(sent.cancelled for sent in hanging), interval=0.005)
    assert counts(core) == {"shed": 3, "failed": EACH}
    await answered(core)
    assert counts(core) == {"shed": 4, "failed": EACH}
    assert len(core.sent("s")) == EACH
    clean(core)


async def test_a_shadow_whose_server_dies_gets_a_pause(core):
    """The death of a shadow's server counts against the shadow's model, not against the active one. The next call is
    not mirrored."""
    shadowed(core)
    await answered(core)
    (sent,) = await mirrored(core)
    sent.lose(LostKind.SENT)
    assert "fraud@9" in core.forwarder.deaths.watched
    assert "fraud@8" not in core.forwarder.deaths.watched
    await answered(core)
    assert counts(core) == {"failed": 1, "shed": 1}
    clean(core)


async def test_a_shadow_that_cannot_be_reached_is_not_tried_again(core):
    shadowed(core)
    await answered(core)
    (sent,) = await mirrored(core)
    sent.lose(LostKind.UNSENT)
    assert len(core.sent("s")) == 1
    assert counts(core) == {"failed": 1}
    clean(core)


async def test_a_shadow_that_is_not_there_is_forgotten(core):
    """A pod that has no copy of the shadow is not called for it again. The call is shed, not repeated."""
    shadowed(core)
    await answered(core)
    (sent,) = await mirrored(core)
    sent.not_here()
    assert core.world.callable("fraud@9") == []
    assert counts(core) == {"shed": 1}
    clean(core)


async def test_a_shadow_that_is_not_loaded_causes_one_load(core):
    """A hundred calls of an alias whose shadow is not loaded request one load of the shadow and are not mirrored. No
    call waits."""
    core.resident("fraud@8")
    core.register("fraud@9")
    core.alias("fraud", "fraud@8", mirror=SHADOW)
    core.agents.answers["a"] = fakecalls.failed("bad file")
    for _ in range(100):
        await answered(core)
        await settled(core)
    await until(lambda: core.agents.loads and not core.coldstart.loading("fraud@9"))
    assert [request.model_id for _, request in core.agents.loads] == ["fraud@9"]
    assert counts(core) == {"shed": 100}
    clean(core)


async def test_a_busy_pod_gets_no_calls_of_shadows(core):
    """If the shadow's pod has more than a few calls of callers, calls for the shadow are shed. Calls of shadows in this
    pod do not count."""
    shadowed(core)
    core.world.view.pods["s"].load = BUSY
    await answered(core)
    await settled(core)
    assert core.sent("s") == []
    assert counts(core) == {"shed": 1}
    core.world.view.pods["s"].load = BUSY - 1
    for _ in range(EACH):
        await answered(core)
    for sent in await mirrored(core, EACH):
        sent.reply(reply_of())
    assert counts(core) == {"shed": 1, "equal": EACH}
    clean(core)


async def test_all_shadows_together_have_few_calls_in_flight(core):
    """Ten aliases whose shadows hang have no more calls in flight than the common limit for shadows."""
    for number in range(10):
        shadowed(core, name=f"alias-{number}")
    for _ in range(EACH):
        for number in range(10):
            await answered(core, name=f"alias-{number}")
    sent = await mirrored(core, MOST)
    await settled(core)
    assert len(sent) == MOST
    for one in sent:
        one.reply(reply_of())
    clean(core)


async def test_memory_for_shadows_is_bounded(core):
    """A call is not mirrored if its request and answer exceed the memory for shadows. A smaller call afterwards is
    mirrored."""
    shadowed(core)
    await answered(core, framing.pack(bytes(MAX_BYTES)))
    assert counts(core) == {"shed": 1}
    await answered(core)
    (sent,) = await mirrored(core)
    sent.reply(reply_of())
    assert counts(core) == {"shed": 1, "equal": 1}
    clean(core)


async def test_shadows_give_way_when_bodies_fill_their_total(core, monkeypatch):
    """A call is not mirrored if the budget has no room for its bytes."""
    shadowed(core)
    monkeypatch.setattr(core.forwarder.budget, "large", 10)
    await answered(core)
    assert counts(core) == {"shed": 1}


@pytest.mark.parametrize("method", ["ModelMetadata", "ModelReady"])
async def test_questions_about_a_model_are_not_mirrored(core, method):
    shadowed(core)
    call = FakeCall(b"/inference.GRPCInferenceService/" + method.encode(), frame=core.frame("fraud"))
    core.dispatcher.dispatch(call)
    core.sent("a")[0].reply()
    assert core.forwarder.mirrors._held == 0
    assert counts(core) == {}


async def test_a_call_whose_end_came_late_is_mirrored_too(core):
    """A unary call that is carried as a stream, because its end comes late, is mirrored too."""
    shadowed(core)
    call = StreamCall(messages=[core.frame("fraud")])
    core.dispatcher.dispatch(call)
    (await core.reaches("a")).reply(reply_of())
    assert (await core.answered(call)).code is Code.OK
    (sent,) = await mirrored(core)
    assert sent.frame == core.frame("fraud")
    sent.reply(reply_of())
    assert counts(core) == {"equal": 1}
    clean(core)


async def test_another_shadow_has_counts_of_its_own(core):
    """When the record names another shadow, or none, the series of the former shadow are dropped."""
    shadowed(core)
    await answered(core)
    for sent in await mirrored(core):
        sent.reply(reply_of())
    assert counts(core) == {"equal": 1}
    core.resident("fraud@10", "s")
    core.alias("fraud", "fraud@8", mirror={"target": "fraud@10", "share": 50.5})
    assert core.vmodels.get("fraud").more.mirror == Mirror("fraud@10", 50.5)
    assert counts(core) == {}
    core.forwarder.mirrors._uniform = lambda: 0.5
    await answered(core)
    for sent in await mirrored(core):
        sent.reply(reply_of(values=b"4321"))
    assert counts(core) == {"different": 1}
    core.alias("fraud", "fraud@8")
    assert counts(core) == {}


async def test_a_worker_that_stops_ends_its_shadows_calls(core):
    """A worker that stops cancels the calls that its shadows have in flight, without counting them."""
    shadowed(core)
    await answered(core)
    (sent,) = await mirrored(core)
    core.forwarder.mirrors.close()
    assert sent.cancelled
    assert counts(core) == {}
    clean(core)
