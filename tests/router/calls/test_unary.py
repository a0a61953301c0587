"""Unary calls: the choice of the copy, what is passed on in both directions, and every rule of retrying."""

import asyncio
import time

import pytest

from mesh.statuses import Code
from mesh.wire import framing, requestdigest
from mesh.wire.client import LostKind
from placement.blame import REFUSED_MS, Blame
from tests.support import fakecalls
from tests.support.fakecalls import FakeCall
from tests.support.waiting import until

UNSAFE = b"/some.Predictor/predict"


def resident(core, *pods, model="m"):
    """Registers the model and shows it as loaded in these pods, by default in pod `a`."""
    core.register(model)
    for pod in pods or ("a",):
        core.world.pod(pod)
        core.world.copy(model, pod)
        core.agents.answers[pod] = fakecalls.loaded()


def unsafe_call(core, model="m"):
    call = FakeCall(UNSAFE, [(b"mm-model-id", model.encode())], framing.pack(b"payload"))
    core.dispatcher.dispatch(call)
    return call


def where(core, *pods):
    """Returns the one pod that has received a call."""
    (pod,) = [pod for pod in pods if core.sent(pod)]
    return pod


# --- a hit ---


async def test_a_hit_is_sent_at_once_and_its_reply_comes_back_as_it_came(core):
    """A hit is forwarded without a task or a read of etcd. The reply comes back unchanged, and Mesh's own headers
    appear in neither direction."""
    resident(core)
    headers = [(b"x-trace", b"1"), (b"mesh-copy", b"forged"), (b"mm-model-id", b"forged"), (b"user-agent", b"u")]
    call = core.call(headers=headers)
    (sent,) = core.sent("a")
    assert sent.headers == {b"x-trace": b"1", b"mesh-copy": b"i.7", b"mm-model-id": b"m", b"mm-model-id-bin": b"bQ"}
    assert sent.frame is call.frame
    assert sent.timeout is None
    assert core.world.view.pods["a"].in_flight == core.forwarder.in_flight == 1
    sent.reply(b"\0\0\0\0\x01z", [(b"mesh-load", b"3"), (b"x-from", b"b")], trailers=[(b"x-end", b"c")])
    assert call.answers == [(0, "", b"\0\0\0\0\x01z", [(b"x-from", b"b")], [(b"x-end", b"c")])]
    pod = core.world.view.pods["a"]
    assert (pod.in_flight, pod.load) == (0, 3)
    assert core.etcd.reads == 0
    assert len(core.forwarder.tasks) == 0


@pytest.mark.parametrize("code", [Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED], ids=lambda code: code.name)
async def test_a_failure_of_the_model_server_is_passed_through(core, code):
    """The caller gets the failure with its code, text and metadata, although another copy could answer. The copy stays
    callable."""
    resident(core, "a", "b")
    call = core.call()
    pod = where(core, "a", "b")
    core.sent(pod)[0].fail(code, "not today", [(b"grpc-status-details-bin", b"x"), (b"mesh-load", b"0")])
    assert call.answers == [(code, "not today", None, [(b"grpc-status-details-bin", b"x")], [])]
    assert len(core.sent("a")) + len(core.sent("b")) == 1
    assert sorted(core.world.callable("m")) == ["a", "b"]


async def test_a_compressed_reply_says_so(core):
    resident(core)
    call = core.call()
    core.sent("a")[0].reply(b"\1\0\0\0\x01z", encoding=b"gzip")
    assert call.answers[0][3] == [(b"grpc-encoding", b"gzip")]


async def test_the_deadline_goes_along(core):
    resident(core)
    call = core.call(deadline=2.0)
    timeout = core.sent("a")[0].timeout
    assert timeout.endswith(b"u")
    assert 1.5e6 < int(timeout[:-1]) <= 2.001e6
    core.sent("a")[0].reply()
    assert call.code is Code.OK


async def test_a_deadline_that_passes_ends_the_call_and_tells_the_server(core):
    resident(core)
    call = await core.answered(core.call(deadline=0.01))
    assert call.code is Code.DEADLINE_EXCEEDED
    assert core.sent("a")[0].cancelled


async def test_a_cancel_reaches_the_server(core):
    resident(core)
    call = core.call()
    call.cancel()
    assert core.sent("a")[0].cancelled
    assert core.world.view.pods["a"].in_flight == 0


