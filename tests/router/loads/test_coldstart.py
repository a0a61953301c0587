"""Cold starts: one load for all callers, bounds, deadlines, and every answer that an agent can give."""

import asyncio
from dataclasses import replace

import pytest

from mesh.options.etcdsettings import EtcdFiles
from mesh.schema.records import LEAVING
from mesh.statuses import Code, MeshError, Reason
from placement.constraints import parse
from placement.failures import UNHEALTHY, FailureKind
from router.settings import RouterSettings
from router.state.dynamic import Current
from tests.support import fakecalls
from tests.support.waiting import until

GO_ON = fakecalls.loaded()


def one_pod(core, answer=GO_ON):
    core.register()
    core.world.pod("a")
    core.agents.answers["a"] = answer


def held(core, pod="a", reply=GO_ON):
    """Makes the agent wait for the returned event before it answers."""
    event = asyncio.Event()

    async def answer(request):
        await event.wait()
        return reply

    core.agents.answers[pod] = answer
    return event


async def test_a_call_of_a_model_without_a_copy_has_it_loaded_and_goes_through(core):
    """The agent gets the registration and the model's size from the record. The view has the copy before etcd reports
    it."""
    core.register(host_bytes=123, load_ms=3)
    core.world.pod("a")
    core.agents.answers["a"] = GO_ON
    call = core.call()
    sent = await core.reaches("a")
    assert sent.headers[b"mesh-copy"] == b"i.7"
    sent.reply()
    assert call.code is Code.OK
    ((pod, request),) = core.agents.loads
    assert (pod, request.model_id, request.create_revision, request.host_bytes) == ("a", "m", 7, 123)
    assert (request.model_type, request.model_path, request.idle_ms) == ("onnx", "file:///m", 0)
    assert core.world.callable("m") == ["a"]


async def test_a_call_waits_for_the_only_pod_of_its_type_to_come_back(core):
    """While the only pod that takes a type restarts, calls of the type's models wait, although other pods are
    available."""
    core.register()
    core.world.pod("other", types=("sklearn",))
    core.world.pod("a", types=("onnx",))
    core.world.lose("a")
    call = core.call()
    await until(lambda: core.coldstart.statistics().waiters == 1)
    await asyncio.sleep(0)
    assert (call.code, core.agents.loads) == (None, [])
    core.agents.answers["a"] = fakecalls.loaded("second")
    core.world.pod("a", "second", types=("onnx",))
    (await core.reaches("a")).reply()
    assert call.code is Code.OK


async def test_a_type_that_no_pod_took_lately_is_refused_at_once(core):
    """If the pod that has gone took another type, a call of the model is refused at once."""
    core.register()
    core.world.pod("other", types=("sklearn",))
    core.world.pod("gone", types=("xgboost",))
    core.world.lose("gone")
    call = core.call()
    await until(lambda: call.answers)
    assert call.code is Code.FAILED_PRECONDITION
    assert "other takes only models of type sklearn" in call.text


@pytest.mark.parametrize(("digest", "generation"), [("", 0), ("ab", 3)], ids=["not-loaded-yet", "loaded-somewhere"])
async def test_what_a_reload_has_replaced_is_no_copy_to_be_had(core, digest, generation):
    """Once the new content of a reload was loaded somewhere, agents are asked for that content. Before that any copy
    will do."""
    core.register(generation=3, digest=digest)
    core.world.pod("a")
    core.agents.answers["a"] = GO_ON
    core.call()
    (await core.reaches("a")).reply()
    ((_, request),) = core.agents.loads
    assert request.generation == generation


async def test_a_hundred_calls_share_one_load(core):
    one_pod(core)
    event = held(core)
    calls = [core.call() for _ in range(100)]
    await until(lambda: core.agents.loads)
    assert core.coldstart.statistics().waiters == 100
    event.set()
    await core.reaches("a", 100)
    for sent in core.sent("a"):
        sent.reply()
    assert all(call.code is Code.OK for call in calls)
    assert len(core.agents.loads) == 1
    assert core.etcd.reads == 1


async def test_an_unknown_model_is_refused(core):
    core.world.pod("a")
    call = await core.answered(core.call())
    assert (call.code, call.text) == (Code.NOT_FOUND, "model not found")


async def test_a_model_registered_while_others_are_told_that_it_is_unknown_is_found(core):
    """A caller gets NOT_FOUND only from a read that began after the call arrived. If a model is registered in between,
    the early caller gets NOT_FOUND and the late one is served."""
    core.world.pod("a")
    core.agents.answers["a"] = GO_ON
    core.etcd.gate.clear()
    early = core.call()
    await until(lambda: core.etcd.reads == 1, interval=0.001)
    core.register()
    late = core.call()
    core.etcd.gate.set()
    assert (await core.answered(early)).code is Code.NOT_FOUND
    (await core.reaches("a")).reply()
    assert late.code is Code.OK


