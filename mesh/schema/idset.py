"""A set of ids in a few hundred bytes, with false positives: a Bloom filter.

With this set, a pod publishes the models whose files are on its disk, so that a load can be sent to a pod that does not
have to pull the files. The set is part of the pod's record, which every router reads at every change: 4,000 ids take 5
KB as text. About one in a hundred ids that are not in the set is a false positive. The load of such a model may then be
sent to a pod that has to pull the files, as any other pod would have to.

The positions of bits come from one BLAKE2b digest by double hashing (Kirsch and Mitzenmacher, 2006).
"""

import base64
import hashlib
from collections.abc import Iterable

MAX_IDS = 4000
"""Largest number of ids: it is not worth publishing more to all routers."""

_BITS = 10  # bits for each id: with 7 positions each, 0.8 % of other ids are found wrongly
_PLACES = 7
_LEAST = 64  # bits
_MAX_BYTES = 8192  # maximum size of a set that is read from etcd


class IdSet:
    """An immutable set of ids. `in` is true for each id in the set, and for about one in a hundred others."""

    __slots__ = ("_bits", "_size")

    def __init__(self, bits: int, size: int) -> None:
        self._bits = bits
        self._size = size

    @classmethod
    def of(cls, ids: Iterable[str]) -> "IdSet":
        """Makes a set of these ids."""
        ids = list(ids)
        size = max(_LEAST, -(-len(ids) * _BITS // 8) * 8)
        bits = bytearray(size // 8)
        for one in ids:
            for place in _places(one, size):
                bits[place >> 3] |= 1 << (place & 7)
        return cls(int.from_bytes(bits, "little"), size)

    @classmethod
    def decode(cls, text: str) -> "IdSet":
        """Decodes the result of `encode`. Returns the empty set for "". Raises ValueError for an invalid text."""
        if not text:
            return EMPTY
        try:
            raw = base64.b85decode(text)
        except ValueError as error:
            raise ValueError(f"the text is not a set of ids: {error}") from error
        if not 0 < len(raw) <= _MAX_BYTES:
            raise ValueError(f"a set of ids has 1 to {_MAX_BYTES} bytes, not {len(raw)}")
        return cls(int.from_bytes(raw, "little"), len(raw) * 8)

    def encode(self) -> str:
        """Encodes the set as text. Returns "" for the empty set."""
        return base64.b85encode(self._bits.to_bytes(self._size // 8, "little")).decode() if self._bits else ""

    def __contains__(self, one: str) -> bool:
        bits = self._bits
        return bool(bits) and all(bits >> place & 1 for place in _places(one, self._size))


EMPTY = IdSet(0, _LEAST)


def _places(one: str, size: int) -> list[int]:
    digest = hashlib.blake2b(one.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    first, step = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little") | 1
    return [(first + number * step) % size for number in range(_PLACES)]