async def test_a_load_that_is_no_number_is_ignored(core):
    resident(core)
    call = core.call()
    core.sent("a")[0].reply(headers=[(b"mesh-load", b"much")])
    assert call.code is Code.OK


async def test_the_least_loaded_copy_is_called(core):
    resident(core, "a", "b")
    first, second = core.call(), core.call()
    assert len(core.sent("a")) == len(core.sent("b")) == 1
    core.sent("a")[0].reply(headers=[(b"mesh-load", b"9")])
    third, fourth = core.call(), core.call()
    assert (len(core.sent("a")), len(core.sent("b"))) == (1, 3)
    for sent in core.sent("b"):
        sent.reply()
    assert all(call.code is Code.OK for call in (first, second, third, fourth))


async def test_other_methods_go_by_their_metadata(core):
    resident(core)
    call = unsafe_call(core)
    (sent,) = core.sent("a")
    assert sent.method == UNSAFE
    sent.reply()
    assert call.code is Code.OK


@pytest.mark.parametrize("frame", [framing.pack(b"\x08\x01"), framing.pack(b"")], ids=["malformed", "nameless"])
async def test_what_names_no_model_is_refused(core, frame):
    call = FakeCall(frame=frame)
    core.dispatcher.dispatch(call)
    assert call.code is Code.INVALID_ARGUMENT


async def test_what_cannot_stand_in_a_request_is_refused(core, monkeypatch):
    """A call that cannot be written as a request is refused, for instance if no header can contain its encoding."""
    resident(core)

    def send(*_, **__):
        raise ValueError("b'x y' is not a valid grpc-encoding")

    monkeypatch.setattr(core.world.pool("a"), "send", send)
    assert core.call().code is Code.INVALID_ARGUMENT


async def test_a_call_that_is_refused_at_once_is_freed_at_once(core, monkeypatch):
    """No reference cycle with its carrier keeps a refused call for the garbage collector."""
    import gc
    import weakref

    class Watched(FakeCall):
        pass

    resident(core)

    def send(*_, **__):
        raise ValueError("it cannot stand in a request")

    monkeypatch.setattr(core.world.pool("a"), "send", send)
    call = Watched()
    core.dispatcher.dispatch(call)
    assert call.code is Code.INVALID_ARGUMENT
    assert call._callback is None
    gone = weakref.ref(call)
    gc.disable()
    try:
        del call
        assert gone() is None
    finally:
        gc.enable()


async def test_the_agents_of_a_mesh_are_not_for_clients(core):
    call = FakeCall(b"/mmesh.ModelRuntime/unloadModel", [(b"mm-model-id", b"m")])
    core.dispatcher.dispatch(call)
    assert call.code is Code.UNIMPLEMENTED


# --- not here ---


async def test_not_here_goes_to_another_copy_and_forgets_this_one(core):
    resident(core, "a", "b")
    call = core.call()
    first = where(core, "a", "b")
    other = "b" if first == "a" else "a"
    core.sent(first)[0].not_here()
    core.sent(other)[0].reply()
    assert call.code is Code.OK
    assert core.world.callable("m") == [other]


@pytest.mark.parametrize("method", ["safe", "unsafe"])
async def test_not_here_without_another_copy_loads_it(core, method):
    """A call answered *not here* loads the model if no other copy is left. Calls of any method may be sent again,
    because nothing has run."""
    resident(core)
    call = core.call() if method == "safe" else unsafe_call(core)
    core.sent("a")[0].not_here()
    (await core.reaches("a", 2)).reply()
    assert call.code is Code.OK
    assert len(core.agents.loads) == 1


async def test_a_pod_that_keeps_saying_not_here_after_loads_is_given_up(core):
    """The pod's agent and server disagree: the agent confirms each load, but the server answers *not here*."""
    resident(core)
    call = core.call()
    for count in range(1, 9):
        (await core.reaches("a", count)).not_here()
    await core.answered(call)
    assert call.code is Code.UNAVAILABLE
    assert "does not hold the model" in call.text


async def test_a_client_cannot_pretend_that_a_model_is_not_here(core):
    """The router removes the *not here* header from requests, and ignores it in replies that succeed."""
    resident(core)
    call = core.call(headers=[(b"mesh-not-here", b"1")])
    (sent,) = core.sent("a")
    assert b"mesh-not-here" not in sent.headers
    sent.reply(headers=[(b"mesh-not-here", b"1")])
    assert call.code is Code.OK
    assert call.answers[0][3] == []


