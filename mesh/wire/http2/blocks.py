"""Blocks of headers in HPACK (RFC 7541), without its dynamic table and without Huffman codes in what is sent.

A request's block is put together from parts that are made once: the head of its method, and each pair of metadata. A
reply's block is decoded by the library hpack, and the result is cached under the block's bytes, because servers answer
with the same few blocks. That is only right while no block changes the meaning of the next one. So the dynamic table
has the size 0 (`TABLE_SIZE`), and a block that uses it is an error.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import hpack

from mesh.wire import call, metadata
from mesh.wire.heads import Memo
from mesh.wire.http2.frames import Code, ProtocolError

TABLE_SIZE = 0
"""Bytes of the dynamic table, as the client announces it."""

MAX_BYTES = 64 * 1024
"""Bytes of the largest list of headers that is accepted."""

ENTRY = 32
"""Bytes that each header counts in a list, beyond those of its name and its value."""

_METHOD = re.compile(rb"/[\x21-\x7e]*")
_VALUE = re.compile(rb"[\x21-\x7e]+")
_PLAIN = bytes(range(0x20, 0x7F))
_MAX_KEPT = 4096
_MAX_FIELD = 256  # bytes of a method or a field that is kept
_MAX_PAIRS = 64  # metadata of a block whose meaning is kept: two bytes of a block can mean a pair

_POST, _HTTP = b"\x83", b"\x86"  # complete entries 3 and 6 of the static table (Appendix A)
_PATH, _AUTHORITY, _CONTENT_TYPE = b"\x04", b"\x01", b"\x0f\x10"  # names 4, 1 and 31 of it, each before a value
_NEW = b"\x00"  # before a name and a value
_RESIZED = b"\x20\x20\x20"  # more changes of the table's size, which has to remain 0, than a block may begin with


@dataclass(slots=True)
class Fields:
    """The headers of a reply, or its trailers."""

    status: int = 0  # of HTTP; 0 without one
    special: dict[bytes, bytes] = field(default_factory=dict)  # the transport's own
    metadata: list[call.Header] = field(default_factory=list)


class Encoder:
    """An encoder of the headers of requests to one server."""

    def __init__(self, authority: bytes) -> None:
        """Makes an encoder for requests with this `:authority`."""
        self._authority = authority
        self._methods: dict[bytes, bytes] = {}
        self._fields: dict[call.Header, bytes] = {}

    def block(self, method: bytes, headers: call.Headers, *, timeout: bytes | None, encoding: bytes) -> bytes:
        """Returns the block of a request. Metadata that cannot be sent is left out, as over HTTP/1.1. Raises ValueError
        for a method, a `grpc-timeout` or a `grpc-encoding` that is not valid."""
        parts = [self._methods.get(method) or self._method(method)]
        for name, value in ((b"grpc-timeout", timeout), (b"grpc-encoding", encoding)):
            if value:
                if _VALUE.fullmatch(value) is None:
                    raise ValueError(f"{value!r} is not a valid {name.decode()}")
                parts.append(_NEW + _text(name) + _text(value))
        fields = self._fields
        for header in headers:
            made = fields.get(header)
            parts.append(self._field(header) if made is None else made)
        return b"".join(parts)

    def _method(self, method: bytes) -> bytes:
        if _METHOD.fullmatch(method) is None:
            raise ValueError(f"{method!r} is not the name of a method")
        made = b"".join(
            (
                *(_POST, _HTTP, _PATH, _text(method), _AUTHORITY, _text(self._authority)),
                *(_CONTENT_TYPE, _text(b"application/grpc"), _NEW, _text(b"te"), _text(b"trailers")),
            )
        )
        if len(method) <= _MAX_FIELD:
            if len(self._methods) >= _MAX_KEPT:
                self._methods.clear()
            self._methods[method] = made
        return made

    def _field(self, header: call.Header) -> bytes:
        name, value = header
        made = _NEW + _text(name) + _text(value) if metadata.encode_headers((header,)) else b""
        if len(name) + len(value) <= _MAX_FIELD:
            if len(self._fields) >= _MAX_KEPT:
                self._fields.clear()
            self._fields[header] = made
        return made


def size(block: bytes) -> int:
    """Returns the size of a request's list of headers, in bytes, as servers limit it (RFC 9113, 6.5.2)."""
    pairs = hpack.Decoder(max_header_list_size=1 << 30).decode(block, raw=True)
    return sum(len(name) + len(value) + ENTRY for name, value in pairs)


class Decoder:
    """A decoder of the headers and trailers of one connection's replies."""

    def __init__(self) -> None:
        self._memo: Memo[Fields] = Memo()
        self._decoder = hpack.Decoder(max_header_list_size=MAX_BYTES)
        self._decoder.max_allowed_table_size = TABLE_SIZE
        self._decoder.header_table_size = TABLE_SIZE

    def fields(self, block: bytes) -> Fields | None:
        """Returns the fields of a block, which may be shared: do not change them. Returns None if they have more than
        `MAX_BYTES`; the next block can be read all the same. Raises ProtocolError."""
        known = self._memo.get(block)
        if known is not None:
            self._memo.missed = 0
            return known
        if len(block) > MAX_BYTES:
            return None
        try:
            if block.startswith(_RESIZED):
                raise hpack.HPACKDecodingError("the size of the table is changed again and again")
            read = _fields(self._decoder.decode(block, raw=True))
        except hpack.OversizedHeaderListError:
            return None
        except hpack.HPACKError as error:
            raise ProtocolError(f"headers cannot be decoded: {error}", Code.COMPRESSION_ERROR) from error
        if len(read.metadata) <= _MAX_PAIRS and self._memo.worth(block):
            self._memo.keep(block, read)
        return read


def _fields(pairs: Iterable[tuple[bytes, bytes] | tuple[str, str]]) -> Fields:
    """Splits the pairs of a block into the status, the transport's own headers, and metadata."""
    read = Fields()
    for name, value in pairs:
        assert isinstance(name, bytes)
        assert isinstance(value, bytes)
        if name == b":status":
            read.status = int(value) if value.isdigit() and len(value) == 3 else 0
        elif name in metadata.NOT_METADATA or name.startswith(b":"):
            read.special[name] = value
        else:
            read.metadata.append((name, value))
    return read


def _text(value: bytes) -> bytes:
    """Returns a string as HPACK writes it (5.2): a length with a prefix of seven bits, and the bytes."""
    length = len(value)
    if length < 0x7F:
        return b"%c%b" % (length, value)
    made = bytearray(b"\x7f")
    length -= 0x7F
    while length > 0x7F:
        made.append(length & 0x7F | 0x80)
        length >>= 7
    made.append(length)
    return bytes(made) + value
