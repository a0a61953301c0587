"""Copies of one registration must have the same content: first loads, differing content, and reloads."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import grpc
import pytest

from mesh.runtime.cache.books.entries import EntryState
from mesh.runtime.cache.loads.outcomes import Failed, Loaded, Outcome, Refused
from mesh.runtime.presence import verdicts
from mesh.runtime.presence.verdicts import Stale
from mesh.schema import records
from mesh.schema.records import ModelRecord
from mesh.statuses import Reason
from placement.footprint import Footprint
from puller.errors import PullError, PullErrorKind
from tests.runtime.pod_of_fakes import FakePod
from tests.support.waiting import until

MB = 1_000_000


@pytest.fixture
async def pod() -> AsyncIterator[FakePod]:
    """A pod with a capacity of a million bytes. The model's file in its store has the digest "one"."""
    async with FakePod(capacity=MB) as running:
        running.files.digests["/m/10"] = "one"
        yield running


def reloaded(pod: FakePod, digest: str = "two") -> None:
    """Marks the model for a reload, and puts a file with the given digest into the store."""
    pod.claims.records["m"] = pod.claims.records["m"].reloaded()
    pod.files.digests["/m/10"] = digest


async def reload(pod: FakePod, size: int = 10, generation: int = 1) -> Outcome:
    return await pod.load("m", size, generation=generation)


# -- one content


async def test_the_first_load_writes_what_it_holds_before_it_answers(pod: FakePod) -> None:
    outcome = await pod.load("m", 10)
    assert isinstance(outcome, Loaded)
    assert (outcome.generation, outcome.digest) == (0, "one")
    assert pod.claims.records["m"].digest == "one"
    copy = pod.keys.keys["m"]
    assert (copy.state, copy.generation, copy.digest, copy.host_bytes) == (records.LOADED, 0, "one", 10)


async def test_a_later_load_of_the_same_content_writes_nothing(pod: FakePod) -> None:
    """Once the content is recorded, further loads of the same content need no transaction."""
    pod.claims.records["m"] = ModelRecord("t", digest="one", digest_ms=1)
    pod.claims.publications["m"] = verdicts.Away("must not be asked")
    assert isinstance(await pod.load("m", 10), Loaded)
    assert pod.keys.keys["m"].digest == "one"


async def test_other_content_is_refused_before_the_model_server_sees_it(pod: FakePod) -> None:
    """The error about differing content names both digests, the time when the content was recorded, and the ways out.
    It does not count as a failure of the model."""
    pod.claims.records["m"] = ModelRecord("t", digest="another", digest_ms=1_700_000_000_000)
    outcome = await pod.load("m", 10)
    assert isinstance(outcome, Failed)
    assert outcome.reason is Reason.CONTENT_CHANGED
    for part in ("another", "one", "2023-11-14T22:13:20Z", "mesh reload", "another id"):
        assert part in outcome.text
    assert not pod.server.asked
    assert pod.history.contents == {"m": "one"}
    assert not pod.history.failures
    await pod.nothing_left("m")


async def test_of_two_first_loads_the_second_is_refused_where_it_holds_something_else(pod: FakePod) -> None:
    """Another pod records other content after this load's claim, while the load is in the server."""
    go = pod.server.hold("load", "m")
    load = asyncio.create_task(pod.load("m", 10))
    await pod.asked("load", "m")
    pod.claims.records["m"] = replace(pod.claims.records["m"], digest="another", digest_ms=1)
    go.set()
    outcome = await load
    assert isinstance(outcome, Failed)
    assert outcome.reason is Reason.CONTENT_CHANGED
    assert pod.history.contents == {"m": "one"}
    assert not pod.history.sizes, "no size of the refused content is recorded"
    await pod.nothing_left("m")
    assert pod.ledger.physical.host_bytes == 0


@pytest.mark.parametrize(
    ("publication", "answer"),
    [
        (Stale(), Stale()),
        (verdicts.Away("no"), Refused(Reason.REGISTRY_AWAY, "the model's content cannot be recorded in etcd: no")),
    ],
)
async def test_what_cannot_be_published_is_no_copy(
    pod: FakePod, publication: verdicts.Publication, answer: Outcome
) -> None:
    pod.claims.publications["m"] = publication
    assert await pod.load("m", 10) == answer
    await pod.nothing_left("m")


async def test_a_server_that_dies_while_the_copy_is_published(pod: FakePod) -> None:
    async def publish(model_id: str, *more: object) -> verdicts.Publication:
        pod.server.why_down = "the model server was killed"
        pod.ledger.remove(pod.entry("m"))
        return verdicts.Published(ModelRecord("t"))

    pod.claims.publish = publish  # type: ignore[method-assign, assignment]
    outcome = await pod.load("m", 10)
    assert outcome == Refused(Reason.UNAVAILABLE, "the model server was killed")
    assert "m" not in pod.keys.keys


async def test_an_unreadable_record_is_left_alone(pod: FakePod) -> None:
    """If a model's record cannot be parsed, a load proceeds without recording or comparing its content."""
    pod.claims.verdicts["m"] = verdicts.Claimed(ModelRecord(""), {}, 0)
    pod.claims.publications["m"] = verdicts.Away("must not be asked")
    assert isinstance(await pod.load("m", 10), Loaded)