# --- lost ---


@pytest.mark.parametrize("method", ["safe", "unsafe"])
async def test_a_call_that_was_not_sent_goes_to_another_copy(core, method):
    resident(core, "a", "b")
    call = core.call() if method == "safe" else unsafe_call(core)
    first = where(core, "a", "b")
    other = "b" if first == "a" else "a"
    core.sent(first)[0].lose(LostKind.UNSENT)
    core.sent(other)[0].reply()
    assert call.code is Code.OK
    assert sorted(core.world.callable("m")) == ["a", "b"], "etcd still has the copy, which is only avoided for a while"
    again = core.call()
    core.sent(other)[1].reply()
    assert again.code is Code.OK


async def test_a_pod_that_answers_again_is_used_again(core):
    resident(core)
    call = core.call()
    core.sent("a")[0].lose(LostKind.UNSENT)
    (await core.reaches("a", 2)).reply()
    assert call.code is Code.OK
    assert core.world.view.pods["a"].failed_at == 0
    assert [pod for pod, _ in core.agents.loads] == ["a"], "the agent has confirmed the copy"


async def test_without_a_free_connection_the_pod_is_not_to_blame(core):
    resident(core)
    core.world.pool("a").full = True
    call = core.call()
    core.sent("a")[0].lose(LostKind.UNSENT)
    assert call.code is Code.RESOURCE_EXHAUSTED
    assert core.world.view.pods["a"].failed_at == 0


async def test_a_safe_call_that_was_sent_is_tried_once_more(core):
    resident(core, "a", "b")
    call = core.call()
    first = where(core, "a", "b")
    other = "b" if first == "a" else "a"
    core.sent(first)[0].lose(LostKind.SENT)
    (await core.reaches(other)).reply()
    assert call.code is Code.OK


async def test_an_unsafe_call_that_was_sent_is_the_callers_choice(core):
    resident(core, "a", "b")
    call = unsafe_call(core)
    core.sent(where(core, "a", "b"))[0].lose(LostKind.SENT)
    assert call.code is Code.UNAVAILABLE
    assert "lost in the middle" in call.text


async def test_a_call_whose_reply_had_begun_is_not_tried_again(core):
    resident(core, "a", "b")
    call = core.call()
    core.sent(where(core, "a", "b"))[0].lose(LostKind.STARTED)
    assert call.code is Code.UNAVAILABLE


async def test_a_model_in_whose_calls_two_servers_die_gets_no_third(core):
    """After two servers died during a model's calls, no call of that model is retried in a third server. Later calls
    read the record first."""
    resident(core, "a", "b", "c")
    calls = [core.call() for _ in range(3)]
    sent = {pod: core.sent(pod)[0] for pod in "abc"}
    sent["a"].lose(LostKind.SENT)
    assert core.forwarder.meter.retried.value == 1
    sent["b"].lose(LostKind.SENT)
    assert core.forwarder.meter.retried.value == 1
    assert sum(call.code is Code.UNAVAILABLE for call in calls) == 1
    core.register(killed=("a died", "b died"))
    later = await core.answered(core.call())
    assert later.code is Code.FAILED_PRECONDITION
    assert "quarantined" in later.text
    await until(lambda: sum(call.code is not None for call in calls) == 2, why="the second try has read the record")
    for pod in "abc":
        for left in core.sent(pod):
            if left not in sent.values() or pod == "c":
                left.reply()


def died_in(core, frame: bytes, *, ago_ms: int = 0):
    """Writes into the model's record that a request killed the server of pod `a`."""
    at = time.time_ns() // 1_000_000 - ago_ms
    request = requestdigest.digest(frame).hex()
    core.register(killed=("a died",), blames=(Blame("a", at, "", sure=True, digests=(request,)),))


