"""The use board: readers see what writers wrote, in another process and after the writer's death."""

import os
import subprocess
import sys

import pytest

from mesh.runtime.sharedmemory.board import BUCKETS_NS, Board
from mesh.runtime.sharedmemory.slot import SlotState, Use


@pytest.fixture
def board(tmp_path):
    made = Board.create(tmp_path / "board", 10, incarnation="agent-1")
    yield made
    made.close()


def test_a_fresh_board_is_empty(board):
    assert list(board.uses()) == []
    assert board.suspects() == []
    assert board.calls() == []
    assert (board.slots, board.pid, board.beat_ns, board.in_flight) == (10, 0, 0, 0)
    assert board.read(9) == Use(SlotState.FREE, 0, 0, 0, 0, 0, 0, 0)


def test_a_call_is_seen_from_its_beginning_to_its_end(board):
    """Each step of a call (its arrival, its run, its answer) is visible at once through a second mapping."""
    agent = Board.open(board.path)
    row = board.row(3)
    row.loading(77, 100)
    assert agent.read(3) == Use(SlotState.LOADING, 77, 0, 0, 100, 0, 0, 0)
    row.mark(SlotState.LOADED)
    row.begin(200)
    assert agent.read(3) == Use(SlotState.LOADED, 77, 1, 0, 200, 0, 0, 0)
    row.run()
    assert agent.read(3).running == 1
    assert agent.in_flight == 1
    row.begin(210, runs=1)
    assert agent.read(3) == Use(SlotState.LOADED, 77, 2, 2, 210, 0, 0, 0)
    row.end(300, runs=1, busy_ns=40, failed=False)
    row.end(310, runs=1, busy_ns=50, failed=True)
    assert agent.read(3) == Use(SlotState.LOADED, 77, 0, 0, 310, 2, 1, 90)
    assert [slot for slot, _ in agent.uses()] == [3]
    agent.close()


def test_a_run_that_is_repeated_counts_once_as_a_call(board):
    """A call that runs twice counts once: `ran` removes the run from the board but not the call."""
    row = board.row(0)
    row.loading(1, 1)
    row.begin(10, runs=1)
    row.ran(5)
    assert (board.read(0).in_flight, board.read(0).running, board.read(0).busy_ns) == (1, 0, 0)
    row.run()
    row.end(20, runs=1, busy_ns=7, failed=False)
    assert board.read(0) == Use(SlotState.LOADING, 1, 0, 0, 20, 1, 0, 12)


def test_a_slot_that_is_used_again_knows_nothing_of_its_former_copy(board):
    row = board.row(2)
    row.loading(5, 50)
    row.begin(60)
    row.end(70, runs=0, busy_ns=0, failed=True)
    board.row(2).loading(6, 80)
    assert board.read(2) == Use(SlotState.LOADING, 6, 0, 0, 80, 0, 0, 0)


def test_suspects_are_what_was_loading_running_or_unloading(board):
    """Copies that are idle, or whose calls only wait for a thread, are not suspects."""
    for slot, state in enumerate(
        (SlotState.LOADING, SlotState.LOADED, SlotState.LOADED, SlotState.UNLOADING, SlotState.LOADED)
    ):
        row = board.row(slot)
        row.loading(slot, 1)
        row.mark(state)
        if slot == 2:
            row.begin(5, runs=1)
        if slot == 4:
            row.begin(5)
    assert [slot for slot, _ in board.suspects()] == [0, 2, 3]


def test_slots_are_checked(board):
    """Slots out of range are refused. The slot after the last one belongs to no copy and may be written."""
    board.row(board.nobody).loading(1, 1)
    assert list(board.uses()) == []
    for slot in (-1, 11):
        with pytest.raises(IndexError):
            board.row(slot)


def test_clear_and_reset_free_slots(board):
    """`clear` frees one slot. `reset` frees all slots and forgets the writer's process."""
    board.attach(123)
    for slot in range(3):
        board.row(slot).loading(1, 1)
    board.clear(1)
    assert [slot for slot, _ in board.uses()] == [0, 2]
    board.beat(9)
    assert (board.pid, board.beat_ns) == (123, 9)
    board.reset()
    assert list(board.uses()) == []
    assert (board.pid, board.beat_ns) == (0, 0)


def test_the_histogram_counts_by_method_code_and_time(board):
    """A time on a bound belongs to the bucket below it, and an invalid code counts as UNKNOWN."""
    board.observe(0, 0, BUCKETS_NS[0])
    board.observe(0, 0, BUCKETS_NS[0] + 1)
    board.observe(0, 0, BUCKETS_NS[-1] + 1)
    board.observe(2, 99, 7)
    assert board.calls() == []
    board.beat(1)
    first, second = Board.open(board.path).calls()
    assert (first.method, first.code, first.sum_ns) == ("ModelInfer", 0, 2 * BUCKETS_NS[0] + BUCKETS_NS[-1] + 2)
    assert {index: count for index, count in enumerate(first.buckets) if count} == {0: 1, 1: 1, len(BUCKETS_NS): 1}
    assert (second.method, second.code, second.sum_ns) == ("ModelReady", 2, 7)


def test_counts_go_on_over_a_restart_of_the_writer(board):
    """Counters never fall: a restarted writer adds to the counts of the one before."""
    board.observe(0, 0, 10)
    board.beat(1)
    second = Board.open(board.path)
    second.attach(5)
    second.observe(0, 0, 20)
    second.beat(2)
    (series,) = board.calls()
    assert (sum(series.buckets), series.sum_ns) == (2, 30)


def test_what_is_no_board_is_refused(tmp_path):
    """A file that is missing, empty, foreign or truncated cannot be opened as a board."""
    good = tmp_path / "good"
    Board.create(good, 4).close()
    for content in (b"", b"x" * 100_000, good.read_bytes()[:-8]):
        path = tmp_path / "bad"
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a use board"):
            Board.open(path)
    with pytest.raises(FileNotFoundError):
        Board.open(tmp_path / "none")


def test_a_new_board_does_not_disturb_who_has_the_old_one(tmp_path):
    """A server that still has the old board continues to write to the old file."""
    old = Board.create(tmp_path / "board", 4, incarnation="one")
    new = Board.create(tmp_path / "board", 4, incarnation="two")
    old.row(0).loading(1, 1)
    assert list(new.uses()) == []
    assert (old.incarnation, new.incarnation) == ("one", "two")


def test_an_incarnation_that_does_not_fit_is_refused(tmp_path):
    """A board has room for an incarnation of 64 bytes."""
    assert Board.create(tmp_path / "board", 1, incarnation="x" * 64).incarnation == "x" * 64
    with pytest.raises(ValueError, match="64 bytes"):
        Board.create(tmp_path / "board", 1, incarnation="x" * 65)


def test_the_board_outlives_a_writer_that_is_killed(board):
    """The last write before a SIGKILL stays on the board too."""
    script = (
        "import os, signal, sys\n"
        "from mesh.runtime.sharedmemory.board import Board\n"
        "from mesh.runtime.sharedmemory.slot import SlotState\n"
        "board = Board.open(sys.argv[1]); board.attach(os.getpid())\n"
        "row = board.row(1); row.loading(9, 5); row.mark(SlotState.LOADED); row.begin(6, runs=1)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    died = subprocess.run([sys.executable, "-c", script, os.fspath(board.path)], check=False)
    assert died.returncode == -9
    assert board.suspects() == [(1, Use(SlotState.LOADED, 9, 1, 1, 6, 0, 0, 0))]