async def test_etcd_away_is_told(core):
    one_pod(core)
    core.etcd.away = True
    call = await core.answered(core.call())
    assert call.code is Code.UNAVAILABLE
    assert core.agents.loads == []


async def test_no_pods_at_all_is_told(core):
    core.register()
    call = await core.answered(core.call())
    assert (call.code, call.text) == (Code.UNAVAILABLE, "there is no runtime pod")


async def test_a_known_record_is_not_read_again(core):
    """A known record is not read again, because the agent's claim validates it."""
    one_pod(core)
    await core.coldstart.load("m")
    core.world.view.drop(core.world.get("m", "a"))
    await core.coldstart.load("m")
    assert core.etcd.reads == 1
    assert len(core.agents.loads) == 2


async def test_a_stale_record_is_read_again(core):
    """If an id was registered again, an agent reports that the former record is stale. The load continues with the new
    record."""
    one_pod(core)
    await core.coldstart.load("m")
    remembered = core.registry.remembered("m")
    core.world.view.drop(core.world.get("m", "a"))
    core.register(created=9)
    core.registry.remember(remembered)
    core.agents.answers["a"] = lambda request: GO_ON if request.create_revision == 9 else fakecalls.stale()
    await core.coldstart.load("m")
    assert [request.create_revision for _, request in core.agents.loads] == [7, 7, 9]
    assert core.world.get("m", "a").token == b"i.9"


async def test_a_stale_record_of_a_model_that_is_gone(core):
    one_pod(core, fakecalls.stale())
    await core.registry.read("m")
    core.unregister()
    with pytest.raises(MeshError) as error:
        await core.coldstart.load("m")
    assert error.value.reason is Reason.UNKNOWN_MODEL


async def test_an_agent_that_calls_every_registration_stale_is_given_up(core):
    core.rules(pause_ms=1)
    one_pod(core, fakecalls.stale())
    with pytest.raises(MeshError, match="does not accept the current registration") as error:
        await core.coldstart.load("m")
    assert error.value.reason is Reason.UNAVAILABLE


async def test_elsewhere_is_followed(core):
    """A load that another router started first is joined instead of repeated."""
    core.register()
    core.world.pod("a", capacity=1 << 40)
    core.world.pod("b", capacity=1 << 20)
    core.agents.answers = {"a": fakecalls.elsewhere("b"), "b": fakecalls.loaded()}
    core.agents.answers["a"] = fakecalls.elsewhere("b")
    await core.coldstart.load("m")
    asked = [pod for pod, _ in core.agents.loads]
    assert asked[-1] == "b"
    assert len(asked) <= 2
    assert core.world.callable("m") == ["b"]


async def test_a_claim_in_view_is_joined_at_once(core):
    core.register()
    core.world.pod("a")
    core.world.pod("b")
    core.world.claim("m", "b")
    core.agents.answers = {"a": AssertionError("not to be asked"), "b": GO_ON}
    await core.coldstart.load("m")
    assert [pod for pod, _ in core.agents.loads] == ["b"]


async def test_a_claim_of_a_former_life_is_not_joined(core):
    core.register(created=9)
    core.world.pod("a")
    core.world.claim("m", "a", created=7)
    core.agents.answers["a"] = GO_ON
    await core.coldstart.load("m")
    assert core.agents.loads[0][1].create_revision == 9


async def test_the_claim_of_a_dead_pod_is_waited_for(core):
    """Callers wait until a dead pod's claim ends with its lease. Then another pod loads the model, and the calls
    succeed."""
    core.rules(pause_ms=5)
    core.register()
    core.world.pod("dead")
    core.world.pod("b")
    core.world.copy("m", "dead")
    core.agents.answers = {"dead": fakecalls.unreachable("dead"), "b": fakecalls.elsewhere("dead")}
    core.world.view.failed(core.world.view.pods["dead"], asyncio.get_running_loop().time())
    call = core.call()
    await until(lambda: [pod for pod, _ in core.agents.loads].count("b") >= 2, interval=0.001)
    assert not call.answers
    core.world.lose("dead")
    core.agents.answers["b"] = GO_ON
    (await core.reaches("b")).reply()
    assert call.code is Code.OK


async def test_a_load_seen_in_etcd_ends_the_waiting(core):
    """A waiting call is sent once etcd shows the load as finished, even if no agent has given a usable answer."""
    core.rules(pause_ms=30000)
    core.register()
    core.world.pod("a")
    core.agents.answers["a"] = fakecalls.elsewhere("b")
    call = core.call()
    await until(lambda: core.agents.loads)
    core.world.pod("b")
    core.world.copy("m", "b")
    (await core.reaches("b")).reply()
    assert call.code is Code.OK