# -- another content, by a reload


async def test_a_reload_loads_beside_and_then_takes_the_place(pod: FakePod) -> None:
    """A reload unloads the old copy only once the new one can answer, and leaves nothing of the old copy."""
    await pod.fill("m", size=10)
    reloaded(pod)
    outcome = await reload(pod, 20)
    assert isinstance(outcome, Loaded)
    assert (outcome.generation, outcome.digest) == (1, "two")
    assert pod.server.told["m"]["mesh-copy"] == "life.1.1"
    await until(lambda: pod.ledger.aside_of("m") is None, why="the old copy is gone")
    assert pod.server.asked == [("load", "m"), ("load", "m"), ("unload", "m")]
    assert (pod.keys.keys["m"].generation, pod.keys.keys["m"].digest) == (1, "two")
    assert pod.claims.records["m"].digest == "two"
    assert pod.ledger.committed.host_bytes == pod.ledger.physical.host_bytes == 20
    assert "m" in pod.files.present
    assert pod.resident == {"m"}


async def test_while_a_reload_is_under_way_the_old_copy_is_the_copy(pod: FakePod) -> None:
    """During a reload, a request for any copy is answered at once with the old one. A request for the new copy joins
    the reload."""
    await pod.fill("m", size=10)
    reloaded(pod)
    go = pod.server.hold("load", "m")
    one, two = asyncio.create_task(reload(pod)), asyncio.create_task(reload(pod))
    await until(lambda: len(pod.server.asked) == 2, why="the new content is being loaded")
    assert await pod.load("m", 10) == Loaded(Footprint(10), 0, 0, "one")
    assert pod.keys.keys["m"].generation == 0
    assert pod.entry("m").state is EntryState.LOADED
    go.set()
    assert {outcome.generation for outcome in await asyncio.gather(one, two) if isinstance(outcome, Loaded)} == {1}
    assert [what for what, _ in pod.server.asked].count("load") == 2


@pytest.mark.parametrize("how", ["load", "publish", "contradicted", "pull"])
async def test_a_reload_that_fails_leaves_the_old_copy_as_it_was(pod: FakePod, how: str) -> None:
    """A failed reload frees the memory of the new copy. The old copy keeps its key, its files and its memory."""
    await pod.fill("m", size=10)
    before = pod.keys.keys["m"]
    reloaded(pod)
    if how == "load":
        pod.server.failures["/m/10"] = (grpc.StatusCode.INVALID_ARGUMENT, "this is no model")
    elif how == "publish":
        pod.claims.publications["m"] = verdicts.Away("etcd is away")
    elif how == "contradicted":
        pod.claims.records["m"] = replace(pod.claims.records["m"], digest="three", digest_ms=1)
    else:
        pod.files.errors["/m/10"] = PullError(PullErrorKind.NOT_FOUND, "no such file")
    outcome = await reload(pod)
    assert isinstance(outcome, Failed | Refused)
    await until(lambda: pod.ledger.aside_of("m") is None, why="nothing of the new copy is left")
    assert pod.keys.keys["m"] == before
    assert pod.resident == {"m"}
    assert pod.ledger.committed.host_bytes == pod.ledger.physical.host_bytes == 10
    assert "m" in pod.files.present


async def test_a_reload_makes_room_and_never_takes_the_old_copys(pod: FakePod) -> None:
    """A reload may evict other copies, but not the old copy. If it lacks room, it is refused, and the old copy
    stays."""
    await pod.fill("m", size=400_000)
    await pod.fill("other", size=500_000)
    reloaded(pod)
    assert isinstance(await reload(pod, 400_000), Loaded)
    await until(lambda: pod.ledger.aside_of("m") is None, why="the old copy is gone")
    assert pod.resident == {"m"}
    reloaded(pod, "three")
    outcome = await reload(pod, 700_000, generation=2)
    assert isinstance(outcome, Refused)
    assert outcome.reason is Reason.NO_ROOM
    assert pod.resident == {"m"}
    assert pod.keys.keys["m"].generation == 1


@pytest.mark.parametrize("when", ["while the new one loads", "while the old one goes"])
async def test_unregistered_in_the_middle_of_a_reload(pod: FakePod, when: str) -> None:
    """Unregistering a model during its reload removes both copies."""
    await pod.fill("m", size=10)
    reloaded(pod)
    if when == "while the new one loads":
        pod.server.hold("load", "m")
        load = asyncio.create_task(reload(pod))
        await until(lambda: len(pod.server.asked) == 2, why="the new content is being loaded")
        assert await pod.loads.withdraw("m", 1, "unregistered")
        await load
    else:
        held = pod.server.hold("unload", "m")
        await reload(pod)
        await pod.asked("unload", "m")
        withdrawal = asyncio.create_task(pod.loads.withdraw("m", 1, "unregistered"))
        held.set()
        assert await withdrawal
    await until(lambda: not pod.ledger.entries, why="nothing is left on the books")
    assert not pod.server.models
    assert "m" not in pod.keys.keys
    await until(lambda: "m" not in pod.files.present, why="the model's files are gone")
    assert pod.ledger.committed.host_bytes == pod.ledger.physical.host_bytes == 0


