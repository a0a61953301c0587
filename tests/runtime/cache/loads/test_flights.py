"""Loads against a fake model server, single and concurrent: claims, evictions, answers and clean-up."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import grpc
import pytest

from mesh.runtime.cache.books.entries import EntryState
from mesh.runtime.cache.loads import flights, rooms
from mesh.runtime.cache.loads.outcomes import Failed, Loaded, Refused
from mesh.runtime.presence import verdicts
from mesh.runtime.presence.verdicts import Elsewhere, Stale
from mesh.schema import records
from mesh.schema.records import Failure, ModelRecord
from mesh.statuses import Reason
from placement.blame import Blame
from placement.failures import FailureKind
from placement.footprint import OVERHEAD_BYTES, Footprint
from puller.errors import PullError, PullErrorKind
from tests.runtime.pod_of_fakes import FakePod
from tests.support.waiting import until


@pytest.fixture
async def pod() -> AsyncIterator[FakePod]:
    """A pod with a capacity of a million bytes."""
    async with FakePod() as running:
        yield running


async def test_a_load_claims_pulls_measures_publishes_and_answers(pod: FakePod) -> None:
    """The measured size counts in the ledger, and the server knows the copy's token and slot."""
    outcome = await pod.load("m", 5000, known=False)
    assert isinstance(outcome, Loaded)
    assert outcome.footprint.host_bytes == 5000
    assert outcome.load_ms >= 1
    assert pod.ledger.committed.host_bytes == pod.ledger.physical.host_bytes == 5000
    copy = pod.keys.keys["m"]
    assert (copy.state, copy.create_revision, copy.host_bytes) == (records.LOADED, 1, 5000)
    assert pod.server.told["m"]["mesh-copy"] == "life.1"
    assert pod.server.told["m"]["mesh-slot"] == str(pod.entry("m").slot)
    assert pod.history.sizes == {"m": 5000}


async def test_a_server_that_tells_sizes_only_when_asked(pod: FakePod) -> None:
    """A server that reports a model's size only in reply to `modelSize`, as the SPI allows, is asked for the size."""
    pod.server.in_trailers = False
    outcome = await pod.load("m", 5000, known=False)
    assert isinstance(outcome, Loaded)
    assert pod.entry("m").weight == 5000


async def test_a_type_that_the_server_does_not_take_is_refused_by_the_pod_itself() -> None:
    """A router whose view is older than the pod's `--types` may ask for a model that the server cannot load. The pod
    refuses: the server is not asked, nothing is claimed, and the model is not blamed."""
    async with FakePod(types=frozenset({"sklearn", "xgboost:1"})) as pod:
        wrong = replace(pod.want("m"), type="mt:onnx:1")
        why = "m is of type mt:onnx:1, and this pod accepts only the types sklearn, xgboost:1 (--types)"
        assert await pod.loads.load(wrong) == Refused(Reason.NOWHERE, why)
        assert (pod.server.asked, pod.keys.keys, pod.history.failures) == ([], {}, {})
        statistics = pod.loads.statistics()
        assert (statistics.refusals, statistics.failures) == (1, 0)
        assert isinstance(await pod.loads.load(replace(pod.want("m"), type="mt:sklearn:2")), Loaded)


async def test_what_is_there_is_answered_at_once(pod: FakePod) -> None:
    await pod.fill("m", size=10)
    assert await pod.load("m", 10) == Loaded(Footprint(10), 0)
    assert pod.server.asked == [("load", "m")]


async def test_what_the_server_has_lost_is_loaded_again(pod: FakePod) -> None:
    """If a running server has lost a copy, the copy is loaded again as soon as a caller reports that it is missing."""
    await pod.fill("m", size=10)
    pod.server.models.clear()
    outcomes = await asyncio.gather(*(pod.load("m", 10) for _ in range(3)))
    assert all(isinstance(outcome, Loaded) for outcome in outcomes)
    assert pod.server.asked == [("load", "m"), ("unload", "m"), ("load", "m")]
    assert pod.server.models == {"m": "/m/10"}
    assert pod.ledger.committed.host_bytes == pod.ledger.physical.host_bytes == 10


async def test_callers_share_one_load(pod: FakePod) -> None:
    """One of the callers that share a load gets the load time, and the others get 0."""
    go = pod.server.hold("load", "m")
    callers = [asyncio.create_task(pod.load("m")) for _ in range(5)]
    await pod.asked("load", "m")
    go.set()
    outcomes = await asyncio.gather(*callers)
    assert all(isinstance(outcome, Loaded) for outcome in outcomes)
    assert sum(outcome.load_ms > 0 for outcome in outcomes if isinstance(outcome, Loaded)) == 1
    assert pod.server.asked == [("load", "m")]
    assert pod.claims.asked == ["m"]