async def test_a_request_in_which_a_server_died_is_not_tried_again(core):
    """A request in which a server died is not retried or accepted again before ten minutes have passed. Other requests
    of the model continue."""
    resident(core, "a", "b")
    poison = core.call(payload=b"poison")
    await until(lambda: core.sent("a") or core.sent("b"))
    (sent,) = [*core.sent("a"), *core.sent("b")]
    died_in(core, core.frame(payload=b"poison"))
    sent.lose(LostKind.SENT)
    await core.answered(poison)
    assert poison.code is Code.FAILED_PRECONDITION
    assert "ran this very request" in poison.text
    assert len([*core.sent("a"), *core.sent("b")]) == 1
    again = await core.answered(core.call(payload=b"poison"))
    assert again.code is Code.FAILED_PRECONDITION
    good = core.call(payload=b"good")
    await until(lambda: len([*core.sent("a"), *core.sent("b")]) == 2)
    for one in [*core.sent("a"), *core.sent("b")]:
        if not one.over:
            one.reply()
    assert good.code is Code.OK
    died_in(core, core.frame(payload=b"poison"), ago_ms=REFUSED_MS)
    late = core.call(payload=b"poison")
    await until(lambda: len([*core.sent("a"), *core.sent("b")]) == 3)
    for one in [*core.sent("a"), *core.sent("b")]:
        if not one.over:
            one.reply()
    assert late.code is Code.OK


async def test_a_request_that_ends_after_its_message_is_held_against_deaths_too(core):
    """A death also counts against a request that is carried as a stream of one message because its end arrives
    later."""

    class Late(FakeCall):
        async def read(self):
            frame, self.message = self.message, None
            return frame

    died_in(core, core.frame(payload=b"poison"))
    core.world.pod("a")
    core.agents.answers["a"] = fakecalls.loaded(blamed=True)
    call = Late(frame=None)
    call.message = core.frame(payload=b"poison")
    core.dispatcher.dispatch(call)
    await core.answered(call)
    assert call.code is Code.FAILED_PRECONDITION
    assert "ran this very request" in call.text


async def test_a_router_that_has_lost_nothing_is_told_by_the_copy(core):
    """A router that saw no death learns of it from a copy that was loaded after the death. The router then reads the
    record before it calls that copy."""
    died_in(core, core.frame(payload=b"poison"))
    core.world.pod("a")
    core.agents.answers["a"] = fakecalls.loaded(blamed=True)
    poison = await core.answered(core.call(payload=b"poison"))
    assert poison.code is Code.FAILED_PRECONDITION
    good = core.call(payload=b"good")
    (await core.reaches("a")).reply()
    assert good.code is Code.OK


async def test_a_model_that_only_shared_a_server_with_a_killer_goes_on(core):
    resident(core, "a", "b", "c")
    calls = [core.call() for _ in range(2)]
    sent = [core.sent(pod)[0] for pod in "abc" if core.sent(pod)]
    for one in sent:
        one.lose(LostKind.SENT)
    later = core.call()
    await until(lambda: core.etcd.reads == 1)
    await until(lambda: sum(len(core.sent(pod)) for pod in "abc") == 4)
    for pod in "abc":
        for left in core.sent(pod):
            if left not in sent:
                left.reply()
    assert later.code is Code.OK
    assert sorted(str(call.code) for call in calls) == [str(Code.OK), str(Code.UNAVAILABLE)]


# --- suspects ---


async def test_a_suspect_answers_where_its_registration_is_the_current_one(core):
    resident(core)
    core.world.lose("a")
    call = core.call()
    (await core.reaches("a")).reply()
    assert call.code is Code.OK
    assert core.etcd.reads == 1


async def test_a_suspect_does_not_answer_for_a_registration_that_is_gone(core):
    resident(core)
    core.world.lose("a")
    core.unregister()
    call = await core.answered(core.call())
    assert call.code is Code.NOT_FOUND
    assert core.sent("a") == [] if "a" in core.world.view.pods else True


async def test_a_suspect_does_not_answer_for_an_id_registered_again(core):
    """After an id is registered again, a healthy pod loads the new registration. A suspect pod with the old one does
    not answer."""
    resident(core)
    pool = core.world.pool("a")
    core.world.lose("a")
    core.register(created=9)
    core.world.pod("b")
    core.agents.answers["b"] = fakecalls.loaded()
    call = core.call()
    sent = await core.reaches("b")
    assert sent.headers[b"mesh-copy"] == b"i.9"
    sent.reply()
    assert call.code is Code.OK
    assert pool.sent == []


async def test_a_suspect_answers_where_etcd_does_not(core):
    """While etcd is unavailable a suspect pod answers calls, and for a while etcd is not asked again."""
    resident(core)
    core.world.lose("a")
    core.etcd.gate.clear()
    call = core.call()
    (await core.reaches("a")).reply()
    assert call.code is Code.OK
    reads = core.etcd.reads
    second = core.call()
    (await core.reaches("a", 2)).reply()
    assert second.code is Code.OK
    assert core.etcd.reads == reads


