"""Bodies as the pieces that were received. Tensors are cut out without a copy, and copied only once, into the
message."""

from collections.abc import Iterable

Piece = bytes | memoryview
Contents = list[Piece]
"""A tensor's raw contents, in pieces."""


class Body:
    """A body in pieces."""

    __slots__ = ("pieces", "size")

    def __init__(self, pieces: Iterable[Piece] = ()) -> None:
        self.pieces: list[Piece] = list(pieces)
        self.size = sum(map(len, self.pieces))

    def add(self, piece: bytes) -> None:
        """Adds the next piece."""
        self.pieces.append(piece)
        self.size += len(piece)

    def joined(self) -> bytes:
        """Returns the complete body as one piece, and keeps only that piece."""
        if len(self.pieces) != 1 or type(self.pieces[0]) is not bytes:
            self.pieces = [b"".join(self.pieces)]
        whole = self.pieces[0]
        assert type(whole) is bytes
        return whole

    def beginning(self, size: int) -> bytes:
        """Returns a copy of the first `size` bytes."""
        return b"".join(self.cut(0, size))

    def cut(self, start: int, stop: int) -> Contents:
        """Returns the bytes between two positions of the body, without copying them."""
        found: Contents = []
        for piece in self.pieces:
            size = len(piece)
            if stop <= 0:
                break
            if start < size and stop > 0:
                found.append(memoryview(piece)[max(start, 0) : stop])
            start -= size
            stop -= size
        return found