async def test_a_caller_that_goes_away_does_not_end_the_load(pod: FakePod) -> None:
    go = pod.server.hold("load", "m")
    caller = asyncio.create_task(pod.load("m"))
    await pod.asked("load", "m")
    caller.cancel()
    go.set()
    await until(lambda: "m" in pod.resident, why="loaded all the same")


async def test_who_loses_the_claim_evicts_nothing_and_stops_its_pull(pod: FakePod) -> None:
    """The load that lost the claim names the pod that won it."""
    await pod.fill("old", size=1_000_000)
    pod.claims.verdicts["m"] = Elsewhere("pod-2")
    pod.files.held["m"] = asyncio.Event()
    pod.claims.held["m"] = asyncio.Event()
    load = asyncio.create_task(pod.load("m", 500_000))
    await until(lambda: pod.ledger.count(EntryState.PULLING), why="the pull has begun beside the claim")
    pod.claims.held["m"].set()
    assert await load == Elsewhere("pod-2")
    assert pod.files.cancelled == ["m"]
    assert pod.resident == {"old"}
    await pod.nothing_left("m")


@pytest.mark.parametrize(
    ("verdict", "answer"),
    [
        (verdicts.Stale(), Stale()),
        (
            verdicts.Away("etcd is away"),
            Refused(Reason.REGISTRY_AWAY, "the pod cannot reserve the load in etcd: etcd is away"),
        ),
    ],
)
async def test_no_claim_no_load(pod: FakePod, verdict: verdicts.Verdict, answer: object) -> None:
    pod.claims.verdicts["m"] = verdict
    assert await pod.load("m") == answer
    assert not pod.server.asked
    await pod.nothing_left("m")


async def test_a_model_on_probation_is_loaded_apart_from_others(pod: FakePod) -> None:
    """A model on probation is loaded while no other model is being loaded, so that another death of the server can have
    no other cause."""
    now = time.time_ns() // 1_000_000
    pod.claims.records["m"] = ModelRecord(type="t", killed=("died",), blames=(Blame("pod-2", now, ""),))
    go = {name: pod.server.hold("load", name) for name in ("first", "m")}
    first = asyncio.create_task(pod.load("first"))
    await pod.asked("load", "first")
    probed = asyncio.create_task(pod.load("m"))
    await until(lambda: "m" in pod.ledger.entries and pod.entry("m").state is EntryState.WAITING, why="m waits")
    go["first"].set()
    await pod.asked("load", "m")
    other = asyncio.create_task(pod.load("other"))
    await until(
        lambda: "other" in pod.ledger.entries and pod.entry("other").state is EntryState.WAITING, why="other waits"
    )
    assert ("load", "other") not in pod.server.asked
    go["m"].set()
    assert all(isinstance(outcome, Loaded) for outcome in await asyncio.gather(first, probed, other))


async def test_a_quarantined_model_is_not_loaded(pod: FakePod) -> None:
    """The quarantine is in the record that the claim returns, which may be newer than the router's record."""
    pod.claims.records["m"] = ModelRecord(type="t", killed=("one", "two"))
    outcome = await pod.load("m")
    assert isinstance(outcome, Refused)
    assert outcome.reason is Reason.QUARANTINED
    assert outcome.text == (
        "model m is quarantined because servers died of it: one; two. "
        "Release it (`mesh release m`) or register it again"
    )
    await pod.nothing_left("m")


async def test_the_least_recently_used_makes_way(pod: FakePod) -> None:
    """Only as many copies as needed are evicted. The new load begins once their memory is free."""
    await pod.fill("a", "b", "c", size=300_000)
    freed = pod.server.hold("unload", "a")
    load = asyncio.create_task(pod.load("d", 300_000))
    await pod.asked("unload", "a")
    await until(lambda: pod.entry("d").state is EntryState.WAITING, why="d waits for space")
    assert ("load", "d") not in pod.server.asked
    freed.set()
    assert isinstance(await load, Loaded)
    assert pod.resident == {"b", "c", "d"}
    assert "a" not in pod.keys.keys
    await until(lambda: "a" not in pod.files.present, why="the evicted model's files are gone")


async def test_a_spare_goes_first(pod: FakePod) -> None:
    """Between two copies of similar age, the one whose model has another copy elsewhere, as the claim reports, is
    evicted first."""
    await pod.fill("sole", "spare", size=500_000)
    pod.claims.spares["spare"] = 1
    pod.later_ns += 10_000_000_000
    assert isinstance(await pod.load("new", 400_000), Loaded)
    assert pod.resident == {"sole", "new"}