async def test_an_agent_that_cannot_be_reached_is_passed_over(core):
    core.register()
    core.world.pod("a", capacity=1 << 40)
    core.world.pod("b", capacity=1 << 20)
    core.agents.answers = {"a": fakecalls.unreachable("a"), "b": fakecalls.unreachable("b")}
    core.world.pod("c", capacity=1 << 10)
    core.agents.answers["c"] = GO_ON
    await core.coldstart.load("m")
    assert core.world.callable("m") == ["c"]


async def test_a_suspect_is_not_asked_to_load(core):
    """The caller waits, because the suspect pod may be back in a moment, and gets the reason if no pod comes."""
    core.rules(pause_ms=1, patience_ms=20)
    one_pod(core)
    core.world.copy("other", "a")
    core.world.lose("a")
    call = await core.answered(core.call())
    assert call.code is Code.UNAVAILABLE
    assert "lease" in call.text
    assert core.agents.loads == []


async def test_a_suspect_that_comes_back_gets_the_load(core):
    one_pod(core)
    core.world.copy("other", "a")
    core.world.lose("a")
    call = core.call()
    await until(lambda: core.etcd.reads)
    core.world.pod("a")
    (await core.reaches("a")).reply()
    assert call.code is Code.OK


async def test_a_pod_that_leaves_gets_no_load(core):
    one_pod(core)
    core.world.pod("z", state=LEAVING, capacity=1 << 50)
    await core.coldstart.load("m")
    assert [pod for pod, _ in core.agents.loads] == ["a"]


@pytest.mark.parametrize(
    ("answers", "reason", "text"),
    [
        pytest.param(["NO_ROOM"], Reason.NO_ROOM, "no", id="no-room"),
        pytest.param(["NO_ROOM", "NOWHERE"], Reason.NO_ROOM, "no", id="no-room-somewhere"),
        pytest.param(["NOWHERE", "NOWHERE"], Reason.NOWHERE, "no", id="nowhere"),
        pytest.param(["OVERLOADED"], Reason.OVERLOADED, "no", id="overloaded"),
        pytest.param(["QUARANTINED"], Reason.QUARANTINED, "no", id="quarantined"),
    ],
)
async def test_refusals_become_the_answer_when_no_pod_is_left(core, answers, reason, text):
    core.register()
    for number, answer in enumerate(answers):
        core.world.pod(f"p{number}")
        core.agents.answers[f"p{number}"] = fakecalls.refused(answer, text)
    with pytest.raises(MeshError, match=text) as error:
        await core.coldstart.load("m")
    assert error.value.reason is reason


async def test_a_model_that_fits_nowhere_is_tried_once(core):
    """The first attempt records the model's measured size, and later calls ask no pod that is too small. A router with
    an older record asks one pod, whose answer corrects the router."""

    def answer(request):
        if not request.host_bytes:
            core.register(host_bytes=400 << 20)
        return fakecalls.refused("NOWHERE", "it takes 400 MiB, but this pod's capacity is 256 MiB")

    for name in "abc":
        core.world.pod(name, capacity=256 << 20)
        core.agents.answers[name] = answer
    core.register()
    before = await core.registry.read("m")
    for _ in range(2):
        with pytest.raises(MeshError, match="400 MiB") as error:
            await core.coldstart.load("m")
        assert error.value.reason is Reason.NOWHERE
        assert len(core.agents.loads) == 1
    core.registry.remember(before)
    with pytest.raises(MeshError, match="400 MiB"):
        await core.coldstart.load("m")
    assert len(core.agents.loads) == 2
    assert "400 MiB" in core.coldstart.choosing.nowhere("m", core.registry.remembered("m").record)
    core.world.pod("large", capacity=512 << 20)
    core.agents.answers["large"] = GO_ON
    await core.coldstart.load("m")
    assert core.world.callable("m") == ["large"]


async def test_no_agent_is_asked_for_room_once_the_caller_has_gone(core):
    core.rules(waited_ms=-1)
    core.register()
    for name in "ab":
        core.world.pod(name)
    left = asyncio.Event()

    async def answer(request):
        await left.wait()
        return fakecalls.refused("NO_ROOM", "60 MiB are busy, for 60 s by now")

    core.agents.answers = {"a": answer, "b": answer}
    call = core.call()
    await until(lambda: core.agents.loads)
    call.cancel()
    left.set()
    await until(lambda: not core.coldstart.loading("m"))
    assert len(core.agents.loads) == 1


