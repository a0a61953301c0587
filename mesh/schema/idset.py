"""A set of ids in a few hundred bytes, which may say yes where it should say no: a Bloom filter.

A pod publishes with it of which models it has the files on disk, so that a load may go where nothing has to be pulled.
It stands in the pod's record, which every router reads at every change: 4,000 ids take 5 KB as text, one in a hundred
of the others is wrongly found in it, and then a load goes to a pod that is as good as any but for the pull.

Bits are set at places that come from one BLAKE2b digest by double hashing (Kirsch and Mitzenmacher, 2006).
"""

import base64
import hashlib
from collections.abc import Iterable

MAX_IDS = 4000
"""Ids that a set is made for: more make it larger than what is worth telling all routers."""

_BITS = 10  # for each id: with 7 places of each, 0.8 % of other ids are wrongly found
_PLACES = 7
_LEAST = 64  # bits
_MAX_BYTES = 8192  # of one that is read: whatever stands in etcd


class IdSet:
    """See the module's text. Never changed once made."""

    __slots__ = ("_bits", "_size")

    def __init__(self, bits: int, size: int) -> None:
        self._bits = bits
        self._size = size

    @classmethod
    def of(cls, ids: Iterable[str]) -> "IdSet":
        """A set of these."""
        ids = list(ids)
        size = max(_LEAST, -(-len(ids) * _BITS // 8) * 8)
        bits = bytearray(size // 8)
        for one in ids:
            for place in _places(one, size):
                bits[place >> 3] |= 1 << (place & 7)
        return cls(int.from_bytes(bits, "little"), size)

    @classmethod
    def decode(cls, text: str) -> "IdSet":
        """From what `encode` gave; "" is the empty set. Raises ValueError."""
        if not text:
            return EMPTY
        try:
            raw = base64.b85decode(text)
        except ValueError as error:
            raise ValueError(f"not a set of ids: {error}") from error
        if not 0 < len(raw) <= _MAX_BYTES:
            raise ValueError(f"a set of ids of {len(raw)} bytes")
        return cls(int.from_bytes(raw, "little"), len(raw) * 8)

    def encode(self) -> str:
        """As text; "" for the empty set."""
        return base64.b85encode(self._bits.to_bytes(self._size // 8, "little")).decode() if self._bits else ""

    def __contains__(self, one: str) -> bool:
        bits = self._bits
        return bool(bits) and all(bits >> place & 1 for place in _places(one, self._size))


EMPTY = IdSet(0, _LEAST)


def _places(one: str, size: int) -> list[int]:
    digest = hashlib.blake2b(one.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    first, step = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little") | 1
    return [(first + number * step) % size for number in range(_PLACES)]