async def test_concurrent_loads_on_a_full_pod_evict_no_more_than_they_need(pod: FakePod) -> None:
    """Ten concurrent loads on a full pod evict the ten oldest of twenty copies and no more."""
    await pod.fill(*(f"old{number}" for number in range(20)), size=50_000)
    outcomes = await asyncio.gather(*(pod.load(f"new{number}", 50_000) for number in range(10)))
    assert all(isinstance(outcome, Loaded) for outcome in outcomes), outcomes
    assert pod.resident == {f"new{number}" for number in range(10)} | {f"old{number}" for number in range(10, 20)}
    assert pod.ledger.physical.host_bytes == 1_000_000


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes loads that wait for room give up soon."""
    monkeypatch.setattr(rooms, "WAIT", 0.05)


@pytest.mark.usefixtures("impatient")
async def test_calls_in_flight_are_not_evicted(pod: FakePod) -> None:
    """A load that waits too long for the room of busy copies is refused, and nothing is evicted for it."""
    await pod.fill("a", "b", size=500_000)
    pod.busy("a")
    outcome = await pod.load("m", 600_000)
    assert isinstance(outcome, Refused)
    assert outcome.reason is Reason.NO_ROOM
    assert "busy" in outcome.text
    assert pod.resident == {"a", "b"}
    await pod.nothing_left("m")


async def test_a_preload_does_not_evict_a_model_in_use(pod: FakePod) -> None:
    await pod.fill("used", size=900_000)
    pod.called("used")
    outcome = await pod.load("preload", 200_000, idle_ms=3_600_000)
    assert isinstance(outcome, Refused)
    assert outcome.reason is Reason.NO_ROOM
    assert isinstance(await pod.load("wanted", 200_000), Loaded)


async def test_larger_than_the_pod_by_its_known_size(pod: FakePod) -> None:
    outcome = await pod.load("m", 2_000_000)
    assert isinstance(outcome, Refused)
    assert outcome.reason is Reason.NOWHERE
    assert not pod.claims.asked


async def test_larger_than_the_pod_by_its_files(pod: FakePod) -> None:
    await pod.fill("old", size=1_000_000)
    outcome = await pod.loads.load(replace(pod.want("m", known=False), path="/2000000"))
    assert isinstance(outcome, Refused)
    assert outcome.reason is Reason.NOWHERE
    assert pod.resident == {"old"}
    await pod.nothing_left("m")


async def test_larger_than_the_pod_once_measured(pod: FakePod) -> None:
    """A model that turns out to be larger than the pod is unloaded. Its size is recorded, so the next pod need not
    measure it again."""
    outcome = await pod.load("m", 2_000_000, known=False)
    assert isinstance(outcome, Refused)
    assert outcome.reason is Reason.NOWHERE
    assert pod.history.sizes == {"m": 2_000_000}
    await pod.nothing_left("m")


async def test_what_fits_nowhere_is_not_loaded_to_find_out_again(pod: FakePod) -> None:
    """The record that the claim returns contains a size that fits nowhere, even if the router's record did not. The
    server is not asked, and the estimate for the model's type does not change."""
    await pod.fill("old", size=900_000)
    outcome = await pod.load("m", 2_000_000, known=False)
    assert isinstance(outcome, Refused)
    assert outcome.needs == Footprint(2_000_000)
    assert pod.resident == {"old"}
    await pod.nothing_left("m")
    pod.server.asked.clear()
    pod.claims.records["m"] = ModelRecord(type="t", host_bytes=2_000_000)
    outcome = await pod.load("m", 2_000_000, known=False)
    assert isinstance(outcome, Refused)
    assert outcome.reason is Reason.NOWHERE
    assert not pod.server.asked
    assert pod.cache.admission.sizes().predictions == 1, "the only prediction is for the former registration"


async def test_a_model_whose_files_are_larger_than_the_pod_is_not_pulled_again(pod: FakePod) -> None:
    outcome = await pod.loads.load(replace(pod.want("m", known=False), path="/2000000"))
    assert isinstance(outcome, Refused)
    assert pod.history.sizes == {"m": 2_000_000}