# --- pods that cannot prove that they may answer ---


async def test_a_call_that_must_be_verified_is_sent_again_whatever_its_method(core):
    """A call that must be verified has not run, so it is sent again after a read of the record. The retry says that the
    record was read, and so do the next calls, without another read."""
    resident(core)
    call = unsafe_call(core)
    (sent,) = core.sent("a")
    assert b"mesh-verified" not in sent.headers
    sent.verify_first()
    again = await core.reaches("a", 2)
    assert again.headers[b"mesh-verified"] == b"1"
    again.reply()
    assert call.code is Code.OK
    assert core.etcd.reads == 1
    for number in range(3, 10):
        other = core.call()
        sent = core.sent("a")[number - 1]
        assert sent.headers[b"mesh-verified"] == b"1"
        sent.reply()
        assert other.code is Code.OK
    assert core.etcd.reads == 1


async def test_what_must_be_verified_and_is_gone_is_not_called_again(core):
    """A call that must be verified is not sent again after its registration has ended, even if this router's view does
    not show that yet."""
    resident(core)
    call = core.call()
    core.unregister()
    core.sent("a")[0].verify_first()
    await core.answered(call)
    assert call.code is Code.NOT_FOUND
    assert len(core.sent("a")) == 1


async def test_what_must_be_verified_and_is_registered_again_is_loaded(core):
    resident(core)
    call = core.call()
    core.register(created=9)
    core.sent("a")[0].verify_first()
    again = await core.reaches("a", 2)
    assert again.headers[b"mesh-copy"] == b"i.9"
    again.reply()
    assert call.code is Code.OK


@pytest.mark.parametrize(("digest", "answers"), [("", True), ("d" * 64, False)])
async def test_content_that_was_replaced_does_not_answer_unproven(core, digest, answers):
    """Once the next generation was loaded somewhere, replaced content does not answer a call that must be verified.
    Before that it answers, because no other copy exists."""
    resident(core)
    core.agents.answers["a"].loaded.generation = 1
    call = core.call()
    core.register(generation=1, digest=digest)
    core.sent("a")[0].verify_first()
    again = await core.reaches("a", 2)
    assert again.headers[b"mesh-copy"] == (b"i.7" if answers else b"i.7.1")
    again.reply()
    assert call.code is Code.OK
    assert bool(core.agents.loads) is not answers


async def test_where_etcd_is_away_the_call_says_so(core):
    """While etcd is unavailable, a retry tells its pod so, and later calls do so at once. A probe notices when etcd
    answers again."""
    resident(core)
    core.etcd.away = True
    call = core.call()
    core.sent("a")[0].verify_first()
    again = await core.reaches("a", 2)
    assert again.headers[b"mesh-etcd-away"] == b"1"
    again.reply()
    assert call.code is Code.OK
    other = core.call()
    assert core.sent("a")[2].headers[b"mesh-etcd-away"] == b"1"
    core.sent("a")[2].reply()
    assert other.code is Code.OK
    core.etcd.away = False
    await until(lambda: not core.forwarder.verifier.away, why="the probe finds etcd")


async def test_a_probe_that_breaks_does_not_leave_etcd_unavailable(core, monkeypatch):
    """An unexpected error ends a probe of etcd. Then etcd no longer counts as unavailable, and the next call that must
    be verified reads the record."""
    resident(core)
    core.etcd.away = True
    verifier = core.forwarder.verifier

    async def breaks(timeout):
        raise RuntimeError("broken")

    monkeypatch.setattr(verifier, "_reach", breaks)
    call = core.call()
    core.sent("a")[0].verify_first()
    (await core.reaches("a", 2)).reply()
    assert call.code is Code.OK
    await until(lambda: not verifier.away, why="the probe has ended")
    core.etcd.away = False
    call = core.call()
    again = await core.reaches("a", 3)
    assert again.headers[b"mesh-verified"] == b"1"
    again.reply()
    assert call.code is Code.OK


async def test_a_pod_that_knows_better_has_the_record_read_until_etcd_answers(core):
    """A pod that reaches etcd rejects a router's claim that etcd is unavailable. The router tries to read the record
    until etcd answers the router too, because processes do not all notice etcd's return at once."""
    resident(core)
    core.etcd.away = True
    call = core.call()
    core.sent("a")[0].verify_first()
    (await core.reaches("a", 2)).verify_first()
    reads = core.etcd.reads
    await until(lambda: core.etcd.reads > reads + 2, why="the record is read again and again")
    assert call.code is None
    core.etcd.away = False
    again = await core.reaches("a", 3)
    assert again.headers[b"mesh-verified"] == b"1"
    again.reply()
    assert call.code is Code.OK


