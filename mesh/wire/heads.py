"""A cache of known heads, which lets a message that looks like an earlier one skip the parser.

A client that calls a model keeps sending the same head, and a server answers with the same head and trailers; only the
message, its length and the remaining time differ. So the parser's result is cached under the bytes of the head.
Measured with 200-byte messages and three metadata entries, without the sockets: a request costs the server 3.8 us of
Python instead of 7.6, and a call costs the client 5.8 us instead of 8.0. A new head costs 1 to 2 us more, so the
look-up is skipped while nearly all heads are new.

The cache accepts exactly the heads that the parser accepted before, byte for byte, except for two lines that are cut
out and parsed strictly here; and it only accepts a read that brought one whole message and nothing else. Everything
else is left to the parser, so this is not a second HTTP parser with its own idea of what is valid.
"""

from typing import Generic, TypeVar

_MAX_HEAD = 2048  # maximum bytes of a head that is cached
_WITH_LINES = _MAX_HEAD + 256  # bytes of a head with its end and the two lines that are cut out
_MAX_SMALL = 64 * 1024  # bytes of a read whose parts are copied; longer ones are split by positions
_MAX_READ = 256 * 1024  # bytes, more than uvloop reads at once: a longer message never arrives in one read
_MAX_KNOWN = 4096  # number of heads, of some hundred bytes each; thousands of models may be called
_MAX_CUTS = 512  # cut heads that are kept
_MAX_SEEN = 8192
_PATIENCE = 256  # new heads in a row after which look-ups do not pay ...
_REST = 4096  # ... and are skipped for this many messages

_END = b"\r\n\r\n"
_LENGTH = b"\r\ncontent-length: "
_TIMEOUT = b"\r\ngrpc-timeout: "
_CHUNKED = b"\r\ntransfer-encoding: chunked"
_LAST = b"\r\n0\r\n\r\n"

_HEXADECIMAL = b"0123456789abcdefABCDEF"
_SIZES = {b"%x" % size: size for size in range(4096)}
"""The sizes of small chunks, as they are usually written. A look-up takes a tenth of the time that parsing takes."""

V = TypeVar("V")


class Memo(dict[bytes, V], Generic[V]):
    """A bounded cache of results, with the bytes that they came from as keys. Only a key that is seen twice is worth
    keeping."""

    __slots__ = ("_seen", "missed", "rest")

    def __init__(self) -> None:
        self._seen: set[int] = set()  # hashes of keys seen once; a collision merely caches a key one time too early
        self.missed = 0  # look-ups in a row that found nothing; callers reset it on a hit
        self.rest = 0  # messages for which the look-up is still skipped; callers count it down

    def worth(self, key: bytes) -> bool:
        """Counts a failed look-up, and returns whether the result for this key should be kept: the key was seen before,
        and is not too long."""
        self.missed += 1
        if self.missed > _PATIENCE:  # heads that never repeat, for example because of a trace id
            self.missed = 0
            self.rest = _REST
        mark = hash(key)
        if mark in self._seen:
            return len(key) <= _MAX_HEAD
        if len(self._seen) >= _MAX_SEEN:
            self._seen.clear()
        self._seen.add(mark)
        return False

    def keep(self, key: bytes, value: V) -> None:
        """Caches a result. If there are too many results, it drops all others first; those in use come back soon."""
        if len(self) >= _MAX_KNOWN:
            self.clear()
        self[key] = value


Request = tuple[bytes, bool, bytes, bytes]
"""The parts of a request: the head without the lines that differ from call to call; whether the head had a
`content-length` (otherwise the body came in one chunk); the value of `grpc-timeout`, or b"" without one; the body. A
named tuple would cost 0.25 us more to make."""

Answer = tuple[bytes, bytes, bytes]
"""The parts of a reply: the head; the body; the last chunk and the trailers, which follow the body."""


_cuts: dict[bytes, tuple[bytes, int]] = {}  # whole heads with a length and no time-out: the cut head, the length