async def test_a_guess_evicts_about_twice_the_file(pod: FakePod) -> None:
    """Three models of the type took nine times the size of their files. A fourth, with a file of 100 KB, still gets
    only 200 KB and a session's overhead before it is measured."""
    for number in range(3):
        want = replace(pod.want(f"big{number}", known=False), path=f"/big{number}/100000")
        pod.server.sizes[want.path] = 900_000
        assert isinstance(await pod.loads.load(want), Loaded)
        await pod.loads.withdraw(f"big{number}", 1, "test")
        await pod.nothing_left(f"big{number}")
    await pod.fill(*(f"m{number}" for number in range(20)), size=50_000)
    want = replace(pod.want("new", known=False), path="/new/100000")
    pod.server.sizes[want.path] = 100_000
    go = pod.server.hold("load", "new")
    load = asyncio.create_task(pod.loads.load(want))
    await pod.asked("load", "new")
    assert pod.entry("new").weight <= 2 * 100_000 + OVERHEAD_BYTES
    go.set()
    assert isinstance(await load, Loaded)
    assert len(pod.resident) >= 15


async def test_larger_than_predicted_evicts_more(pod: FakePod) -> None:
    await pod.fill("a", "b", "c", size=300_000)
    assert isinstance(await pod.load("m", 650_000, known=False), Loaded)
    assert pod.resident == {"c", "m"}
    await until(lambda: pod.ledger.physical.host_bytes == 950_000, why="the victims are gone")


@pytest.mark.usefixtures("impatient")
async def test_a_model_larger_than_estimated_is_unloaded_if_no_copy_may_be_evicted(pod: FakePod) -> None:
    """Such an unload is not recorded as a failure of the model."""
    await pod.fill("a", size=900_000)
    pod.busy("a")
    outcome = await pod.load("m", 500_000, known=False)
    assert isinstance(outcome, Refused)
    assert outcome.reason is Reason.NO_ROOM
    assert pod.resident == {"a"}
    assert not pod.history.failures
    await pod.nothing_left("m")


async def test_an_estimate_alone_refuses_no_load() -> None:
    """A tiny pod loads a tiny model, even if the estimate for a session alone exceeds the pod."""
    async with FakePod(capacity=2000) as pod:
        assert isinstance(await pod.load("m", 1500, known=False), Loaded)


async def test_a_failed_load_leaves_nothing_but_its_reason(pod: FakePod) -> None:
    """As the SPI demands, the server is told to unload a model whose load has failed."""
    pod.server.failures["/m/10"] = (grpc.StatusCode.INVALID_ARGUMENT, "this is no model")
    outcome = await pod.load("m")
    assert outcome == Failed(Reason.LOAD_FAILED, "this is no model")
    assert pod.history.failures == {"m": "this is no model"}
    await pod.nothing_left("m")
    assert pod.unloaded() == ["m"]
    assert pod.ledger.committed.host_bytes == pod.ledger.physical.host_bytes == 0


async def test_a_failed_load_tells_no_path_of_the_pod(pod: FakePod) -> None:
    """The error of a failed load names a file relative to the model, because the pod's paths mean nothing to
    callers."""
    pod.server.failures["/m/10"] = (grpc.StatusCode.INVALID_ARGUMENT, "/m/10/m.onnx is cut off")
    outcome = await pod.load("m")
    assert isinstance(outcome, Failed)
    assert outcome.text == "10/m.onnx is cut off"


async def test_a_failed_load_tells_what_was_skipped(pod: FakePod) -> None:
    """The error of a failed load lists the files that the pull skipped, because the model may need one of them."""
    pod.files.skipped["/m/10"] = ("'weights' cannot be read: Permission denied",)
    pod.server.failures["/m/10"] = (grpc.StatusCode.INVALID_ARGUMENT, "no weights")
    outcome = await pod.load("m")
    assert isinstance(outcome, Failed)
    assert outcome.text == "no weights (skipped files: 'weights' cannot be read: Permission denied)"


@pytest.mark.parametrize("kind", PullErrorKind)
async def test_what_goes_wrong_with_the_files(pod: FakePod, kind: PullErrorKind) -> None:
    """If the disk is full, the pod refuses the load. Any other problem with the files fails the load, with the puller's
    text."""
    pod.files.errors["/m/10"] = PullError(kind, "no luck")
    outcome = await pod.load("m")
    if kind is PullErrorKind.DISK_FULL:
        assert outcome == Refused(Reason.NO_ROOM, "no luck")
        assert not pod.history.failures
    else:
        assert isinstance(outcome, Failed)
        assert (outcome.reason, outcome.text) == (Reason.LOAD_FAILED, "no luck")
        assert outcome.kind.name == kind.nature.name
        assert pod.history.failures == {"m": "no luck"}
    assert not pod.server.asked
    await pod.nothing_left("m")


