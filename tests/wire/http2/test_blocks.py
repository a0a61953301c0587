"""Blocks of headers: what is written means the same to the library hpack, and what hpack writes is read."""

import tracemalloc
from collections.abc import Callable

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.wire import metadata
from mesh.wire.http2.blocks import Decoder, Encoder, Fields
from mesh.wire.http2.frames import ProtocolError

NAMES = st.from_regex(r"[a-z][a-z0-9_.-]{0,40}", fullmatch=True).map(str.encode)
VALUES = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=300).map(str.encode)
PAIRS = st.lists(st.tuples(NAMES, VALUES), max_size=8)


def peer_encoder() -> hpack.Encoder:
    encoder = hpack.Encoder()
    encoder.header_table_size = 0
    return encoder


@given(PAIRS, st.integers(1, 300))
def test_a_request_means_the_same_to_hpack(pairs: list[tuple[bytes, bytes]], length: int) -> None:
    method = b"/" + b"m" * length
    block = Encoder(b"host:1").block(method, pairs, timeout=b"5S", encoding=b"gzip")
    read = list(hpack.Decoder(max_header_list_size=1 << 20).decode(block, raw=True))
    assert read[:6] == [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", method),
        (b":authority", b"host:1"),
        (b"content-type", b"application/grpc"),
        (b"te", b"trailers"),
    ]
    assert read[6:8] == [(b"grpc-timeout", b"5S"), (b"grpc-encoding", b"gzip")]
    assert read[8:] == [(name, value) for name, value in pairs if name not in metadata.RESERVED]


@pytest.mark.parametrize(
    "header",
    [(b"Upper", b"1"), (b"a b", b"1"), (b"te", b"gzip"), (b"a", b"x\r\ny: z"), (b"a", b"\xff"), (b":path", b"/x")],
)
def test_metadata_that_cannot_be_sent_is_left_out(header: tuple[bytes, bytes]) -> None:
    encoder = Encoder(b"host")
    assert encoder.block(b"/m", [header], timeout=None, encoding=b"") == encoder.block(
        b"/m", [], timeout=None, encoding=b""
    )


@pytest.mark.parametrize(
    ("method", "timeout", "encoding"),
    [(b"m", None, b""), (b"/a b", None, b""), (b"/m", b"1 S", b""), (b"/m", None, b"g\r\n")],
)
def test_an_invalid_method_timeout_or_encoding_is_refused(
    method: bytes, timeout: bytes | None, encoding: bytes
) -> None:
    with pytest.raises(ValueError, match=r"is not the name|is not a valid"):
        Encoder(b"host").block(method, [], timeout=timeout, encoding=encoding)


@given(st.lists(PAIRS, min_size=1, max_size=4), st.booleans())
def test_blocks_of_hpack_are_read_in_any_order(blocks: list[list[tuple[bytes, bytes]]], huffman: bool) -> None:
    encoder, decoder = peer_encoder(), Decoder()
    made = [(encoder.encode([(b":status", b"200"), *pairs], huffman=huffman), pairs) for pairs in blocks]
    for block, pairs in made + made[::-1] + made:  # from the third time, the results come from the cache
        fields = decoder.fields(block)
        assert fields.status == 200
        assert fields.metadata == [(name, value) for name, value in pairs if name not in metadata.NOT_METADATA]


def test_a_block_that_uses_the_dynamic_table_is_an_error() -> None:
    """A block that uses the dynamic table means something else each time, so its meaning must not be cached."""
    encoder = hpack.Encoder()
    first = encoder.encode([(b"name", b"value")], huffman=False)
    second = encoder.encode([(b"name", b"value")], huffman=False)
    assert len(second) == 1
    decoder = Decoder()
    decoder.fields(first)
    with pytest.raises(ProtocolError):
        decoder.fields(second)


def test_a_number_that_does_not_end_is_refused() -> None:
    """Reading such a number to its end would take seconds."""
    with pytest.raises(ProtocolError, match="too long"):
        Decoder().fields(b"\xff" * 60_000)


@given(st.binary(max_size=80))
def test_arbitrary_bytes_are_read_or_refused(block: bytes) -> None:
    try:
        assert isinstance(Decoder().fields(block), Fields)
    except ProtocolError:
        pass


def test_a_list_of_headers_above_the_limit_is_refused() -> None:
    """A few bytes of a block can mean many headers."""
    assert Decoder().fields(b"\x82" * 3000) is None


def remembered(act: Callable[[], object]) -> int:
    """Returns the bytes that are held after an action and were not before."""
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("what", ["methods", "metadata", "metadata that cannot be sent"])
def test_what_is_remembered_of_requests_is_bounded(what: str) -> None:
    """Callers choose methods and metadata, so they could fill the memory."""
    encoder = Encoder(b"host")
    name = b"Name" if "cannot" in what else b"name"

    def encode() -> None:
        for number in range(500):
            text = b"%d" % number * 10_000
            method, pairs = (b"/" + text, []) if what == "methods" else (b"/m", [(name, text)])
            encoder.block(method, pairs, timeout=None, encoding=b"")

    assert remembered(encode) < 1 << 20


def test_what_is_remembered_of_replies_is_bounded() -> None:
    """A single byte of a block can stand for a whole pair of metadata."""
    decoder = Decoder()

    def decode() -> None:
        for number in range(20):
            for _ in range(2):
                decoder.fields(b"\x88" + b"\x8f" * 1300 + b"\x00\x01n\x04%4d" % number)

    assert remembered(decode) < 1 << 20
