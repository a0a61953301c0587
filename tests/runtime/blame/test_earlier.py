"""Evidence left by an earlier life of a pod."""

from pathlib import Path

import pytest

from mesh import process
from mesh.runtime.blame import earlier
from mesh.runtime.blame.lastlooks import LastLooks
from mesh.runtime.sharedmemory.board import Board


@pytest.mark.parametrize(
    ("looks", "blamed"),
    [
        pytest.param([3 << 30, 3 << 30], False, id="memory-to-spare"),
        pytest.param([3 << 30, 1 << 30], True, id="memory-going-fast"),
        pytest.param([1 << 26], True, id="no-memory-left"),
        pytest.param([], False, id="nobody-looked"),
    ],
)
def test_a_pod_that_was_killed_whole_blames_models_only_for_its_memory(
    looks: list[int], blamed: bool, tmp_path: Path
) -> None:
    """If agent and server were both killed, the next agent blames models only if the last samples show that memory was
    running out."""
    board = Board.create(tmp_path / earlier.BOARD, 4)
    board.row(0).loading(77, 1)
    left = iter(looks)
    trace = LastLooks(tmp_path, lambda: next(left), 4 << 30)
    for _ in looks:
        trace.look()
    trace.close()
    lives = earlier.Earlier("pod")
    lives.read(tmp_path)
    assert lives.suspects == ({77: "loading"} if blamed else {})
    board.close()


@pytest.mark.parametrize("stopped", [False, True])
def test_a_life_that_was_stopped_from_outside_blames_nobody(
    stopped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the former life was killed because it had been stopped from outside, the parent process says so in an
    environment variable."""
    board = Board.create(tmp_path / earlier.BOARD, 4)
    row = board.row(0)
    row.loading(77, 1)
    trace = LastLooks(tmp_path, lambda: 0, 1 << 30)
    trace.look()
    trace.close()
    if stopped:
        monkeypatch.setenv(process.STOPPED_BEFORE, "1")
    lives = earlier.Earlier("pod")
    lives.read(tmp_path)
    assert lives.suspects == ({} if stopped else {77: "loading"})
    board.close()