async def test_after_a_refusal_another_pod_is_asked(core):
    core.register()
    core.world.pod("a", capacity=1 << 50)
    core.world.pod("b", capacity=1 << 10)
    core.agents.answers = {"a": fakecalls.refused("NO_ROOM"), "b": GO_ON}
    core.agents.answers["b"] = lambda request: GO_ON
    await core.coldstart.load("m")
    assert core.world.callable("m") == ["b"]


async def test_only_some_pods_are_asked_in_one_go(core):
    core.register()
    for number in range(30):
        core.world.pod(f"p{number}")
        core.agents.answers[f"p{number}"] = fakecalls.refused("NO_ROOM")
    with pytest.raises(MeshError) as error:
        await core.coldstart.load("m")
    assert error.value.reason is Reason.NO_ROOM
    assert len(core.agents.loads) <= 6


async def test_etcd_away_in_the_middle_of_a_load(core):
    """If etcd becomes unavailable during a load, no agent can claim the model. The load then fails with REGISTRY_AWAY,
    which the next read of the record reports."""
    core.rules(pause_ms=1)
    one_pod(core, fakecalls.refused("REGISTRY_AWAY"))
    await core.registry.read("m")
    core.etcd.away = True
    with pytest.raises(MeshError) as error:
        await core.coldstart.load("m")
    assert error.value.reason is Reason.REGISTRY_AWAY


@pytest.mark.parametrize("reason", ["UNAVAILABLE", "REGISTRY_AWAY", "INTERNAL"])
async def test_a_pod_that_is_not_up_to_it_yet_is_asked_again(core, reason):
    """A pod is asked again after a refusal that will pass, for instance because its model server is restarting or the
    pod has no lease."""
    core.rules(pause_ms=1)
    one_pod(core)
    answers = [fakecalls.refused(reason), fakecalls.refused(reason), GO_ON]
    core.agents.answers["a"] = lambda request: answers.pop(0)
    await core.coldstart.load("m")
    assert answers == []


async def test_larger_than_every_pod_is_told_without_asking(core):
    core.register(host_bytes=1 << 40)
    core.world.pod("a", capacity=1 << 30)
    with pytest.raises(MeshError, match="capacity") as error:
        await core.coldstart.load("m")
    assert error.value.reason is Reason.NOWHERE
    assert core.agents.loads == []


async def test_a_guessed_size_is_never_the_reason_for_a_refusal(core):
    """The model may fit although the average copy is larger than the only pod that accepts loads."""
    core.register()
    core.world.pod("big", capacity=1 << 40, used=1 << 39, copies=1, state=LEAVING)
    core.world.pod("small", capacity=1 << 20)
    core.agents.answers["small"] = GO_ON
    await core.coldstart.load("m")


async def test_nor_is_it_on_a_device(core):
    """An estimated size causes no refusal on a device, even if copies on CPU pods are larger than the only device."""
    core.register()
    core.world.pod("cpu", capacity=1 << 37, used=3 << 35, copies=3, state=LEAVING)
    core.world.pod("gpu", capacity=1 << 36, device_capacity_bytes=1 << 34, labels=("gpu",))
    core.agents.answers["gpu"] = GO_ON
    await core.coldstart.load("m")


async def test_after_failures_in_three_pods_the_callers_get_the_models_own_error(core):
    core.register()
    for name in "abcd":
        core.world.pod(name)
        core.agents.answers[name] = fakecalls.failed(f"line 3 is wrong, says {name}")
    call = await core.answered(core.call())
    assert call.code is Code.INTERNAL
    assert call.text.startswith(f"line 3 is wrong, says {core.agents.loads[-1][0]} (")
    assert "`mesh release m`" in call.text
    assert len({pod for pod, _ in core.agents.loads}) == 3


async def test_what_has_just_failed_is_not_tried_again(core):
    """The failure that the agent has recorded counts, although the router remembers an older record."""

    def fail(request):
        core.register(failures=core.failed_in("a"))
        core.registry.remember(before)
        return fakecalls.failed("line 3 is wrong")

    one_pod(core, fail)
    await core.registry.read("m")
    before = core.registry.remembered("m")
    for text in ("line 3 is wrong", "a says no"):
        assert (await core.answered(core.call())).text.startswith(text)
    assert len(core.agents.loads) == 1


async def test_a_claim_of_a_load_that_has_failed_is_not_joined(core):
    """Neither present nor later callers join the claim of a failed load, although the view still shows it."""

    def fail(request):
        core.register(failures=core.failed_in("a"))
        return fakecalls.failed("a says no")

    one_pod(core, fail)
    core.world.claim("m", "a")
    for _ in range(2):
        assert (await core.answered(core.call())).text.startswith("a says no")
    assert len(core.agents.loads) == 1


