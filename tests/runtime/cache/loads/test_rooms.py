"""Loads that wait for room in memory and on disk."""

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from mesh.runtime.cache.books.entries import EntryState
from mesh.runtime.cache.loads import rooms
from mesh.runtime.cache.loads.outcomes import Failed, Loaded, Outcome, Refused
from mesh.runtime.presence.verdicts import Elsewhere
from mesh.statuses import Reason
from puller.errors import PullError, PullErrorKind
from tests.runtime.pod_of_fakes import FakePod
from tests.support.waiting import until


@pytest.fixture
async def pod() -> AsyncIterator[FakePod]:
    """A pod with a capacity of a million bytes."""
    async with FakePod() as running:
        yield running


async def waits(pod: FakePod, *model_ids: str) -> None:
    """Waits until exactly the given loads wait for room."""

    def names() -> set[str]:
        return {
            name for name, entry in pod.ledger.entries.items() if entry.state is EntryState.PULLING and entry.disk_bytes
        }

    await until(lambda: names() == set(model_ids), why=lambda: f"{model_ids} wait for room: {names()}")


@pytest.mark.parametrize("known", [True, False], ids=["known", "new"])
async def test_a_storm_of_cold_calls_is_served_in_turn(known: bool) -> None:
    """A pod with room for 65 models loads all 200 models that are requested at once, if each is called once as soon as
    it is loaded."""
    async with FakePod(capacity=65_000_000, slots=100) as pod:

        async def call(model_id: str) -> Outcome:
            want = replace(pod.want(model_id, 1_000_000, known=known), path=f"/{model_id}/900000")
            pod.server.sizes[want.path] = 1_000_000
            outcome = await pod.loads.load(want)
            if isinstance(outcome, Loaded):
                pod.called(model_id)
            return outcome

        outcomes = await asyncio.gather(*(call(f"m{number}") for number in range(200)))
        assert all(isinstance(outcome, Loaded) for outcome in outcomes), [o for o in outcomes if isinstance(o, Refused)]
        assert pod.ledger.physical.host_bytes <= 65_000_000