async def test_how_long_a_store_asks_to_be_left_alone_is_told(pod: FakePod) -> None:
    pod.files.errors["/m/10"] = PullError(PullErrorKind.BUSY, "too many requests", retry_after=5.0)
    outcome = await pod.load("m")
    assert isinstance(outcome, Failed)
    assert (outcome.kind, outcome.asked_ms) == (FailureKind.PASSING, 5000)


async def test_files_that_have_failed_here_are_loaded_again_once_they_have_changed(pod: FakePod) -> None:
    """Files that failed to load in this pod are pulled again on request, but the server gets them only after they have
    changed."""
    pod.server.failures["/m/10"] = (grpc.StatusCode.INVALID_ARGUMENT, "it ends in the middle")
    pod.files.digests["/m/10"] = "half"
    outcome = await pod.load("m")
    assert outcome == Failed(Reason.LOAD_FAILED, "it ends in the middle", FailureKind.CONTENT, digest="half")
    failure = Failure("pod-1", 1, "it ends in the middle", FailureKind.CONTENT, digest="half")
    pod.claims.records["m"] = ModelRecord(type="t", failures=(failure,))
    await pod.nothing_left("m")
    pod.server.asked.clear()
    assert await pod.load("m") == replace(outcome, again=True)
    assert not pod.server.asked
    await pod.nothing_left("m")
    pod.files.digests["/m/10"] = "whole"
    del pod.server.failures["/m/10"]
    assert isinstance(await pod.load("m"), Loaded)


async def test_a_younger_registration_replaces_the_copy(pod: FakePod) -> None:
    """A load for a newer registration removes the old copy first. Then requests for the old registration are stale."""
    await pod.fill("m", size=10)
    assert isinstance(await pod.load("m", 20, revision=2), Loaded)
    assert pod.server.asked == [("load", "m"), ("unload", "m"), ("load", "m")]
    assert pod.keys.keys["m"].create_revision == 2
    assert await pod.load("m", 10, revision=1) == Stale()


async def test_a_younger_registration_ends_the_load_of_the_older(pod: FakePod) -> None:
    pod.server.hold("load", "m")
    first = asyncio.create_task(pod.load("m", revision=1))
    await pod.asked("load", "m")
    second = asyncio.create_task(pod.load("m", revision=2))
    assert isinstance(await second, Loaded)
    assert await first == Stale()
    assert pod.server.told["m"]["mesh-copy"] == "life.2"


async def test_an_older_registration_does_not_join_a_younger_load(pod: FakePod) -> None:
    go = pod.server.hold("load", "m")
    load = asyncio.create_task(pod.load("m", revision=5))
    await pod.asked("load", "m")
    assert await pod.load("m", revision=4) == Stale()
    go.set()
    assert isinstance(await load, Loaded)


async def test_a_copy_that_is_going_is_waited_for(pod: FakePod) -> None:
    await pod.fill("m", size=10)
    gone = pod.server.hold("unload", "m")
    withdrawal = asyncio.create_task(pod.loads.withdraw("m", 0, "test"))
    await pod.asked("unload", "m")
    load = asyncio.create_task(pod.load("m", 10))
    assert await withdrawal
    assert "m" not in pod.keys.keys
    gone.set()
    assert isinstance(await load, Loaded)
    assert [what for what, _ in pod.server.asked] == ["load", "unload", "load"]


async def test_a_load_whose_registration_is_gone_is_stale(pod: FakePod) -> None:
    """The answer `Stale` makes the requester read the record again, instead of asking another pod."""
    pod.server.hold("load", "m")
    load = asyncio.create_task(pod.load("m"))
    await pod.asked("load", "m")
    assert await pod.loads.outdated("m", 1)
    assert await load == Stale()
    await pod.nothing_left("m")


@pytest.mark.parametrize("stage", ["claim", "pull", "load"])
async def test_a_load_can_be_withdrawn_at_any_stage(pod: FakePod, stage: str) -> None:
    """A load that is withdrawn while it is claimed, pulled or loaded leaves nothing behind, and its caller gets the
    reason. A withdrawal of another registration does not end it."""
    if stage == "claim":
        pod.claims.held["m"] = asyncio.Event()
    elif stage == "pull":
        pod.files.held["m"] = asyncio.Event()
    else:
        pod.server.hold("load", "m")
    load = asyncio.create_task(pod.load("m"))
    if stage == "load":
        await pod.asked("load", "m")
    else:
        await until(lambda: "m" in pod.claims.asked, why="the load has claimed")
    assert not await pod.loads.withdraw("m", 2, "another registration of it")
    assert await pod.loads.withdraw("m", 1, "unregistered")
    outcome = await load
    assert isinstance(outcome, Refused)
    assert "unregistered" in outcome.text
    await pod.nothing_left("m")
    assert pod.ledger.committed.host_bytes == pod.ledger.physical.host_bytes == 0