def split_request(data: bytes) -> Request | None:
    """Splits a read that brought exactly one whole request, in a form recognised here. Returns None for any other."""
    if len(data) > _MAX_SMALL:
        return _split_large_request(data)
    head, _, body = data.partition(_END)
    chunked = head.endswith(_CHUNKED)
    if not chunked:
        cut = _cuts.get(head)
        if cut is not None:
            return (cut[0], True, b"", body) if cut[1] == len(body) else None
    at = -1 if chunked else head.find(_LENGTH)
    whole = head
    if at > 0:
        stop = head.find(b"\r\n", at + 18)
        digits, rest = (head[at + 18 : stop], head[stop:]) if stop > 0 else (head[at + 18 :], b"")
        if not digits.isdigit() or len(digits) > 9 or int(digits) != len(body):
            return None
        head = head[:at] + rest
    else:
        digits, _, body = body.partition(b"\r\n")
        size = _SIZES.get(digits, -1)
        if size < 0:
            size = _size(digits)
        if size < 0 or body[size:] != _LAST:
            return None
        body = body[:size]
    if len(head) > _MAX_HEAD:
        return None
    start = head.find(_TIMEOUT)
    if start > 0:
        stop = head.find(b"\r\n", start + 16)
        timeout, rest = (head[start + 16 : stop], head[stop:]) if stop > 0 else (head[start + 16 :], b"")
        if not timeout.isalnum():
            return None
        return head[:start] + rest, at > 0, timeout, body
    if at > 0:
        if len(_cuts) >= _MAX_CUTS:
            _cuts.clear()
        _cuts[whole] = head, len(body)
    return head, at > 0, b"", body


def plain(head: bytes) -> bool:
    """Returns whether a head without its cut lines may be cached. It must not repeat those lines, fold lines, or
    contain `Expect`."""
    lower = head.lower()
    return not any(odd in lower for odd in (b"content-length", b"grpc-timeout", b"\r\nexpect", b"\r\n ", b"\r\n\t"))


def split_reply(data: bytes) -> Answer | None:
    """Splits a read that may be one whole reply with one chunk. Returns None if it cannot be. The caller checks the
    head and the tail."""
    if len(data) > _MAX_SMALL:
        return _split_large_reply(data)
    head, _, body = data.partition(_END)
    digits, _, body = body.partition(b"\r\n")
    size = _SIZES.get(digits, -1)
    if size < 0:
        size = _size(digits)
    if size < 0 or len(body) - size > _MAX_HEAD or len(head) > _MAX_HEAD:
        return None
    return head, body[:size], body[size:]


def _split_large_request(data: bytes) -> Request | None:
    """Splits a long read as `split_request` does, by passing it only the head. The body is copied once, and only if all
    of it is there. Measured with 100 KB: a call costs the worker 15 % less than through the parser."""
    start = data.find(_END, 0, _WITH_LINES) + len(_END)
    if start < len(_END) or len(data) > _MAX_READ:
        return None
    end = len(data)
    at = data.find(_LENGTH, 0, start) + len(_LENGTH)
    if at >= len(_LENGTH):
        stop = data.find(b"\r\n", at)
        digits = data[at:stop]
        if not digits.isdigit() or len(digits) > 9 or int(digits) != end - start:
            return None
        emptied = data[:at] + b"0" + data[stop:start]
    else:
        emptied = data[:start] + b"0\r\n" + _LAST
        start, end = _chunk(data, start)
        if data[end:] != _LAST:
            return None
    split = split_request(emptied)
    return None if split is None else (split[0], split[1], split[2], data[start:end])


def _split_large_reply(data: bytes) -> Answer | None:
    """Splits a long read like `split_reply`; the body is copied once, and only if all of it is there."""
    head = data.find(_END, 0, _WITH_LINES)
    if not 0 <= head <= _MAX_HEAD or len(data) > _MAX_READ:
        return None
    start, end = _chunk(data, head + len(_END))
    return (data[:head], data[start:end], data[end:]) if 0 <= len(data) - end <= _MAX_HEAD else None


def _chunk(data: bytes, at: int) -> tuple[int, int]:
    """Returns the beginning and the end of the chunk whose head begins at `at`. Without a plain head, the end is beyond
    the data."""
    stop = data.find(b"\r\n", at, at + 10)
    size = _size(data[at:stop]) if stop > 0 else -1
    if size >= 0:
        return stop + 2, stop + 2 + size
    return at, len(data) + 1


def _size(digits: bytes) -> int:
    """Returns the size of a chunk, or -1 if it is not only hexadecimal digits. (int() accepts more, such as "0x".)"""
    return int(digits, 16) if 0 < len(digits) <= 8 and not digits.strip(_HEXADECIMAL) else -1
