"""Reads of records, which are shared but never wrong about a missing record."""

import asyncio
from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from mesh.statuses import MeshError, Reason
from tests.support.waiting import until


async def test_a_hundred_readers_share_one_read_of_what_exists(core):
    core.register()
    core.etcd.gate.clear()
    readers = [asyncio.create_task(core.registry.read("m")) for _ in range(100)]
    await until(lambda: core.etcd.reads == 1)
    core.etcd.gate.set()
    found = await asyncio.gather(*readers)
    assert {registration.created for registration in found} == {7}
    assert core.etcd.reads == 1
    assert core.registry.remembered("m") == found[0]


async def test_missing_is_only_believed_of_a_read_that_began_after_the_question(core):
    """A record counts as missing only if its read began after the question. A model that is registered during a read is
    found by every question that is asked after the registration returned."""
    core.etcd.gate.clear()
    early = asyncio.create_task(core.registry.read("m"))
    await until(lambda: core.etcd.reads == 1)
    core.register()
    late = [asyncio.create_task(core.registry.read("m")) for _ in range(10)]
    await asyncio.sleep(0)
    core.etcd.gate.set()
    assert await early is None
    assert {found.created for found in await asyncio.gather(*late)} == {7}
    assert core.etcd.reads == 2, "the late readers share one more read"


async def test_a_read_brings_the_vmodel_of_the_same_name_along(core):
    """One read of etcd looks for a model and for a vmodel of the same name. When the model is found to be missing, the
    vmodel is already known."""
    core.alias("m", "n", feed=False)
    assert await core.registry.read("m") is None
    assert core.etcd.reads == 1
    assert core.vmodels.get("m").active == "n"


async def test_a_vmodel_that_cannot_be_read_does_not_hide_a_model(core):
    """If the record of a vmodel cannot be read, that is logged, and the model of the same name is found."""
    core.register()
    core.alias("m", "n", feed=False)
    key = core.world.keys.vmodel("m")
    core.etcd.records[key] = replace(core.etcd.records[key], value=b"{")
    with capture_logs() as lines:
        assert (await core.registry.read("m")).created == 7
    assert [line["vmodel"] for line in lines] == ["m"]


async def test_a_fresh_read_does_not_believe_an_earlier_one_at_all(core):
    core.register(created=7)
    core.etcd.gate.clear()
    early = asyncio.create_task(core.registry.read("m"))
    await until(lambda: core.etcd.reads == 1)
    core.register(created=8)
    late = asyncio.create_task(core.registry.read("m", fresh=True))
    await asyncio.sleep(0)
    core.etcd.gate.set()
    assert (await early).created == 7
    assert (await late).created == 8


async def test_an_earlier_read_that_fails_is_not_the_answer_of_a_later_question(core):
    core.register()
    core.etcd.away = True
    core.etcd.gate.clear()
    early = asyncio.create_task(core.registry.read("m"))
    await until(lambda: core.etcd.reads == 1)
    late = asyncio.create_task(core.registry.read("m"))
    await asyncio.sleep(0)
    core.etcd.gate.set()
    with pytest.raises(MeshError) as error:
        await early
    assert error.value.reason is Reason.REGISTRY_AWAY
    core.etcd.away = False
    assert (await late).created == 7


async def test_a_read_that_fails_is_told_to_its_readers_and_not_to_the_log(core):
    """A failed read is reported to its readers and not logged. While etcd is unavailable each cold call reads, and
    tracebacks would fill the log."""
    core.etcd.away = True
    with capture_logs() as lines, pytest.raises(MeshError):
        await core.registry.read("m")
    await asyncio.sleep(0)
    assert lines == []


async def test_a_reader_that_leaves_does_not_take_the_others_along(core):
    core.register()
    core.etcd.gate.clear()
    first, second = (asyncio.create_task(core.registry.read("m")) for _ in range(2))
    await until(lambda: core.etcd.reads == 1)
    first.cancel()
    await asyncio.sleep(0)
    core.etcd.gate.set()
    assert (await second).created == 7


async def test_what_is_missing_is_not_remembered(core):
    core.register()
    assert await core.registry.read("m") is not None
    core.unregister()
    assert await core.registry.read("m") is None
    assert core.registry.remembered("m") is None
    assert await core.registry.read("m") is None
    assert core.etcd.reads == 3


async def test_a_record_that_cannot_be_read_says_so(core):
    core.register()
    key = core.world.keys.model("m")
    object.__setattr__(core.etcd.records[key], "value", b"nonsense")
    with pytest.raises(MeshError, match="record of model m cannot be read"):
        await core.registry.read("m")


async def test_a_read_that_has_just_ended_is_not_joined(core):
    """A caller that comes between the end of a read and its removal does not join that read, but begins another one."""
    core.etcd.gate.clear()
    early = asyncio.create_task(core.registry.read("m"))
    await until(lambda: core.etcd.reads == 1)
    core.etcd.gate.set()
    late = asyncio.create_task(core.registry.read("m"))
    assert await asyncio.gather(early, late) == [None, None]
    assert core.etcd.reads == 2
