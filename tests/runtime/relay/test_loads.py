"""Loads at a foreign server that do not end."""

import asyncio
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from mesh.pb import modelruntime_pb2 as pb
from mesh.process.tasks import Tasks
from mesh.runtime.port.outcomes import HUNG
from mesh.runtime.port.spi import STUCK
from mesh.runtime.relay.link import Link
from mesh.runtime.relay.spi import RelaySpi
from mesh.statuses import MeshError, Reason
from tests.support.waiting import until


class Blocked:
    """The control of a server whose loads exceed their time limit. If the server is stuck, all other requests do so
    too."""

    former = False

    def __init__(self, *, stuck: bool, fails: Exception | None = None) -> None:
        self.stuck = stuck
        self.fails = fails or _late()
        self.unloads: list[str] = []
        self.asked: list[float | None] = []

    async def load(self, request: Any, *, timeout: float | None) -> Any:
        """Raises `fails`, by default the error of a call whose deadline has passed."""
        raise self.fails

    async def size(self, request: Any, *, timeout: float | None) -> Any:
        """Answers, unless the server is stuck."""
        self.asked.append(timeout)
        if self.stuck:
            raise _late()
        return pb.ModelSizeResponse(), ()

    async def unload(self, request: Any, *, timeout: float | None) -> None:
        """Answers, unless the server is stuck."""
        self.unloads.append(request.modelId)
        if self.stuck:
            raise _late()


def _late() -> grpc.aio.AioRpcError:
    code, nothing = grpc.StatusCode.DEADLINE_EXCEEDED, grpc.aio.Metadata()
    return grpc.aio.AioRpcError(code, nothing, nothing, details="Deadline Exceeded")


def _spi(control: Blocked) -> tuple[RelaySpi, Link]:
    holding: Any = SimpleNamespace(ids=list, lost=lambda *_: None)
    link = Link("unix:/nowhere", holding, hang_timeout=1.0, max_message=1 << 20, managed=lambda channel: control)  # type: ignore[arg-type, return-value]
    settings: Any = SimpleNamespace(load_timeout=1.0)
    nothing: Any = None
    tasks = Tasks(lambda why: None)
    return RelaySpi(settings, link, nothing, nothing, tasks, data_address="", pid=0), link


@pytest.mark.parametrize("by", ["the server's call", "the adapter"])
async def test_a_load_that_was_ended_is_unloaded(by: str) -> None:
    """A server that answers again after the time limit of a load stays in use, whether the adapter or gRPC ended the
    load. The model is unloaded."""
    own = MeshError(Reason.DEADLINE, "the load took longer than 1 s and was ended")
    control = Blocked(stuck=False, fails=own if by == "the adapter" else None)
    spi, link = _spi(control)
    with pytest.raises(MeshError, match="took longer than 1 s and was ended"):
        await spi._load(pb.LoadModelRequest(modelId="m"))
    assert control.unloads == ["m"]
    assert not link.ended.done()
    assert not spi.blocked
    await link.close()


@pytest.mark.parametrize("stuck", [True, False])
async def test_a_load_that_is_cancelled_may_have_blocked_the_server(stuck: bool) -> None:
    """After an agent has cancelled a load, the server must answer once the load's time limit has passed."""
    control = Blocked(stuck=stuck, fails=asyncio.CancelledError())  # type: ignore[arg-type]
    spi, link = _spi(control)
    with pytest.raises(asyncio.CancelledError):
        await spi._load(pb.LoadModelRequest(modelId="m"))
    await until(lambda: control.asked, why="the server is asked")
    (within,) = control.asked
    assert within == pytest.approx(11.0, abs=1.0)
    if stuck:
        await until(link.ended.done, why="the server is given up")
    assert spi.blocked == stuck
    await spi._tasks.close()
    assert link.ended.done() == stuck
    await link.close()


async def test_a_server_that_is_stuck_in_a_load_counts_as_hung() -> None:
    """A server that does not even answer the unload is given up. The agent learns first that this model blocks it."""
    spi, link = _spi(Blocked(stuck=True))
    with pytest.raises(MeshError, match="after a load that was ended") as error:
        await spi._load(pb.LoadModelRequest(modelId="m"))
    assert STUCK in error.value.details
    assert spi.blocked, "the calls in flight are not to blame"
    assert not link.ended.done()
    await until(link.ended.done, why="the server is given up")
    assert link.ended.result() == HUNG
    await link.close()
