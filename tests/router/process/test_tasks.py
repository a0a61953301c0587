"""Tasks that a process cannot do without die aloud, in routers and agents alike."""

import asyncio

import pytest

from mesh.runtime.tasks import Tasks as AgentTasks
from router.tasks import Tasks as RouterTasks
from tests.support.waiting import until


async def fails():
    raise KeyError("pod-1")


async def ends():
    pass


async def stays():
    await asyncio.Event().wait()


@pytest.mark.parametrize("tasks", [RouterTasks, AgentTasks])
@pytest.mark.parametrize(
    ("work", "says"), [(fails, "failed: KeyError: 'pod-1'"), (ends, "ended")], ids=["fails", "ends"]
)
async def test_the_end_of_an_essential_task_is_told_with_its_reason(tasks, work, says):
    lost = []
    held = tasks(lost.append)
    held.essential(work(), "follow etcd")
    await until(lambda: lost)
    assert lost == [f"follow etcd, which this process cannot do without, {says}"]
    await held.close()
    assert len(lost) == 1


@pytest.mark.parametrize("tasks", [RouterTasks, AgentTasks])
async def test_closing_ends_them_in_silence(tasks):
    lost = []
    held = tasks(lost.append)
    held.essential(stays(), "follow etcd")
    await held.close()
    assert not lost
    assert len(held) == 0