@pytest.mark.parametrize("turns", range(12))
@pytest.mark.parametrize("lost", [False, True], ids=["claimed", "claim-lost"])
async def test_a_load_can_be_withdrawn_at_any_turn_of_the_loop(pod: FakePod, turns: int, lost: bool) -> None:
    """The load is withdrawn in each of its first twelve turns of the event loop: even before its first step, and during
    the clean-up after a lost claim."""
    if lost:
        pod.claims.verdicts["m"] = Stale()
    load = asyncio.create_task(pod.load("m"))
    for _ in range(turns):
        await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await pod.loads.withdraw("m", 1, "unregistered")
        outcome = await load
        if isinstance(outcome, Loaded):
            await pod.loads.withdraw("m", 1, "unregistered")
    await pod.nothing_left("m")


async def test_a_load_withdrawn_while_it_undoes_itself_undoes_all_of_it(pod: FakePod) -> None:
    """A load that lost its claim cleans up completely, even if it is withdrawn while it waits for its pull to stop."""
    pod.claims.verdicts["m"] = Elsewhere("pod-2")
    pod.claims.held["m"] = asyncio.Event()
    pod.files.held["m"] = asyncio.Event()
    stopped = pod.files.stopping["m"] = asyncio.Event()
    load = asyncio.create_task(pod.load("m"))
    await until(lambda: pod.ledger.count(EntryState.PULLING), why="the pull has begun")
    pod.claims.held["m"].set()
    await until(lambda: "m" in pod.files.cancelled, why="the pull is being stopped")
    withdrawal = asyncio.create_task(pod.loads.withdraw("m", 1, "unregistered"))
    for _ in range(10):
        await asyncio.sleep(0)
    stopped.set()
    async with asyncio.timeout(5):
        assert await withdrawal
        await load
    await pod.nothing_left("m")


async def test_withdrawing_what_is_not_there(pod: FakePod) -> None:
    assert not await pod.loads.withdraw("m", 0, "test")


@pytest.mark.parametrize("suspect", [True, False])
async def test_a_server_that_dies_while_it_loads(pod: FakePod, suspect: bool) -> None:
    """If the server had begun to load the model, the error says how the server died, and the model is blamed. Otherwise
    the model is not blamed, and another pod may try it."""
    pod.server.hold("load", "m")
    load = asyncio.create_task(pod.load("m"))
    await pod.asked("load", "m")
    pod.server.why_down = "the model server was killed by SIGSEGV"
    pod.entry("m").suspect = suspect
    pod.ledger.remove(pod.entry("m"))
    pod.server.lives += 1
    assert pod.server.server is not None
    await pod.server.server.stop(None)
    outcome = await load
    if suspect:
        text = "the model server was killed by SIGSEGV while it loaded this model"
        assert outcome == Failed(Reason.LOAD_FAILED, text)
        assert pod.history.failures == {"m": text}
    else:
        assert isinstance(outcome, Refused)
        assert outcome.reason is Reason.UNAVAILABLE
        assert not pod.history.failures
    assert pod.ledger.physical.host_bytes == 0


async def test_no_server_no_load(pod: FakePod) -> None:
    pod.server.why_down = "the model server was killed by SIGKILL"
    outcome = await pod.load("m")
    assert outcome == Refused(Reason.UNAVAILABLE, "the model server was killed by SIGKILL")
    await pod.nothing_left("m")


async def test_a_pod_that_takes_no_loads_says_why(pod: FakePod) -> None:
    """A pod that refuses loads still confirms the copies that it has."""
    await pod.fill("here", size=10)
    pod.refusal = Refused(Reason.NO_ROOM, "the model server takes too much memory")
    assert await pod.load("m") == pod.refusal
    pod.refusal = None
    pod.loads.close("this pod is leaving")
    assert await pod.load("m") == Refused(Reason.UNAVAILABLE, "this pod is leaving")
    assert isinstance(await pod.load("here", 10), Loaded)
    assert pod.resident == {"here"}


async def test_a_pod_that_may_not_answer_tells_of_no_copy(pod: FakePod) -> None:
    """A pod that may not answer calls reports none of its copies. Otherwise routers would send calls to it, be refused,
    and ask again."""
    await pod.fill("here", size=10)
    pod.loads.close("this pod is leaving")
    pod.fence.why = "the pod leaves"
    assert await pod.load("here", 10) == Refused(Reason.UNAVAILABLE, pod.fence.why)
    assert pod.resident == {"here"}, "the copy stays, as it is not at fault"
    pod.fence.why = ""
    assert isinstance(await pod.load("here", 10), Loaded)


