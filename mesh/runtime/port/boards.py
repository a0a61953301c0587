"""The agent's use board, opened by the process that answers on the data port."""

from pathlib import Path

from mesh.runtime.sharedmemory.board import Board


class CannotStart(Exception):
    """The failure of a process to start. The text says why."""


def open_board(path: Path | None, incarnation: str) -> Board:
    """Returns the board at `path`, which must belong to the agent with this incarnation. Without a path, returns a
    private board that no other process reads. Raises CannotStart."""
    if path is None:
        return Board.private(0)
    try:
        board = Board.open(path)
    except OSError as error:
        raise CannotStart(f"cannot open the use board {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise CannotStart(str(error)) from error
    if board.incarnation != incarnation:
        raise CannotStart(f"the use board {path} belongs to agent {board.incarnation!r}, not to {incarnation!r}")
    return board