async def test_a_failure_in_one_pod_is_tried_in_another(core):
    core.register()
    core.world.pod("a", capacity=1 << 50)
    core.world.pod("b", capacity=1 << 10)
    core.agents.answers = {"a": fakecalls.failed(), "b": GO_ON}
    await core.coldstart.load("m")
    assert core.world.callable("m") == ["b"]


async def test_a_pod_in_which_everything_fails_gets_no_more_loads(core):
    """A pod in which all loads fail gets no more loads, although it is empty. Its failures do not count against the
    models."""
    core.world.pod("broken", capacity=1 << 50)
    core.world.pod("well", capacity=1 << 30)
    core.agents.answers = {"broken": fakecalls.failed("no such device"), "well": GO_ON}
    for number in range(8):
        core.register(f"m{number}")
        await core.coldstart.load(f"m{number}")
    asked = [pod for pod, _ in core.agents.loads]
    assert asked.count("broken") == 4
    assert asked[-4:] == ["well"] * 4


@pytest.fixture
def passes(monkeypatch):
    """Returns a function that ends all pauses after failures, which otherwise last a minute."""
    for name in ("FIRST_PAUSE_MS", "LONGEST_PAUSE_MS"):
        monkeypatch.setattr(f"placement.failures.{name}", 60_000)
    return lambda: monkeypatch.setattr("placement.failures.FIRST_PAUSE_MS", 0)


@pytest.mark.parametrize("kind", [kind for kind in FailureKind if kind is not FailureKind.LASTING])
async def test_what_may_pass_is_told_with_a_time_and_tried_again(core, passes, kind):
    """A failure that may pass is reported with the code of its kind and with a way out. The pod is asked again only
    when the pause after the failure has ended."""

    def fail(request):
        core.register(failures=(replace(core.failed_in("a", ago_ms=0)[0], text="the store answers 503", kind=kind),))
        return fakecalls.failed("the store answers 503", kind=kind.value)

    one_pod(core, fail)
    call = await core.answered(core.call())
    codes = {FailureKind.PASSING: Code.UNAVAILABLE, FailureKind.MEMORY: Code.RESOURCE_EXHAUSTED}
    assert call.code is codes.get(kind, Code.INTERNAL)
    assert call.text.startswith("the store answers 503 (")
    assert "`mesh release m`" in call.text
    assert (await core.answered(core.call())).text.startswith("the store answers 503 (")
    assert len(core.agents.loads) == 1, "the second call does not ask the pod"
    core.agents.answers["a"] = GO_ON
    passes()
    await core.coldstart.load("m")
    assert len(core.agents.loads) == 2


async def test_a_store_that_asks_to_be_left_alone_is_asked_by_no_other_pod(core):
    core.register()

    def fail(request):
        failure = replace(
            core.failed_in("a", ago_ms=0)[0], text="too many requests", kind=FailureKind.PASSING, asked_ms=5000
        )
        core.register(failures=(failure,))
        return fakecalls.failed("too many requests", kind="passing", asked_ms=5000)

    for name in "ab":
        core.world.pod(name)
        core.agents.answers[name] = fail
    for _ in range(2):
        with pytest.raises(MeshError, match="too many requests") as error:
            await core.coldstart.load("m")
        assert error.value.reason is Reason.NOT_FETCHED
        assert 4.5 < error.value.retry_after <= 5
    assert len(core.agents.loads) == 1


async def test_a_failure_is_void_once_its_pods_secret_has_changed(core):
    """The operator may have corrected the secret, so the next call loads the model, whatever the record says."""
    one_pod(core)
    core.world.pod("a", secrets="old")
    failure = replace(core.failed_in("a")[0], secrets="old")
    core.register(failures=(failure,))
    with pytest.raises(MeshError, match="a says no"):
        await core.coldstart.load("m")
    core.world.pod("a", secrets="new")
    await core.coldstart.load("m")
    assert len(core.agents.loads) == 1


async def test_a_clock_that_is_ahead_does_not_prolong_a_failure(core, passes):
    """The pause after a failure begins when the router first reads about the failure, not at the time that the agent's
    fast clock gave it."""
    one_pod(core)
    (failure,) = core.failed_in("a", ago_ms=-3_600_000)
    core.register(failures=(replace(failure, kind=FailureKind.PASSING),))
    with pytest.raises(MeshError, match=r"in 60 s"):
        await core.coldstart.load("m")
    passes()
    await core.coldstart.load("m")


