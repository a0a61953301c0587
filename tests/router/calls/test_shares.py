"""Each model's share of the connections to a pod. Beyond it, the model's calls wait or are refused without affecting
other models."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.statuses import Code
from mesh.wire import framing
from mesh.wire.client import LostKind
from router.calls import shares
from router.settings import RouterSettings
from tests.support import fakecalls
from tests.support.fakecalls import StreamCall
from tests.support.waiting import until

CONNECTIONS, WAITERS = 8, 10


@pytest.fixture
def settings():
    return RouterSettings("router", max_connections_per_pod=CONNECTIONS, max_waiters_per_model=WAITERS)


@pytest.fixture
def mesh(core):
    """Returns a worker's core whose view has three models in pod a, one of them in pod b too."""
    for pod in ("a", "b"):
        core.world.pod(pod)
        core.agents.answers[pod] = fakecalls.loaded()
    for model, pods in (("slow", "a"), ("fast", "a"), ("wide", "ab")):
        core.register(model)
        for pod in pods:
            core.world.copy(model, pod)
    return core


def of(core, pod, model):
    return [sent for sent in core.sent(pod) if sent.headers[b"mm-model-id"] == model.encode()]


async def test_a_slow_models_callers_leave_connections_for_others(mesh):
    calls = [mesh.call("slow") for _ in range(30)]
    assert len(of(mesh, "a", "slow")) == CONNECTIONS // 2
    refused = [call for call in calls if call.answers]
    assert len(refused) == 30 - CONNECTIONS // 2 - WAITERS
    assert {call.code for call in refused} == {Code.RESOURCE_EXHAUSTED}
    assert "slow has used up its share" in refused[0].answers[0][1]
    for number in range(50):  # one after another, all of them are served
        fast = mesh.call("fast")
        of(mesh, "a", "fast")[number].reply()
        assert fast.code is Code.OK
    for sent in iter(lambda: [s for s in of(mesh, "a", "slow") if not s.over], []):
        sent[0].reply()
    assert [call.code for call in calls].count(Code.OK) == CONNECTIONS // 2 + WAITERS


