"""Permission to answer calls, as the board shows it while leases, etcd and clocks fail."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesh.etcd import EtcdUnavailable
from mesh.runtime.presence.fence import Fence
from mesh.runtime.sharedmemory.board import MODE_BITS, Board
from placement.fence import SECOND, Mode
from tests.support.waiting import until

TTL = 10


class World:
    """The state of a pod as the fence sees it, set by the test, with a clock that the test moves."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self.now = 500 * SECOND
        self.proof_ns: int | None = None
        self.keyed = False
        self.etcd = True
        self.asked = 0

    def fence(self, *, serve_without_etcd: float | None = None) -> Fence:
        return Fence(
            self.board,
            self,
            ttl=TTL,
            serve_without_etcd=serve_without_etcd,
            reach=self._reach,
            clock=lambda: self.now,
        )

    async def _reach(self, timeout: float) -> None:
        self.asked += 1
        if not self.etcd:
            raise EtcdUnavailable("away")

    def renew(self) -> None:
        self.proof_ns = self.now

    def sleep(self, seconds: float) -> None:
        self.now += int(seconds * SECOND)

    @property
    def mode(self) -> Mode:
        """Returns the permission that the board shows now."""
        word = self.board.fence
        return Mode(word & MODE_BITS) if word & ~MODE_BITS > self.now else Mode.CLOSED


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    board = Board.create(tmp_path / "board", 4)
    yield World(board)
    board.close()


async def settled(world: World, fence: Fence, asked: int) -> None:
    """Lets the fence look, waits until it has asked etcd, and lets it look again."""
    fence.look()
    await until(lambda: world.asked >= asked, interval=0.001, why="etcd is asked")
    await asyncio.sleep(0)
    fence.look()


async def test_a_pod_that_was_never_published_answers_nothing(world):
    """The board forbids answers even before the agent has looked for the first time."""
    assert world.mode is Mode.CLOSED
    fence = world.fence()
    fence.look()
    assert world.mode is Mode.CLOSED


async def test_a_lease_that_is_renewed_proves_and_one_that_is_not_lets_routers_vouch(world):
    """A pod proves its own permission while its lease is renewed. If etcd becomes unavailable, the fence switches to
    grace mode without being closed in between."""
    fence = world.fence()
    world.keyed = True
    for second in range(60):
        if second % 3 == 0:
            world.renew()
        fence.look()
        assert world.mode is Mode.PROVEN
        world.sleep(1)
    world.etcd = False
    for second in range(120):
        fence.look()
        assert world.mode in (Mode.PROVEN if second < 8 else Mode.GRACE, Mode.GRACE)
        if second == 9:
            world.proof_ns, world.keyed = None, False  # the lease counts as lost
        await asyncio.sleep(0)
        world.sleep(1)
    assert fence._permission.mode is Mode.GRACE


async def test_an_agent_that_was_stopped_does_not_take_etcds_absence_for_granted(world):
    """After a pause, an agent requires that routers have read the record, because the pod's keys may be gone. It serves
    without this proof only once it has found that etcd is unavailable."""
    fence = world.fence()
    world.keyed = True
    world.renew()
    fence.look()
    world.sleep(300)
    assert world.mode is Mode.CLOSED
    fence.look()
    assert world.mode is Mode.VERIFIED
    await settled(world, fence, 1)
    assert world.mode is Mode.VERIFIED
    world.sleep(1)
    world.etcd = False
    await settled(world, fence, 2)
    assert world.mode is Mode.GRACE


async def test_a_pod_that_returns_is_proven_once_every_copy_has_its_key(world):
    fence = world.fence()
    world.keyed = True
    world.renew()
    fence.look()
    world.keyed, world.proof_ns, world.etcd = False, None, False
    await settled(world, fence, 1)
    assert world.mode is Mode.GRACE
    world.sleep(2)
    world.etcd = True
    await settled(world, fence, 2)
    assert world.mode is Mode.VERIFIED
    world.renew()
    fence.look()
    assert world.mode is Mode.VERIFIED, "the lease lives, but the copies have no keys"
    world.keyed = True
    fence.look()
    assert world.mode is Mode.PROVEN