@pytest.mark.parametrize("by", ["type", "label"])
async def test_a_model_gets_its_load_in_an_unhealthy_pod_if_it_may_use_no_other(core, by):
    """A pod in which several models have failed that loaded elsewhere gets no loads for a while. A model that only this
    pod may hold, by its type or by a label, is loaded there all the same."""
    own = {"types": ("onnx", "special")} if by == "type" else {"labels": ("fast",)}
    core.world.pod("a", **own)
    core.world.pod("b", **({"types": ("onnx",)} if by == "type" else {}))
    if by == "label":
        constraints = parse('{"onnx": {"preferred": ["fast"]}, "special": {"required": ["fast"]}}')
        core.coldstart.choosing._current = lambda: Current(constraints=constraints)
    core.agents.answers["a"] = lambda request: fakecalls.failed("bad disk") if request.model_type == "onnx" else GO_ON
    core.agents.answers["b"] = GO_ON
    for number in range(50):
        core.register(f"m{number}")
        await core.coldstart.load(f"m{number}")
    assert [pod for pod, _ in core.agents.loads].count("a") == UNHEALTHY
    core.register("special", type="special")
    await core.coldstart.load("special")
    pod, request = core.agents.loads[-1]
    assert (pod, request.model_id) == ("a", "special")


async def test_broken_models_do_not_send_the_good_ones_to_one_pod(core):
    for name in "abcd":
        core.world.pod(name)
        core.agents.answers[name] = lambda request: (
            fakecalls.failed("no model") if request.model_id.startswith("bad") else GO_ON
        )
    for number in range(30):
        for model_id in (f"bad{number}", f"good{number}"):
            core.register(model_id)
        with pytest.raises(MeshError, match="no model"):
            await core.coldstart.load(f"bad{number}")
        await core.coldstart.load(f"good{number}")
    good = [pod for pod, request in core.agents.loads if request.model_id.startswith("good")]
    assert len(good) == 30
    assert min(good.count(name) for name in "abcd") >= 3, {name: good.count(name) for name in "abcd"}


async def test_failures_on_record_count_until_they_expire(core):
    core.world.pod("fresh")
    core.agents.answers["fresh"] = GO_ON
    core.register(failures=core.failed_in("x", "y", "z"))
    with pytest.raises(MeshError, match="x says no") as error:
        await core.coldstart.load("m")
    assert error.value.reason is Reason.LOAD_FAILED
    core.register(failures=core.failed_in("x", "y", "z", ago_ms=901_000))
    await core.coldstart.load("m")


async def test_the_only_pod_has_failed_lately(core):
    one_pod(core)
    core.register(failures=core.failed_in("a"))
    with pytest.raises(MeshError, match="a says no") as error:
        await core.coldstart.load("m")
    assert error.value.reason is Reason.LOAD_FAILED
    assert core.agents.loads == []


async def test_a_quarantined_model_is_not_loaded_and_its_history_is_told(core):
    one_pod(core)
    core.register(killed=("it died on Monday", "it died on Tuesday"))
    with pytest.raises(MeshError, match=r"Monday.*Tuesday") as error:
        await core.coldstart.load("m")
    assert error.value.reason is Reason.QUARANTINED
    assert core.agents.loads == []


async def test_a_remembered_failure_is_read_again(core):
    """The record of a quarantined model is read again, because another router may have released the model."""
    one_pod(core)
    core.register(killed=("one", "two"))
    with pytest.raises(MeshError):
        await core.coldstart.load("m")
    remembered = core.registry.remembered("m")
    core.register()
    core.registry.remember(remembered)
    await core.coldstart.load("m")


async def test_an_answer_from_another_life_of_the_pod_is_not_believed(core):
    """An answer from a new incarnation of a pod is not believed before that incarnation has published itself."""
    core.rules(pause_ms=30000)
    one_pod(core, fakecalls.loaded("second"))
    call = core.call()
    await until(lambda: core.agents.loads)
    core.world.pod("a", "second")
    sent = await core.reaches("a")
    assert sent.headers[b"mesh-copy"] == b"second.7"
    sent.reply()
    assert call.code is Code.OK


async def test_callers_who_leave_do_not_end_the_load(core):
    one_pod(core)
    event = held(core)
    call = core.call()
    await until(lambda: core.agents.loads)
    call.cancel()
    assert core.coldstart.statistics().waiters == 0
    assert core.coldstart.loading("m")
    event.set()
    await until(lambda: core.world.callable("m"))
    assert core.sent("a") == []
    assert len(core.agents.loads) == 1


async def test_each_waiter_has_its_own_deadline(core):
    one_pod(core)
    event = held(core)
    short, long, none = core.call(deadline=0.02), core.call(deadline=60), core.call()
    assert (await core.answered(short)).code is Code.DEADLINE_EXCEEDED
    assert not long.answers
    assert not none.answers
    event.set()
    await core.reaches("a", 2)
    for sent in core.sent("a"):
        sent.reply()
    assert (long.code, none.code) == (Code.OK, Code.OK)


