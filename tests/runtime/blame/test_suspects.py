"""The models at work in a server when it died."""

import threading
from collections.abc import AsyncIterator

import pytest

from mesh.runtime.blame.suspects import behind_a_relay, work
from mesh.runtime.sharedmemory.board import Board
from mesh.runtime.sharedmemory.slot import SlotState as SlotState
from mesh.runtime.sharedmemory.slot import Use
from mesh.wire import requestdigest
from placement.blame import UNKNOWN
from placement.suspects import Work, WorkKind
from tests.runtime.pod_of_fakes import FakePod


@pytest.fixture
async def pod() -> AsyncIterator[FakePod]:
    async with FakePod() as running:
        yield running


async def test_who_was_at_work_when_the_server_died(pod: FakePod) -> None:
    """Threads and the event loop of the server note their work, with the digest of the request if there is one.
    Unloads, and runs without a note, are found by the state of their slots. Queued and idle models are not reported."""
    board = Board.private(64)
    await pod.fill("idle", "queued", "running", "loading", "freeing", "looping", size=10)
    states = {
        "idle": Use(SlotState.LOADED, 1, 0, 0, 0, 9, 0, 0),
        "queued": Use(SlotState.LOADED, 1, 5, 0, 0, 9, 0, 0),
        "running": Use(SlotState.LOADED, 1, 2, 1, 0, 9, 0, 0),
        "loading": Use(SlotState.LOADING, 1, 0, 0, 0, 0, 0, 0),
        "freeing": Use(SlotState.UNLOADING, 1, 0, 0, 0, 9, 0, 0),
        "looping": Use(SlotState.LOADED, 1, 2, 2, 0, 9, 0, 0),
    }
    for name, use in states.items():
        slot = pod.entry(name).slot
        assert slot is not None
        pod.board.uses[slot] = use

    def at_work() -> list[Work[str]]:
        entries = pod.ledger.entries.values()
        held = [
            (one.model_id, one.slot, use) for one in entries if one.slot is not None and (use := pod.ledger.use(one))
        ]
        return work(held, board.at_work)

    frame = b"\0\0\0\0\0"
    digest = requestdigest.digest(frame).hex()
    me = threading.get_ident()
    board.attach(1)
    for name in ("running", "looping"):
        board.at_work.begin(pod.entry(name).slot or 0, frame)
    board.at_work.begin(pod.entry("loading").slot or 0)
    board.at_work.inline(frame)
    assert at_work() == [
        Work("running", WorkKind.RUNNING, me, digest=digest),
        Work("loading", WorkKind.LOADING, me),
        Work("freeing", WorkKind.FREEING),
        Work("looping", WorkKind.RUNNING, me, digest=digest),
        Work("looping", WorkKind.RUNNING, me, in_loop=True, digest=digest),
    ]
    slot = pod.entry("idle").slot
    assert slot is not None
    pod.board.uses[slot] = Use(SlotState.LOADED, 1, 2, 1, 0, 9, 0, 0)  # a run that no thread has noted
    assert [one.model for one in at_work() if not one.thread] == ["freeing", "idle", "looping"]
    board.close()


def test_a_relay_shows_calls_but_no_requests() -> None:
    """A foreign server has no threads on the board. What the board holds about the event loop is the relay's own, and
    says nothing about the server."""
    uses = [
        ("idle", Use(SlotState.LOADED, 1, 0, 0, 0, 9, 0, 0)),
        ("running", Use(SlotState.LOADED, 1, 2, 1, 0, 9, 0, 0)),
        ("loading", Use(SlotState.LOADING, 1, 0, 0, 0, 0, 0, 0)),
        ("freeing", Use(SlotState.UNLOADING, 1, 0, 0, 0, 9, 0, 0)),
    ]
    assert behind_a_relay(uses) == [
        Work("running", WorkKind.RUNNING, digest=UNKNOWN),
        Work("loading", WorkKind.LOADING),
        Work("freeing", WorkKind.FREEING),
    ]