async def test_serving_without_etcd_is_bounded_where_asked(world):
    fence = world.fence(serve_without_etcd=30)
    world.keyed, world.etcd = True, False
    world.renew()
    fence.look()
    world.keyed, world.proof_ns = False, None
    for _ in range(29):
        world.sleep(1)
        fence.look()
        assert world.mode is not Mode.CLOSED
        await asyncio.sleep(0)
    world.sleep(1)
    assert world.mode is Mode.CLOSED
    fence.look()
    assert world.mode is Mode.CLOSED
    world.keyed, world.etcd = True, True
    world.renew()
    fence.look()
    assert world.mode is Mode.PROVEN, "the pod serves again once etcd is back"


async def test_a_fence_that_is_closed_stays_closed(world):
    """The keys of a draining pod are about to be deleted, so a closed fence does not open again."""
    fence = world.fence()
    world.keyed = True
    world.renew()
    fence.look()
    fence.close()
    assert world.mode is Mode.CLOSED
    fence.look()
    fence.wake()
    assert world.mode is Mode.CLOSED


async def test_etcd_is_not_asked_more_than_once_a_second(world):
    """The fence looks ten times a second for ten seconds, and asks etcd at most eleven times."""
    fence = world.fence()
    world.etcd, world.keyed = False, True
    world.renew()
    fence.look()
    world.proof_ns = None
    for _ in range(100):
        world.sleep(0.1)
        fence.look()
        await asyncio.sleep(0)
    assert 5 <= world.asked <= 11


async def test_a_question_that_a_pause_has_failed_tells_nothing(tmp_path):
    """A question to etcd that timed out because the agent was paused does not show that etcd is unavailable."""
    board = Board.create(tmp_path / "board", 4)
    world = World(board)
    answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def reach(timeout: float) -> None:
        world.asked += 1
        if world.asked == 1:
            await answer

    fence = Fence(board, world, ttl=TTL, serve_without_etcd=None, reach=reach, clock=lambda: world.now)
    world.keyed = True
    world.renew()
    fence.look()
    world.sleep(5.5)
    fence.look()
    await until(lambda: world.asked == 1, interval=0.001, why="etcd is asked")
    world.sleep(300)
    world.keyed, world.proof_ns = False, None
    fence.look()
    if not answer.done():
        answer.set_exception(EtcdUnavailable("timed out"))
    for _ in range(3):
        await asyncio.sleep(0)
        fence.look()
        assert world.mode is Mode.VERIFIED
    board.close()


async def test_a_lease_that_etcd_has_ended_does_not_make_etcd_away(world):
    """If etcd has ended the lease, etcd is available, so routers must read the record first. While the renewal was
    merely late, calls did not have to wait."""
    fence = world.fence()
    world.keyed = True
    world.renew()
    fence.look()
    world.etcd = False
    for _ in range(6):
        world.sleep(1)
        fence.look()
    assert world.mode is Mode.GRACE, "the question has not been answered yet"
    world.proof_ns, world.keyed, world.etcd = None, False, True
    fence.look()
    assert world.mode is Mode.VERIFIED
    await settled(world, fence, 1)
    assert world.mode is Mode.VERIFIED


async def test_a_pod_says_why_it_is_silent(world):
    """A pod gives a reason only while it may not answer. If its permission ran out during a pause, the fence is checked
    again first."""
    fence = world.fence(serve_without_etcd=20)
    assert "published" in fence.why_silent()
    world.renew()
    world.keyed = True
    fence.look()
    assert fence.why_silent() == ""
    world.sleep(3)
    world.renew()
    world.sleep(1)
    assert fence.why_silent() == ""
    world.sleep(TTL)  # this process paused, and etcd has answered nothing meanwhile
    assert fence.why_silent() == "", "the pod may serve without etcd for a while"
    world.sleep(2 * TTL)
    assert "longer than this pod may serve" in fence.why_silent()
    fence.close()
    assert "is leaving" in fence.why_silent()