async def test_the_queue_is_bounded(pod: FakePod, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flights, "MAX_LOADS", 2)
    holds = [pod.server.hold("load", name) for name in ("a", "b")]
    under_way = [asyncio.create_task(pod.load(name)) for name in ("a", "b")]
    await pod.asked("load", "b")
    outcome = await pod.load("c")
    assert isinstance(outcome, Refused)
    assert outcome.reason is Reason.OVERLOADED
    for hold in holds:
        hold.set()
    assert all(isinstance(outcome, Loaded) for outcome in await asyncio.gather(*under_way))


async def test_what_a_load_has_had_is_not_expected_again() -> None:
    """The time that a load has already spent pulling and waiting is subtracted from its expected duration."""
    async with FakePod(concurrency=1) as pod:
        pod.claims.records.update({name: ModelRecord(type="t", load_ms=10_000) for name in ("a", "b")})
        go = pod.server.hold("load", "a")
        loads = [asyncio.create_task(pod.load(name)) for name in ("a", "b")]
        await pod.asked("load", "a")
        await until(lambda: pod.entry("b").state is EntryState.WAITING, why="b waits for its turn")
        expected = pod.cache.admission.expected
        assert 9_000 < expected(pod.entry("a")).expected_ms <= 10_000
        pod.later_ns += 4_000_000_000
        for name in ("a", "b"):
            assert 5_000 < expected(pod.entry(name)).expected_ms <= 6_000
        pod.later_ns += 7_000_000_000
        assert "should have been done" in expected(pod.entry("a")).why
        go.set()
        assert all(isinstance(outcome, Loaded) for outcome in await asyncio.gather(*loads))


async def test_no_more_loads_in_the_server_than_its_turns() -> None:
    async with FakePod(concurrency=1) as pod:
        go = pod.server.hold("load", "a")
        first, second = asyncio.create_task(pod.load("a")), asyncio.create_task(pod.load("b"))
        await pod.asked("load", "a")
        await until(lambda: pod.entry("b").state is EntryState.WAITING, why="b waits for its turn")
        assert ("load", "b") not in pod.server.asked
        go.set()
        assert all(isinstance(outcome, Loaded) for outcome in await asyncio.gather(first, second))


@pytest.mark.parametrize("stage", ["queued", "pulling"])
async def test_a_caller_makes_a_load_urgent_that_began_without_one(stage: str) -> None:
    """A load that began without a caller becomes urgent when a caller joins, whether it is queued or pulling, and its
    copy no longer counts as long unused."""
    async with FakePod(concurrency=1) as pod:
        hour = 3_600_000
        first = pod.server.hold("load", "first")
        files = pod.files.held["m"] = asyncio.Event()
        if stage == "queued":
            files.set()
        begun = [asyncio.create_task(pod.load(name, idle_ms=hour)) for name in ("first", "other", "m")]
        ready = {"other"} if stage == "pulling" else {"other", "m"}
        await until(lambda: {n for n, e in pod.ledger.entries.items() if e.state is EntryState.WAITING} == ready)
        await pod.asked("load", "first")
        caller = asyncio.create_task(pod.load("m"))
        await until(lambda: pod.ledger.idle_ms(pod.entry("m")) < hour, why="the caller has come")
        files.set()
        await until(lambda: pod.entry("m").state is EntryState.WAITING)
        await asyncio.sleep(0)
        first.set()
        await asyncio.gather(*begun, caller)
        assert [name for what, name in pod.server.asked if what == "load"] == ["first", "m", "other"]
        assert pod.ledger.idle_ms(pod.entry("m")) < hour


async def test_closing_ends_what_has_not_reached_the_server(pod: FakePod) -> None:
    """Closing lets loads in the server finish."""
    go = pod.server.hold("load", "loading")
    pod.files.held["pulling"] = asyncio.Event()
    loading, pulling = asyncio.create_task(pod.load("loading")), asyncio.create_task(pod.load("pulling"))
    await pod.asked("load", "loading")
    await until(lambda: "pulling" in pod.claims.asked, why="the load has claimed")
    pod.loads.close("this pod is leaving")
    outcome = await pulling
    assert isinstance(outcome, Refused)
    assert "leaving" in outcome.text
    go.set()
    await pod.loads.settle(5.0)
    assert isinstance(await loading, Loaded)