async def test_a_deadline_before_the_expected_end_is_told_at_once(core):
    """A call whose deadline is before the expected end of the load is refused at once with UNAVAILABLE and the time to
    wait. The load continues for calls that can wait longer."""
    core.register(load_ms=20_000)
    core.world.pod("a")
    event = held(core)
    call = await core.answered(core.call(deadline=5))
    assert call.code is Code.UNAVAILABLE
    assert "takes 20.0 s more" in call.text
    later = await core.answered(core.call(deadline=6))
    assert later.code is Code.UNAVAILABLE
    patient = core.call(deadline=60)
    assert not patient.answers
    event.set()
    (await core.reaches("a")).reply()
    assert patient.code is Code.OK
    assert len(core.agents.loads) == 1


async def test_a_load_later_than_expected_refuses_no_caller(core):
    core.register(load_ms=1)
    core.world.pod("a")
    event = held(core)
    first = core.call(deadline=5)
    await until(lambda: core.agents.loads)
    await asyncio.sleep(0.005)
    second = core.call(deadline=0.5)
    assert not first.answers
    assert not second.answers
    event.set()
    await core.reaches("a", 2)
    for sent in core.sent("a"):
        sent.reply()


class TestBounds:
    """The bounds of waiting: calls, bytes and time, for each model and in total."""

    @pytest.fixture
    def settings(self):
        return RouterSettings(
            "router", max_waiters=4, max_waiters_per_model=2, max_waiting_bytes=40, load_wait=0.05, verify_timeout=0.2
        )

    async def test_waiters_of_one_model(self, core):
        one_pod(core)
        held(core)
        calls = [core.call() for _ in range(3)]
        assert [call.code for call in calls] == [None, None, Code.RESOURCE_EXHAUSTED]
        assert "wait for model m" in calls[2].text
        for call in calls[:2]:
            call.cancel()

    async def test_waiters_in_all(self, core):
        core.world.pod("a")
        held(core)
        for name in ("k", "l", "m"):
            core.register(name)
        calls = [core.call(name) for name in ("k", "k", "l", "l", "m")]
        assert calls[4].code is Code.RESOURCE_EXHAUSTED
        for call in calls[:4]:
            call.cancel()

    async def test_bytes_in_all(self, core):
        one_pod(core)
        held(core)
        first = core.call("m" * 30)
        second = core.call("n")
        assert second.code is Code.RESOURCE_EXHAUSTED
        assert "bytes" in second.text
        first.cancel()
        third = core.call("n")
        assert not third.answers
        third.cancel()

    async def test_time(self, core):
        """No call waits forever, even without a deadline. The load continues after its caller's wait has ended."""
        one_pod(core)
        held(core)
        call = await core.answered(core.call())
        assert call.code is Code.UNAVAILABLE
        assert "its load continues" in call.text
        assert core.coldstart.loading("m")


async def test_a_load_without_a_waiting_call_evicts_nothing_more_recent(core):
    """A load without a waiting call, such as `ensureLoaded` with an old last use, evicts no model that was used more
    recently."""
    core.register(host_bytes=100)
    core.world.pod("a", capacity=100, used=100, oldest_idle_ms=1000)
    with pytest.raises(MeshError, match="Nowhere available to load") as error:
        await core.coldstart.load("m", idle_ms=3_600_000)
    assert error.value.reason is Reason.NO_ROOM


async def test_a_load_that_was_just_sent_is_no_reason_to_refuse_another(core):
    """A load just sent to a pod is no reason to refuse another one, although it may be counted twice once the pod has
    published it. The pod has room, and decides itself."""
    core.world.pod("a", capacity=100)
    core.agents.answers["a"] = fakecalls.loaded(host_bytes=50)
    for name in ("one", "two"):
        core.register(name, host_bytes=50)
    await core.coldstart.load("one", idle_ms=3_600_000)
    core.world.pod("a", capacity=100, used=50, oldest_idle_ms=3_599_000)
    await core.coldstart.load("two", idle_ms=3_600_000)
    assert [request.model_id for _, request in core.agents.loads] == ["one", "two"]


async def test_what_a_pod_has_published_together_with_the_copy_is_counted_once(core):
    """A load that a pod publishes together with its figures is counted once, however soon after it was sent. Otherwise
    a pod that loads quickly would look fuller than it is until its next figures."""
    core.register(host_bytes=50)
    core.world.pod("a", capacity=100)
    core.agents.answers["a"] = fakecalls.loaded(host_bytes=50)
    await core.coldstart.load("m")
    core.world.pod("a", capacity=100, used=50)
    (seen,) = core.coldstart.choosing.candidates("other")
    assert seen.used_bytes == 100, "the copy is not in view yet, so these figures may not contain it"
    core.world.copy("m", "a")
    core.world.pod("a", capacity=100, used=50)
    (seen,) = core.coldstart.choosing.candidates("other")
    assert seen.used_bytes == 50