async def test_a_model_that_kills_servers_is_read_for_each_call(core):
    """The record of a model that kills servers is read for each call, because an earlier read does not show a
    quarantine that began since."""
    resident(core, "a", "b", "c")
    for name, load in (("a", 0), ("b", 10), ("c", 20)):
        core.world.view.pods[name].load = load
    call = core.call()
    core.sent("a")[0].lose(LostKind.SENT)
    (await core.reaches("b")).lose(LostKind.SENT)
    assert call.code is Code.UNAVAILABLE
    for name in "ab":
        core.world.view.pods[name].failed_at = asyncio.get_running_loop().time()
    call = core.call()
    (await core.reaches("c")).reply()
    assert call.code is Code.OK
    core.register(killed=("one", "two"))
    call = await core.answered(core.call())
    assert call.code is Code.FAILED_PRECONDITION
    assert len(core.sent("c")) == 1


async def test_a_pod_that_knows_better_is_not_waited_for_where_there_is_another(core):
    """A call does not wait for a pod that insists on verification if another copy can answer. If all pods insist, the
    call waits for the last of them."""
    resident(core, "a", "b", "c")
    for name, load in (("a", 0), ("b", 10), ("c", 20)):
        core.world.view.pods[name].load = load
    core.etcd.away = True
    call = core.call()
    core.sent("a")[0].verify_first()
    (await core.reaches("a", 2)).verify_first()
    sent = await core.reaches("b")
    assert call.code is None
    sent.reply()
    assert call.code is Code.OK

    done, away = {name: len(core.sent(name)) for name in "abc"}, []
    call = core.call()
    while not call.answers:
        for name in "abc":
            for sent in core.sent(name)[done[name] :]:
                done[name] += 1
                if b"mesh-verified" in sent.headers:
                    sent.reply()
                    continue
                if b"mesh-etcd-away" in sent.headers:
                    away.append(name)
                core.etcd.away = len(away) < 3
                sent.verify_first()
        await asyncio.sleep(0.001)
    assert (call.code, away) == (Code.OK, ["a", "b", "c"])


async def test_what_a_pod_demands_holds_as_long_as_etcd_is_away(core):
    """A pod's demand for verification is remembered as long as etcd is unavailable, so a second later no call is sent
    back for it again."""
    resident(core)
    core.etcd.away = True
    core.call()
    core.sent("a")[0].verify_first()
    (await core.reaches("a", 2)).reply()
    core.world.view.settle(1.0, away=core.forwarder.verifier.away)
    core.call()
    assert core.sent("a")[2].headers[b"mesh-etcd-away"] == b"1"
    core.sent("a")[2].reply()
    core.etcd.away = False
    await until(lambda: not core.forwarder.verifier.away, why="the probe finds etcd")
    core.world.view.settle(2.0, away=core.forwarder.verifier.away)
    core.call()
    assert b"mesh-etcd-away" not in core.sent("a")[3].headers
    core.sent("a")[3].reply()


async def test_reads_are_shared_by_the_calls_of_a_model(core):
    """Fifty calls that a pod sends back share their reads of the record. At most two reads happen."""
    resident(core)
    calls = [core.call() for _ in range(50)]
    core.etcd.gate.clear()
    for sent in list(core.sent("a")):
        sent.verify_first()
    await until(lambda: core.etcd.reads >= 1, interval=0.001)
    core.etcd.gate.set()
    await core.reaches("a", 100)
    for sent in core.sent("a")[50:]:
        sent.reply()
    assert all(call.code is Code.OK for call in calls)
    assert core.etcd.reads <= 2


async def test_a_pod_that_sends_everything_back_ends_the_call(core):
    resident(core)
    core.agents.answers["a"] = fakecalls.refused("NO_ROOM")
    call = core.call()
    for count in range(1, 20):
        if call.answers:
            break
        (await core.reaches("a", count)).verify_first()
        await until(
            lambda count=count: call.answers or len(core.sent("a")) > count, why="the call is sent again or answered"
        )
    assert call.code in (Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED)


