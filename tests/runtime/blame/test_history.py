"""Writes to models' records, in a real etcd."""

import os
from collections.abc import AsyncIterator

import pytest

from mesh.etcd import Etcd
from mesh.runtime.blame.history import FAILURE_EXPIRY_MS, History, Took
from mesh.schema.keys import Keys
from mesh.schema.records import Failure, ModelRecord
from placement import blame
from placement.failures import FailureKind
from placement.footprint import Footprint
from tests.support.waiting import until

NOW = 1_800_000_000_000


class Records:
    """The record of one model, and the history that the pod writes to it."""

    def __init__(self, etcd: Etcd, keys: Keys) -> None:
        self.etcd, self.keys, self.key = etcd, keys, keys.model("m")
        self.history = History(etcd, keys, pod="pod-1", clock_ms=lambda: NOW)
        self.revision = 0

    async def put(self, **fields: object) -> ModelRecord:
        record = ModelRecord(type="t", **fields)  # type: ignore[arg-type]
        self.revision = await self.etcd.put(self.key, record.encode())
        return record

    async def get(self) -> ModelRecord:
        kv = await self.etcd.get(self.key)
        assert kv is not None
        return ModelRecord.decode(kv.value)

    async def settled(self) -> None:
        await until(lambda: not self.history.statistics().pending, why="all is written")


@pytest.fixture
async def records(etcd: Etcd, keys: Keys) -> AsyncIterator[Records]:
    records = Records(etcd, keys)
    yield records
    await records.history.close()


async def test_a_measured_size_is_remembered(records: Records) -> None:
    """Everything that others wrote to the record stays, even attributes that Mesh does not know."""
    known = await records.put(path="/x", other={"theirs": 1})
    records.history.loaded("m", records.revision, known, Took(Footprint(500, 7), 30))
    await records.settled()
    now = await records.get()
    assert (now.host_bytes, now.device_bytes, now.load_ms, now.path) == (500, 7, 30, "/x")
    assert dict(now.other) == {"theirs": 1}


async def test_what_is_no_news_is_not_written(records: Records) -> None:
    """A size that differs from the recorded one by 5 % is not written, nor a load time that differs by 40 %. A size
    that differs by 20 % is."""
    known = await records.put(host_bytes=1000, load_ms=200)
    records.history.loaded("m", records.revision, known, Took(Footprint(1050, 0), 280))
    assert not records.history.statistics().pending
    records.history.loaded("m", records.revision, known, Took(Footprint(1200, 0), 200))
    await records.settled()
    assert (await records.get()).host_bytes == 1200


async def test_a_failure_is_recorded_and_a_success_takes_it_away(records: Records) -> None:
    """A pod records its failure to load a model and removes it after its next success. Failures of other pods stay
    until they expire."""
    theirs, old = Failure("pod-2", NOW - 5, "no"), Failure("pod-3", NOW - FAILURE_EXPIRY_MS - 1, "old")
    await records.put(failures=(theirs, old))
    await records.history.failed("m", records.revision, "it is no model", FailureKind.LASTING)
    failed = await records.get()
    assert failed.failures == (Failure("pod-1", NOW, "it is no model", since_ms=NOW - 5), theirs)
    records.history.loaded("m", records.revision, failed, Took(Footprint(1, 0), 1))
    await records.settled()
    assert (await records.get()).failures == (theirs,)


async def test_a_failure_says_of_what_kind_it_is_and_since_when(records: Records) -> None:
    """A recorded failure also contains the digest of the files and the version of the storage secret. It continues the
    series that a failure of another pod began."""
    first = Failure("pod-2", NOW - 20_000, "no", FailureKind.PASSING)
    await records.put(failures=(first,))
    records.history = History(records.etcd, records.keys, pod="pod-1", secrets=lambda: "v1", clock_ms=lambda: NOW)
    await records.history.failed("m", records.revision, "line 3", FailureKind.CONTENT, asked_ms=5000, digest="abc")
    record = await records.get()
    expected = Failure("pod-1", NOW, "line 3", FailureKind.CONTENT, NOW - 20_000, 5000, "abc", "v1")
    assert record.failures == (expected, first)
    assert records.history.known(record) == expected


async def test_deaths_in_two_pods_are_a_quarantine(records: Records) -> None:
    """A model that was blamed for server deaths in two pods is quarantined. Recording a load failure afterwards does
    not erase a death."""
    await records.put()
    for number in range(2):
        records.history = History(records.etcd, records.keys, pod=f"pod-{number}", clock_ms=lambda: NOW)
        records.history.killed("m", records.revision, f"server {number} died")
        await records.history.failed("m", records.revision, "died", FailureKind.LASTING)
        assert len((await records.get()).killed) == number + 1
    record = await records.get()
    assert record.quarantined
    assert "pod-0: server 0 died" in record.quarantine("m")
    assert "server 1 died" in record.quarantine("m")


async def test_deaths_that_others_may_have_caused_expire(records: Records) -> None:
    """Repeated deaths in a single pod do not quarantine a model, because another model may have caused them. The
    evidence expires after an hour."""
    await records.put()
    for number in range(3):
        records.history.killed("m", records.revision, f"server {number} died")
        await records.settled()
    record = await records.get()
    assert (len(record.killed), record.quarantined) == (3, False)
    records.history = History(records.etcd, records.keys, pod="pod-2", clock_ms=lambda: NOW + blame.EXPIRY_MS)
    records.history.killed("m", records.revision, "another server died")
    await records.settled()
    record = await records.get()
    assert len(record.killed) == len(record.blames) == 1
    assert not record.quarantined


async def test_calls_that_kill_are_refused_and_only_three_different_ones_are_a_quarantine(records: Records) -> None:
    await records.put()
    for digest, guilty in (("aa", False), ("aa", False), ("bb", False), ("cc", True)):
        records.history.killed(
            "m", records.revision, f"died of {digest} {os.urandom(2).hex()}", sure=True, digests=(digest,)
        )
        await records.settled()
        record = await records.get()
        assert record.quarantined is guilty
        assert digest in record.refuses(NOW)
        assert not record.refuses(NOW + blame.REFUSED_MS)
    assert not record.absolved().quarantined


async def test_the_record_of_another_registration_is_left_alone(records: Records) -> None:
    """Nothing is written if the id has been unregistered, or registered again, in the meantime."""
    await records.put(path="/old")
    former = records.revision
    await records.etcd.delete(records.key)
    await records.put(path="/new")
    await records.history.failed("m", former, "the old one is no model", FailureKind.LASTING)
    records.history.killed("m", former, "died")
    await records.settled()
    now = await records.get()
    assert (now.path, now.failures, now.killed) == ("/new", (), ())
    await records.etcd.delete(records.key)
    await records.history.failed("m", former, "gone", FailureKind.LASTING)
    assert await records.etcd.get(records.key) is None


async def test_a_record_that_cannot_be_read_is_left_alone(records: Records) -> None:
    revision = await records.etcd.put(records.key, b"not JSON")
    await records.history.failed("m", revision, "no", FailureKind.LASTING)
    kv = await records.etcd.get(records.key)
    assert kv is not None
    assert kv.value == b"not JSON"