async def test_the_old_copy_is_evicted_while_the_new_one_loads(pod: FakePod) -> None:
    """If the old copy is evicted during a reload, the reload writes the deleted key again, and keeps the files."""
    await pod.fill("m", size=10)
    reloaded(pod)
    go = pod.server.hold("load", "m")
    load = asyncio.create_task(reload(pod))
    await until(lambda: len(pod.server.asked) == 2, why="the new content is being loaded")
    pod.cache.eviction.evict(pod.entry("m"), "makes way")
    await until(lambda: "m" not in pod.ledger.entries, why="the old copy is gone")
    assert "m" not in pod.keys.keys
    go.set()
    assert isinstance(await load, Loaded)
    assert pod.keys.keys["m"].generation == 1
    assert pod.resident == {"m"}
    assert "m" in pod.files.present
    assert pod.ledger.physical.host_bytes == 10


@pytest.mark.parametrize("key", ["stays", "goes again"])
async def test_a_key_is_claimed_again_where_the_old_copy_took_it_along(pod: FakePod, key: str) -> None:
    """The eviction of the old copy deleted the key, so the id may have been registered again. The new copy therefore
    writes the key in a transaction, although its content is already recorded. If the key disappears once more, the load
    is refused."""
    await pod.fill("m", size=10)
    reloaded(pod)
    pod.claims.records["m"] = replace(pod.claims.records["m"], digest=pod.files.digests["/m/10"])
    go = pod.server.hold("load", "m")
    load = asyncio.create_task(reload(pod))
    await until(lambda: len(pod.server.asked) == 2, why="the new content is being loaded")
    pod.cache.eviction.evict(pod.entry("m"), "makes way")
    await until(lambda: "m" not in pod.keys.keys, why="the old copy's key is deleted")
    published: list[str] = []
    publish = pod.claims.publish

    async def publishing(model_id: str, *arguments: object) -> object:
        published.append(model_id)
        outcome = await publish(model_id, *arguments)  # type: ignore[arg-type]
        if key == "goes again":
            pod.keys.drop(model_id)
        return outcome

    pod.claims.publish = publishing  # type: ignore[method-assign,assignment]
    go.set()
    outcome = await load
    assert published == ["m"]
    if key == "stays":
        assert isinstance(outcome, Loaded)
        assert pod.keys.keys["m"].generation == 1
    else:
        assert isinstance(outcome, Refused)
        await until(lambda: not pod.ledger.entries, why="the ledger is empty")
        assert "m" not in pod.keys.keys


async def test_reloaded_again_while_the_first_copy_is_still_going(pod: FakePod) -> None:
    """A second reload is refused until the old copy of the first one is gone, so a pod never holds three copies of a
    model."""
    await pod.fill("m", size=10)
    reloaded(pod)
    held = pod.server.hold("unload", "m")
    await reload(pod)
    await pod.asked("unload", "m")
    reloaded(pod, "three")
    outcome = await reload(pod, generation=2)
    assert isinstance(outcome, Refused)
    assert outcome.reason is Reason.UNAVAILABLE
    held.set()
    await until(lambda: pod.ledger.aside_of("m") is None, why="the first copy is gone")
    outcome = await reload(pod, generation=2)
    assert isinstance(outcome, Loaded)
    assert (outcome.generation, outcome.digest) == (2, "three")


async def test_a_generation_that_the_registry_does_not_have(pod: FakePod) -> None:
    """A request for a generation that the record does not have is answered as stale, and the copy stays."""
    await pod.fill("m", size=10)
    assert await reload(pod, generation=5) == Stale()
    assert pod.resident == {"m"}
    assert pod.keys.keys["m"].generation == 0


async def test_a_first_load_is_of_the_generation_that_the_registry_has(pod: FakePod) -> None:
    """A first load gets the record's current generation, even if the router knew an older one."""
    pod.claims.records["m"] = ModelRecord("t", generation=3)
    outcome = await pod.load("m", 10)
    assert isinstance(outcome, Loaded)
    assert outcome.generation == 3
    assert pod.server.told["m"]["mesh-copy"] == "life.1.3"


async def test_a_server_that_dies_during_a_reload(pod: FakePod) -> None:
    """A reload whose server dies is refused, and nothing of the model stays in the ledger or in etcd."""
    await pod.fill("m", size=10)
    reloaded(pod)
    pod.server.hold("load", "m")
    load = asyncio.create_task(reload(pod))
    await until(lambda: len(pod.server.asked) == 2, why="the new content is being loaded")
    pod.server.why_down = "the model server was killed by SIGSEGV"
    for entry in list(pod.ledger.entries.values()):
        pod.ledger.remove(entry)
    pod.keys.drop("m")
    pod.server.lives += 1
    assert pod.server.server is not None
    await pod.server.server.stop(None)
    assert isinstance(await load, Refused)
    assert not pod.ledger.entries
    assert pod.ledger.physical.host_bytes == 0
    assert "m" not in pod.keys.keys
