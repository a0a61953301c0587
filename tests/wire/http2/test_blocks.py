"""Blocks of headers: what is written means the same to the library hpack, and what hpack writes is read."""

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
    """Such a block means something else each time, so its meaning must not be cached."""
    encoder = hpack.Encoder()
    first = encoder.encode([(b"name", b"value")], huffman=False)
    second = encoder.encode([(b"name", b"value")], huffman=False)
    assert len(second) == 1
    decoder = Decoder()
    decoder.fields(first)
    with pytest.raises(ProtocolError):
        decoder.fields(second)


@given(st.binary(max_size=80))
def test_arbitrary_bytes_are_read_or_refused(block: bytes) -> None:
    try:
        assert isinstance(Decoder().fields(block), Fields)
    except ProtocolError:
        pass


def test_a_list_of_headers_above_the_limit_is_refused() -> None:
    """A few bytes of a block can mean many headers."""
    with pytest.raises(ProtocolError):
        Decoder().fields(b"\x82" * 3000)