async def test_decisions_are_kept_with_their_reasons(pod: FakePod) -> None:
    """Decisions are kept newest first, and are found by each model involved."""
    await pod.fill("old", size=900_000)
    await pod.load("new", 900_000)
    await pod.load("huge", 2_000_000)
    assert '"evict"' in next(iter(pod.decisions.lines("old")))
    assert any("evicts 1 copy" in line for line in pod.decisions.lines("new"))
    assert "NOWHERE" in next(iter(pod.decisions.lines()))


async def test_a_load_that_cannot_be_ended_is_held_against_its_model(pod: FakePod) -> None:
    """A load that cannot be ended is recorded against its model like a death of the server, because its thread is lost
    until the server restarts."""
    for path, stuck in (("/ended/10", False), ("/endless/10", True)):
        pod.server.failures[path] = (grpc.StatusCode.DEADLINE_EXCEEDED, "its load cannot be ended")
        if stuck:
            pod.server.stuck.add(path)
    assert await pod.load("ended", 10) == Failed(Reason.LOAD_FAILED, "its load cannot be ended")
    assert not pod.history.deaths
    assert await pod.load("endless", 10) == Failed(Reason.LOAD_FAILED, "its load cannot be ended")
    assert pod.history.deaths == [("endless", "its load cannot be ended")]


async def test_nothing_is_loaded_after_the_lease_was_lost(pod: FakePod) -> None:
    """A load that waits for its turn is refused once the pod has lost its lease, and with it the claim. Loads in the
    server finish."""
    await pod.fill("a", "b", size=10)
    holds = [pod.server.hold("load", model_id) for model_id in ("c", "d")]
    before = [asyncio.create_task(pod.load(model_id, 10)) for model_id in ("c", "d")]
    await until(lambda: len(pod.server.asked) == 4, why="both turns are taken")
    waiting = asyncio.create_task(pod.load("late", 10))
    await until(lambda: pod.ledger.count(EntryState.WAITING), why="a load waits for its turn")
    pod.refusal = Refused(Reason.REGISTRY_AWAY, "this pod is not published in etcd: lost")
    for go in holds:
        go.set()
    assert all(isinstance(outcome, Loaded) for outcome in await asyncio.gather(*before)), "loads under way are finished"
    assert await waiting == pod.refusal
    assert ("load", "late") not in pod.server.asked
    await pod.nothing_left("late")


async def test_a_load_that_fails_for_memory_is_no_models_fault_and_evicts_nobody_again(pod: FakePod) -> None:
    """A load that fails for lack of memory is reported as NO_ROOM. The same files are not tried again, so no other copy
    is evicted for them."""
    pod.server.failures["/m/10"] = (grpc.StatusCode.RESOURCE_EXHAUSTED, "bad_alloc")
    pod.files.digests["/m/10"] = "d"
    outcome = await pod.load("m", 100)
    assert outcome == Failed(Reason.NO_ROOM, "bad_alloc", FailureKind.MEMORY, digest="d")
    record = ModelRecord(type="t", failures=(Failure("pod-1", 1, "bad_alloc", FailureKind.MEMORY, digest="d"),))
    pod.claims.records["m"] = record
    await pod.fill("a", "b", size=400)
    again = await pod.load("m", 900, known=False)
    assert again == Failed(Reason.NO_ROOM, "bad_alloc", FailureKind.MEMORY, digest="d", again=True)
    assert not [model for model in pod.unloaded() if model != "m"]


async def test_a_load_that_the_pods_rules_forbid_is_tried_again_with_the_same_files(pod: FakePod) -> None:
    """If the server refuses a load for its own rules or state, the failure names no files. The same pod may start again
    with other options, and then loads them."""
    pod.server.failures["/m/10"] = (grpc.StatusCode.FAILED_PRECONDITION, "start pods with --allow-code")
    pod.files.digests["/m/10"] = "d"
    outcome = await pod.load("m")
    assert outcome == Failed(Reason.LOAD_FAILED, "start pods with --allow-code", FailureKind.RULES)
    failure = Failure("pod-1", 1, "start pods with --allow-code", FailureKind.RULES)
    pod.claims.records["m"] = ModelRecord(type="t", failures=(failure,))
    await pod.nothing_left("m")
    assert await pod.load("m") == outcome
    del pod.server.failures["/m/10"]
    assert isinstance(await pod.load("m"), Loaded)


async def test_what_the_server_notes_of_a_model_stands_with_its_copy(pod: FakePod) -> None:
    """A note that the server makes about a model, such as a failed warm-up call, appears in the description of its
    copy."""
    pod.server.notes["/m/10"] = "its warm-up call failed: é"
    assert isinstance(await pod.load("m", reason="a caller"), Loaded)
    assert pod.entry("m").reason == "a caller; its warm-up call failed: é"