@pytest.mark.parametrize("seed", range(6))
async def test_any_storm_is_served_and_no_promise_is_given_twice(seed: int) -> None:
    """Sixty loads of random sizes and estimates are all served. While loads are measured, the ledger may exceed the
    capacity by the largest size; in the end it does not."""
    draw = random.Random(seed)
    async with FakePod(capacity=10_000_000, slots=100, concurrency=draw.choice((1, 2, 4))) as pod:

        async def call(model_id: str) -> Outcome:
            await asyncio.sleep(draw.random() / 20)
            size = draw.choice((50_000, 500_000, 2_000_000, 6_000_000))
            file = draw.choice((500, size // 10, size // 2, size))
            want = replace(pod.want(model_id, size, known=draw.random() < 0.5), path=f"/{model_id}/{file}")
            pod.server.sizes[want.path] = size
            outcome = await pod.loads.load(want)
            if isinstance(outcome, Loaded):
                pod.called(model_id)
            assert pod.ledger.committed.host_bytes <= 16_000_000
            return outcome

        outcomes = await asyncio.gather(*(call(f"m{number}") for number in range(60)))
        assert all(isinstance(outcome, Loaded) for outcome in outcomes), [o for o in outcomes if isinstance(o, Refused)]
        loaded = [entry.weight for entry in pod.ledger.entries.values() if entry.state is EntryState.LOADED]
        assert sum(loaded) == pod.ledger.committed.host_bytes <= 10_000_000


async def test_loads_that_were_all_guessed_too_small_do_not_wait_for_each_other() -> None:
    """Twenty models, all estimated too small because their files are small, are all loaded in a pod with room for
    five."""
    async with FakePod(capacity=5_000_000) as pod:

        async def call(model_id: str) -> Outcome:
            outcome = await pod.load(model_id, 1_000_000, known=False)
            if isinstance(outcome, Loaded):
                pod.called(model_id)
            return outcome

        outcomes = await asyncio.gather(*(call(f"m{number}") for number in range(20)))
        assert all(isinstance(outcome, Loaded) for outcome in outcomes)
        assert pod.ledger.committed.host_bytes <= 5_000_000


async def test_who_waits_is_served_when_a_call_ends(pod: FakePod) -> None:
    """A waiting load looks for room again and again, because the end of a call is not announced."""
    await pod.fill("a", "b", size=500_000)
    pod.busy("a")
    pod.busy("b")
    load = asyncio.create_task(pod.load("m", 400_000))
    await waits(pod, "m")
    pod.called("b")
    assert isinstance(await load, Loaded)
    assert pod.resident == {"a", "m"}


async def test_a_large_load_without_room_does_not_block_the_smaller_ones_behind_it(pod: FakePod) -> None:
    await pod.fill("a", "b", size=500_000)
    for name in "ab":
        pod.busy(name)
    loads = {}
    for name, size in (("large", 900_000), ("first", 400_000), ("second", 500_000)):
        loads[name] = asyncio.create_task(pod.load(name, size))
        await waits(pod, *loads)
    pod.called("b")
    assert isinstance(await loads["first"], Loaded)
    await waits(pod, "large", "second")
    pod.busy("first")
    pod.called("a")
    assert isinstance(await loads["second"], Loaded)
    await waits(pod, "large")
    pod.called("first")
    pod.called("second")
    assert isinstance(await loads["large"], Loaded)


async def test_no_copy_goes_whose_caller_is_on_its_way(pod: FakePod) -> None:
    """A copy that was just loaded for a call is not evicted before that call arrives. The next load waits for the
    call."""
    await pod.load("a", 900_000)
    load = asyncio.create_task(pod.load("m", 900_000))
    await waits(pod, "m")
    assert pod.resident == {"a"}
    pod.called("a")
    assert isinstance(await load, Loaded)


@pytest.mark.parametrize("why", ["pinned", "nobody waits"])
async def test_what_does_not_pass_is_refused_at_once(pod: FakePod, why: str) -> None:
    """A load is refused at once if no caller waits for it, or if waiting cannot help because pinned copies occupy the
    room."""
    await pod.fill("a", size=900_000)
    pod.entry("a").pinned = why == "pinned"
    pod.busy("a")
    outcome = await pod.load("m", 900_000, known=False, idle_ms=0 if why == "pinned" else 1)
    assert isinstance(outcome, Refused)
    assert outcome.reason is Reason.NO_ROOM


async def test_waiting_for_room_is_bounded(pod: FakePod, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "WAIT", 0.1)
    await pod.fill("a", size=900_000)
    pod.busy("a")
    outcome = await pod.load("m", 900_000, known=False)
    assert isinstance(outcome, Refused)
    assert outcome.reason is Reason.NO_ROOM
    assert "busy" in outcome.text
    assert pod.resident == {"a"}
    await pod.nothing_left("m")


async def test_a_load_that_is_withdrawn_while_it_waits_takes_no_room(pod: FakePod) -> None:
    await pod.fill("a", size=900_000)
    pod.busy("a")
    load = asyncio.create_task(pod.load("m", 900_000))
    await waits(pod, "m")
    assert await pod.loads.withdraw("m", 1, "unregistered")
    assert isinstance(await load, Refused)
    pod.called("a")
    await pod.nothing_left("m")
    assert pod.ledger.committed.host_bytes == pod.ledger.physical.host_bytes == 900_000


async def test_copies_make_way_for_the_disk_as_for_memory(pod: FakePod) -> None:
    """With a disk budget of five files, each load after the fifth evicts the least recently used copy."""
    pod.files.budget = 5_000
    for number in range(8):
        pod.later_ns += 1_000_000_000
        want = replace(pod.want(f"m{number}", known=False), path=f"/m{number}/1000")
        assert isinstance(await pod.loads.load(want), Loaded)
        pod.called(f"m{number}")
    assert pod.resident == {f"m{number}" for number in range(3, 8)}
    assert pod.files.sizes.keys() == pod.resident
    assert sum(1 for question, _ in pod.victims.questions if question.need.size.host_bytes == 1000) == 3


async def test_what_was_unpacked_for_a_copy_makes_way_with_it(pod: FakePod) -> None:
    """A copy whose files were unpacked counts with both on the disk. Here its eviction is enough, and the other copy
    stays."""
    pod.files.budget = 4_000
    pod.server.unpacked["/a/1000"] = 2_000
    for model_id in ("a", "b"):
        assert isinstance(
            await pod.loads.load(replace(pod.want(model_id, known=False), path=f"/{model_id}/1000")), Loaded
        )
        pod.later_ns += 1_000_000_000
        pod.called(model_id)
    assert pod.files.sizes == {"a": 3_000, "b": 1_000}
    assert isinstance(await pod.loads.load(replace(pod.want("c", known=False), path="/c/2000")), Loaded)
    assert pod.resident == {"b", "c"}
    assert pod.files.sizes == {"b": 1_000, "c": 2_000}


async def test_nothing_goes_from_the_disk_for_a_load_that_loses_its_claim(pod: FakePod) -> None:
    pod.files.budget = 1_000
    await pod.loads.load(replace(pod.want("a", known=False), path="/a/1000"))
    pod.claims.held["m"] = asyncio.Event()
    load = asyncio.create_task(pod.loads.load(replace(pod.want("m", known=False), path="/m/1000")))
    await until(lambda: "m" in pod.claims.asked, why="the claim is under way")
    pod.claims.verdicts["m"] = Elsewhere("pod-2")
    pod.claims.held["m"].set()
    assert await load == Elsewhere("pod-2")
    assert pod.resident == {"a"}


async def test_larger_than_the_disk_is_refused_for_good(pod: FakePod) -> None:
    """Nothing is evicted for a model that is larger than the disk budget."""
    pod.files.budget = 1_000
    await pod.loads.load(replace(pod.want("a", known=False), path="/a/1000"))
    outcome = await pod.loads.load(replace(pod.want("m", known=False), path="/m/1001"))
    assert isinstance(outcome, Refused)
    assert outcome.reason is Reason.NOWHERE
    assert pod.resident == {"a"}


async def in_memory(pod: FakePod, *model_ids: str, size: int, file: int) -> dict[str, "asyncio.Task[Outcome]"]:
    """Starts loads that are all in the model server at once. Each is estimated at the size of its file and measured as
    `size`."""
    held = [pod.server.hold("load", model_id) for model_id in model_ids]
    loads = {}
    for model_id in model_ids:
        want = replace(pod.want(model_id, known=False), path=f"/{model_id}/{file}")
        pod.server.sizes[want.path] = size
        loads[model_id] = asyncio.create_task(pod.loads.load(want))
        await pod.asked("load", model_id)
    for event in held:
        event.set()
    return loads


async def test_of_loads_in_memory_that_wait_for_each_other_one_gives_way_and_begins_again() -> None:
    """When two loads in the server wait for each other's memory, one of them is unloaded, but keeps its claim and its
    files. It starts again once the other's copy can be evicted."""
    async with FakePod(capacity=10_000_000) as pod:
        loads = await in_memory(pod, "a", "b", size=6_000_000, file=4_500_000)
        done, _ = await asyncio.wait(loads.values(), return_when=asyncio.FIRST_COMPLETED)
        (first,) = (model_id for model_id, load in loads.items() if load in done)
        (other,) = loads.keys() - {first}
        assert isinstance(await loads[first], Loaded)
        assert pod.ledger.committed.host_bytes == pod.ledger.physical.host_bytes == 6_000_000
        assert pod.entry(other).state is EntryState.WAITING
        assert other not in pod.server.models
        assert other in pod.keys.keys  # its claim
        assert other in pod.files.present
        pod.called(first)
        assert isinstance(await loads[other], Loaded)
        assert pod.resident == {other}
        assert pod.ledger.committed.host_bytes == 6_000_000
        assert pod.server.asked.count(("load", other)) == 2


async def test_a_load_that_is_withdrawn_while_it_gives_way_leaves_nothing() -> None:
    async with FakePod(capacity=10_000_000) as pod:
        for model_id in "ab":
            pod.server.hold("unload", model_id)
        loads = await in_memory(pod, "a", "b", size=6_000_000, file=4_500_000)
        other = await until(lambda: next(iter(pod.unloaded()), None), why="one gives way")
        (first,) = loads.keys() - {other}
        assert await pod.loads.withdraw(other, 1, "unregistered")
        assert isinstance(await loads[other], Refused)
        assert isinstance(await loads[first], Loaded)
        await pod.nothing_left(other)
        assert pod.ledger.committed.host_bytes == pod.ledger.physical.host_bytes == 6_000_000


async def test_the_ledger_keeps_nothing_of_a_load_in_a_dead_server(pod: FakePod) -> None:
    """A load that waits for more room fails when the server dies, and the ledger keeps nothing of it."""
    await pod.fill("a", size=400_000)
    pod.busy("a")
    (load,) = (await in_memory(pod, "m", size=800_000, file=400_000)).values()
    await until(lambda: pod.cache.rooms.statistics().waiting, why="the load waits for more room")
    pod.server.why_down = "died"
    for entry in list(pod.ledger.entries.values()):  # as the agent does
        pod.ledger.remove(entry)
    pod.cache.space.freed()
    outcome = await load
    assert isinstance(outcome, Refused)
    assert outcome.reason is Reason.UNAVAILABLE
    assert pod.ledger.committed.host_bytes == pod.ledger.physical.host_bytes == 0


async def test_a_load_that_was_not_even_asked_about_is_refused_in_the_end(
    pod: FakePod, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When two loads wait for room until their time is up, both are refused."""
    monkeypatch.setattr(rooms, "WAIT", 0.2)
    await pod.fill("a", size=900_000)
    pod.busy("a")
    outcomes = await asyncio.gather(pod.load("first", 500_000), pod.load("second", 600_000))
    assert [type(outcome) for outcome in outcomes] == [Refused, Refused]
    assert not {"first", "second"} & {model_id for _, model_id in pod.server.asked}


async def test_a_pull_waits_for_the_disk_that_another_pull_holds(pod: FakePod) -> None:
    """A pull that waits for another pull's disk space proceeds as soon as that pull fails, although no copy was
    evicted."""
    pod.files.budget = 1_000
    pod.files.held["a"] = asyncio.Event()
    first = asyncio.create_task(pod.loads.load(replace(pod.want("a", known=False), path="/a/1000")))
    await until(lambda: "a" in pod.ledger.entries and pod.entry("a").state is EntryState.PULLING, why="a is pulled")
    pod.files.sizes["a"] = 1_000
    load = asyncio.create_task(pod.loads.load(replace(pod.want("m", known=False), path="/m/1000")))
    await until(lambda: pod.cache.rooms.statistics().waiting, why="m waits for the disk")
    pod.files.errors["/a/1000"] = PullError(PullErrorKind.NOT_FOUND, "nothing there")
    pod.files.held["a"].set()
    assert isinstance(await first, Failed)
    assert isinstance(await load, Loaded)


async def test_a_pull_waits_for_files_that_are_on_their_way_out(pod: FakePod) -> None:
    """A pull waits while the files of a withdrawn copy are being removed, and evicts nothing for their space."""
    pod.files.budget = 2_000
    for model_id in "ab":
        await pod.loads.load(replace(pod.want(model_id, known=False), path=f"/{model_id}/1000"))
        pod.called(model_id)
    unload = pod.server.hold("unload", "b")
    withdrawal = asyncio.create_task(pod.loads.withdraw("b", 1, "unregistered"))
    await pod.asked("unload", "b")
    load = asyncio.create_task(pod.loads.load(replace(pod.want("m", known=False), path="/m/1000")))
    await until(lambda: pod.cache.rooms.statistics().waiting, why="m waits for the disk")
    unload.set()
    assert await withdrawal
    assert isinstance(await load, Loaded)
    assert pod.resident == {"a", "m"}


async def test_pulls_that_wait_for_the_disk_do_not_wait_for_each_other(pod: FakePod) -> None:
    """Pulls that need disk space held by pinned copies are refused at once, instead of waiting for each other."""
    pod.files.budget = 1_000
    await pod.loads.load(replace(pod.want("a", known=False), path="/a/1000", pinned=True))
    wants = [replace(pod.want(model_id, known=False), path=f"/{model_id}/1000") for model_id in "mn"]
    outcomes = await asyncio.gather(*map(pod.loads.load, wants))
    assert [type(outcome) for outcome in outcomes] == [Refused, Refused]
    assert pod.resident == {"a"}