async def test_a_suspect_that_is_not_reached_is_dropped_with_all_its_copies(core):
    resident(core, "a", "b")
    core.world.copy("n", "a")
    core.world.lose("a")
    core.world.view.pods["b"].load = 100
    call = core.call()
    (await core.reaches("a")).lose(LostKind.UNSENT)
    (await core.reaches("b")).reply()
    assert call.code is Code.OK
    assert core.world.callable("n") == []
    assert "a" not in core.world.view.pods


async def test_a_caller_who_leaves_while_the_record_is_read_is_forgotten(core):
    resident(core)
    core.world.lose("a")
    core.etcd.gate.clear()
    call = core.call()
    await until(lambda: core.etcd.reads)
    call.cancel()
    core.etcd.gate.set()
    await until(lambda: len(core.forwarder.tasks) == 0)
    assert core.sent("a") == []


# --- counting ---


async def test_calls_are_counted_by_method_and_code_and_by_hit_or_cold(core):
    resident(core)
    hit = core.call()
    core.sent("a")[0].reply()
    core.register("cold")
    cold = core.call("cold")
    (await core.reaches("a", 2)).fail(Code.INVALID_ARGUMENT, "no")
    lost = core.call("unknown")
    await core.answered(lost)
    meter = core.forwarder.meter
    counts = {key: sum(series[0].counts) for key, series in meter._known.items()}
    assert counts == {("ModelInfer", 0): 1, ("ModelInfer", 3): 1, ("ModelInfer", 5): 1}
    assert (sum(meter.hits.counts), sum(meter.cold.counts)) == (1, 2)
    assert (hit.code, cold.code, lost.code) == (Code.OK, Code.INVALID_ARGUMENT, Code.NOT_FOUND)
    assert meter.loads.value == 1


async def test_a_long_text_is_cut_to_what_metadata_can_hold(core):
    """gRPC clients refuse metadata of more than 8 KiB, and would show no error text."""
    core.register()
    core.world.pod("a")
    core.agents.answers["a"] = fakecalls.failed("x" * 100_000)
    call = await core.answered(core.call())
    _, text, _, headers, trailers = call.answers[0]
    assert len(text) + sum(len(name) + len(value) for name, value in headers + trailers) < 8000
    assert text.startswith("xxx")


async def test_nothing_is_left_for_the_garbage_collector(core):
    """The objects of a hit are freed by their reference counts, so the garbage collector need not stop the worker for
    them."""
    import gc
    import weakref

    resident(core)

    class Watched(FakeCall):
        pass

    call = Watched()
    core.dispatcher.dispatch(call)
    core.sent("a").pop().reply()
    gone = weakref.ref(call)
    gc.disable()
    try:
        del call
        assert gone() is None
    finally:
        gc.enable()
    await asyncio.sleep(0)


# --- large replies ---


async def test_a_request_is_freed_when_a_large_reply_begins(core):
    """A router holds a large request or its large reply, not both. The call is counted with the request's size."""
    resident(core)
    call = core.call()
    size = len(call.frame) - framing.PREFIX
    (sent,) = core.sent("a")
    sent.sink.on_beginning()
    assert call.frame is None
    assert sent.sink._frame == b""
    counted = []
    core.forwarder.meter.call = lambda *numbers: counted.append(numbers)
    sent.reply(b"\0\0\0\0\x01z")
    assert call.code is Code.OK
    assert counted[0][3:5] == (size, 1)


async def test_a_pod_that_refuses_a_call_after_a_large_reply_has_begun_is_not_believed_twice(core):
    """If a pod says *not here* after its large reply has begun, the call fails, because its request has been freed."""
    resident(core, "a", "b")
    call = core.call()
    pod = where(core, "a", "b")
    (sent,) = core.sent(pod)
    sent.sink.on_beginning()
    sent.not_here()
    assert call.code is Code.UNAVAILABLE
    assert "too much of the request was sent" in call.text


async def test_a_request_is_kept_for_a_shadow_when_a_large_reply_begins(core):
    """The request of a call with a shadow is kept, because the shadow gets it after the reply."""
    resident(core, "a", model="fraud@8")
    resident(core, "b", model="fraud@9")
    core.alias("fraud", "fraud@8", mirror={"target": "fraud@9", "share": 100})
    call = core.call("fraud")
    (sent,) = core.sent("a")
    sent.sink.on_beginning()
    assert call.frame is not None
    assert sent.sink._frame == call.frame
    sent.reply()