async def test_a_call_that_joins_makes_the_load_urgent(core):
    core.register(host_bytes=100)
    core.world.pod("a", capacity=100, used=100, oldest_idle_ms=1000)
    core.agents.answers["a"] = GO_ON
    core.etcd.gate.clear()
    quiet = asyncio.create_task(core.coldstart.load("m", idle_ms=3_600_000))
    await until(lambda: core.etcd.reads)
    call = core.call()
    core.etcd.gate.set()
    await quiet
    (await core.reaches("a")).reply()
    assert call.code is Code.OK
    assert core.agents.loads[0][1].idle_ms == 0


async def test_a_call_that_joins_later_makes_the_load_urgent_at_the_agent(core):
    """A call joins a load that no call has waited for. The router repeats the request to the agent once, with the
    urgency of a call."""
    one_pod(core)
    done = held(core)
    quiet = asyncio.create_task(core.coldstart.load("m", idle_ms=3_600_000))
    await until(lambda: core.agents.loads)
    calls = [core.call(), core.call()]
    await until(lambda: len(core.agents.loads) > 1)
    assert [request.idle_ms for _, request in core.agents.loads] == [3_600_000, 0]
    done.set()
    await quiet
    await core.reaches("a", 2)
    for sent in core.sent("a"):
        sent.reply()
    assert [call.code for call in calls] == [Code.OK, Code.OK]
    assert len(core.agents.loads) == 2


async def test_beginning_returns_once_an_agent_was_asked(core):
    one_pod(core)
    event = held(core)
    await core.coldstart.begin("m")
    assert len(core.agents.loads) == 1
    assert core.coldstart.loading("m")
    event.set()
    await until(lambda: core.world.callable("m"))


async def test_beginning_raises_what_kept_it_from_being_asked(core):
    core.register(host_bytes=1 << 40)
    core.world.pod("a", capacity=100)
    with pytest.raises(MeshError) as error:
        await core.coldstart.begin("m")
    assert error.value.reason is Reason.NOWHERE


async def test_loads_of_many_models_do_not_herd(core):
    """Loads of many models are spread over the pods, because a router counts the loads that it has just sent before any
    pod publishes them."""
    for name in "ab":
        core.world.pod(name, capacity=1000)
        held(core, name)
    for number in range(20):
        core.register(f"m{number}", host_bytes=100)
    tasks = [asyncio.create_task(core.coldstart.load(f"m{number}")) for number in range(20)]
    await until(lambda: len(core.agents.loads) == 20)
    counts = [sum(1 for pod, _ in core.agents.loads if pod == name) for name in "ab"]
    assert min(counts) >= 5, counts
    for task in tasks:
        task.cancel()


async def test_closing_tells_the_waiters(core):
    one_pod(core)
    held(core)
    call = core.call()
    await until(lambda: core.agents.loads)
    await core.coldstart.close()
    assert call.code is Code.UNAVAILABLE
    assert "stopping" in call.text
    assert core.call().code is Code.UNAVAILABLE


FAULT = "loading m failed inside the router, whose log has the cause"


async def test_a_mistake_in_the_router_is_told_and_ends_the_flight(core):
    one_pod(core)
    core.agents.answers["a"] = lambda request: 1 / 0
    call = await core.answered(core.call())
    assert (call.code, call.text) == (Code.INTERNAL, FAULT)
    assert not core.coldstart.loading("m")


async def test_an_answer_that_cannot_be_ends_the_flight(core, monkeypatch):
    """An event that cannot occur, which is a fault of the router, ends the flight with INTERNAL. It does not count
    against the model, and the next call starts over."""
    one_pod(core)
    monkeypatch.setattr(core.coldstart._finder, "look", core.coldstart._finder.recall)
    call = await core.answered(core.call())
    assert (call.code, call.text) == (Code.INTERNAL, FAULT)
    assert not core.coldstart.loading("m")
    monkeypatch.undo()
    core.call()
    (await core.reaches("a")).reply()


def test_settings_travel_to_the_workers(tmp_path):
    """The workers read the router's settings from a file. It contains secrets, so only this user can read it."""
    settings = RouterSettings("r", workers=3)
    etcd = replace(settings.etcd, password="secret", ca=b"\xff\0pem", files=EtcdFiles(ca="/ca"))
    settings = replace(settings, internal_tls="/tls", etcd=etcd)
    path = tmp_path / "settings.json"
    settings.write(path)
    assert RouterSettings.read(path) == settings
    assert path.stat().st_mode & 0o777 == 0o600