async def test_those_that_wait_go_on_in_their_order_and_never_beyond_the_share(mesh):
    calls = [mesh.call("slow") for _ in range(CONNECTIONS // 2 + 5)]
    for number, call in enumerate(calls):
        sent = of(mesh, "a", "slow")
        assert len([one for one in sent if not one.over]) <= CONNECTIONS // 2
        sent[number].reply()
        assert call.code is Code.OK, number


async def test_those_that_wait_go_on_when_calls_of_other_models_end(mesh):
    """Waiting calls of a model get connections that other models' calls give back, while the model's own call in flight
    continues."""
    mesh.register("other")
    mesh.world.copy("other", "a")
    others = [mesh.call(model) for model in ("fast", "other") for _ in range(CONNECTIONS // 2)]
    calls = [mesh.call("slow") for _ in range(3)]
    first, *_ = of(mesh, "a", "slow")
    assert len(of(mesh, "a", "slow")) == 1
    for model in ("fast", "other"):
        for sent in iter(lambda model=model: [one for one in of(mesh, "a", model) if not one.over], []):
            sent[0].reply()
    assert {call.code for call in others} == {Code.OK}
    assert len(of(mesh, "a", "slow")) == 3
    for sent in of(mesh, "a", "slow")[1:]:
        sent.reply()
    first.reply()
    assert [call.code for call in calls] == [Code.OK] * 3


async def test_a_model_with_another_copy_uses_that(mesh):
    calls = [mesh.call("wide") for _ in range(CONNECTIONS)]
    assert len(of(mesh, "a", "wide")) == len(of(mesh, "b", "wide")) == CONNECTIONS // 2
    for sent in [*of(mesh, "a", "wide"), *of(mesh, "b", "wide")]:
        sent.reply()
    assert {call.code for call in calls} == {Code.OK}


@pytest.mark.parametrize("how", ["cancel", "deadline"])
async def test_a_caller_that_gives_up_waiting_makes_room(mesh, how):
    first = [mesh.call("slow") for _ in range(CONNECTIONS // 2)]
    waiting = [mesh.call("slow", deadline=0.05 if how == "deadline" else None) for _ in range(WAITERS)]
    if how == "cancel":
        for call in waiting:
            call.cancel()
    else:
        await until(
            lambda: all(call.answers for call in waiting), interval=0.01, why="the waiting calls' deadline passes"
        )
        assert {call.code for call in waiting} == {Code.DEADLINE_EXCEEDED}
    later = mesh.call("slow")
    assert not later.answers
    for sent in of(mesh, "a", "slow"):
        sent.reply()
    of(mesh, "a", "slow")[-1].reply()
    assert {call.code for call in [*first, later]} == {Code.OK}


@pytest.mark.parametrize("how", ["lost", "not here"])
async def test_those_that_wait_for_a_copy_that_is_gone_go_elsewhere(mesh, how):
    calls = [mesh.call("slow") for _ in range(CONNECTIONS // 2 + 3)]
    for sent in of(mesh, "a", "slow")[: CONNECTIONS // 2]:
        if how == "lost":
            sent.lose(LostKind.UNSENT)
        else:
            sent.not_here()
    # A load makes a copy again, and all waiting calls are sent there.
    await until(lambda: len([s for pod in "ab" for s in of(mesh, pod, "slow") if not s.over]) > 0, interval=0.001)

    def drained():
        for pod in "ab":
            for sent in of(mesh, pod, "slow"):
                if not sent.over:
                    sent.reply()
        return all(call.answers for call in calls)

    await until(drained, interval=0.001, why="every call is answered")
    assert {call.code for call in calls} == {Code.OK}


def stream(mesh):
    call = StreamCall(b"/some.Predictor/stream", [(b"mm-model-id", b"slow")], [framing.pack(b"")])
    mesh.dispatcher.dispatch(call)
    return call


def late(mesh, model="slow"):
    """Dispatches a unary call whose end arrives later than its message, and returns the call."""
    call = StreamCall(messages=[mesh.frame(model)])
    mesh.dispatcher.dispatch(call)
    return call


async def test_a_stream_beyond_the_share_is_refused(mesh):
    """A stream beyond the model's share is refused instead of queued, because the streams that hold connections may
    last for hours."""
    for _ in range(CONNECTIONS // 2):
        mesh.call("slow")
    refused = stream(mesh)
    await until(lambda: refused.answers, interval=0.001)
    assert refused.code is Code.RESOURCE_EXHAUSTED
    for sent in of(mesh, "a", "slow"):
        sent.reply(framing.pack(b""))


async def test_a_unary_call_whose_end_comes_late_waits_for_its_turn(mesh):
    calls = [mesh.call("slow") for _ in range(CONNECTIONS // 2)]
    waits = late(mesh)
    (copy,) = mesh.world.view.copies["slow"]
    await until(lambda: copy.waiting, interval=0.001)
    of(mesh, "a", "slow")[0].reply()
    await until(lambda: len(of(mesh, "a", "slow")) > CONNECTIONS // 2, interval=0.001)
    assert not waits.answers
    for sent in of(mesh, "a", "slow"):
        if not sent.over:
            sent.reply(framing.pack(b""))
    await until(lambda: waits.answers, interval=0.001)
    assert {call.code for call in [*calls, waits]} == {Code.OK}


async def test_late_calls_beyond_those_that_may_wait_are_refused(mesh):
    for _ in range(CONNECTIONS // 2):
        mesh.call("slow")
    waiting = [late(mesh) for _ in range(WAITERS)]
    (copy,) = mesh.world.view.copies["slow"]
    await until(lambda: len(copy.waiting) == WAITERS, interval=0.001)
    refused = late(mesh)
    await until(lambda: refused.answers, interval=0.001)
    assert refused.code is Code.RESOURCE_EXHAUSTED
    for call in waiting:
        call.cancel()
    await until(lambda: not copy.waiting, interval=0.001, why="the call whose caller left no longer waits")
    for sent in of(mesh, "a", "slow"):
        sent.reply(framing.pack(b""))


async def test_a_late_call_that_leaves_as_its_turn_comes_gives_it_back(mesh):
    calls = [mesh.call("slow") for _ in range(CONNECTIONS // 2)]
    first, second = late(mesh), late(mesh)
    (copy,) = mesh.world.view.copies["slow"]
    await until(lambda: len(copy.waiting) == 2, interval=0.001)
    of(mesh, "a", "slow")[0].reply()
    first.cancel()
    await until(
        lambda: len(of(mesh, "a", "slow")) > CONNECTIONS // 2, interval=0.001, why="the second call has the turn"
    )
    for sent in of(mesh, "a", "slow"):
        if not sent.over:
            sent.reply(framing.pack(b""))
    await until(lambda: second.answers, interval=0.001)
    assert not first.answers
    assert {call.code for call in calls} == {Code.OK}
    assert copy.calls == 0


async def test_a_late_call_uses_another_copy_that_has_room(mesh):
    calls = [mesh.call("wide") for _ in range(CONNECTIONS - 1)]
    other = late(mesh, "wide")
    await until(lambda: len(of(mesh, "a", "wide")) == len(of(mesh, "b", "wide")) == CONNECTIONS // 2, interval=0.001)
    for sent in [*of(mesh, "a", "wide"), *of(mesh, "b", "wide")]:
        sent.reply(framing.pack(b""))
    await until(lambda: other.answers, interval=0.001)
    assert {call.code for call in [*calls, other]} == {Code.OK}


# --- the rule ---


@dataclass
class Model:
    calls: int
    in_flight: int


@given(st.integers(64, 300), st.lists(st.integers(0, 4), min_size=1, max_size=600))
def test_there_is_always_a_connection_for_a_model_without_one(connections, arrivals):
    """In whatever order five models ask for connections, one connection stays free."""
    calls = [0] * 5
    for model in arrivals:
        if not shares.full(Model(calls[model], sum(calls)), connections) and sum(calls) < connections:
            calls[model] += 1
        assert sum(calls) < connections


@pytest.mark.parametrize(("models", "each"), [(1, 512), (2, 341), (3, 256)])
def test_greedy_models_share_evenly_and_leave_as_much(models, each):
    calls = [0] * models
    for _ in range(2000):
        for model in range(models):
            if not shares.full(Model(calls[model], sum(calls)), 1024):
                calls[model] += 1
    assert all(abs(count - each) <= 1 for count in calls)
