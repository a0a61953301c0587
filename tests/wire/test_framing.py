"""Frames and compressed messages: round trips, and limits on what is decompressed."""

import gzip
import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.statuses import Reason
from mesh.wire import framing


@given(st.binary(max_size=2000))
def test_what_is_packed_unpacks_to_itself(message):
    frame = framing.pack(message)
    assert len(frame) == framing.PREFIX + len(message)
    assert not framing.is_compressed(frame)
    assert framing.unpack(frame, limit=2000) == message


@pytest.mark.parametrize(("encoding", "compress"), [(b"gzip", gzip.compress), (b"deflate", zlib.compress)])
def test_compressed_messages_are_unfolded_by_what_their_encoding_says(encoding, compress):
    message = b"tensor " * 1000
    packed = compress(message)
    frame = b"\1" + len(packed).to_bytes(4, "big") + packed
    assert framing.is_compressed(frame)
    assert framing.unpack(frame, encoding, limit=len(message)) == message
    with pytest.raises(framing.FrameError) as error:
        framing.unpack(frame, encoding, limit=len(message) - 1)
    assert error.value.reason is Reason.TOO_LARGE


def test_a_small_message_that_unfolds_to_a_huge_one_takes_no_more_memory_than_the_limit():
    packed = gzip.compress(bytes(64 << 20))
    frame = b"\1" + len(packed).to_bytes(4, "big") + packed
    tracemalloc.start()
    try:
        with pytest.raises(framing.FrameError):
            framing.unpack(frame, b"gzip", limit=1 << 20)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("frame", "encoding"),
    [
        pytest.param(b"", b"", id="nothing"),
        pytest.param(b"\0\0\0", b"", id="part of a prefix"),
        pytest.param(b"\0\0\0\0\5abc", b"", id="shorter than it says"),
        pytest.param(b"\0\0\0\0\1abc", b"", id="longer than it says"),
        pytest.param(b"\2\0\0\0\3abc", b"", id="unknown flag"),
        pytest.param(b"\1\0\0\0\3abc", b"gzip", id="not gzip"),
        pytest.param(b"\1\0\0\0\3abc", b"", id="compressed, by nothing"),
        pytest.param(b"\1\0\0\0\3abc", b"snappy", id="compressed, by something unknown"),
        pytest.param(framing.pack(gzip.compress(b"abc")[:-1]).replace(b"\0", b"\1", 1), b"gzip", id="ends too soon"),
        pytest.param(framing.pack(gzip.compress(b"abc") + b"x").replace(b"\0", b"\1", 1), b"gzip", id="ends too late"),
    ],
)
def test_what_is_no_frame_is_refused_as_a_bad_request(frame, encoding):
    with pytest.raises(framing.FrameError) as error:
        framing.unpack(frame, encoding, limit=1000)
    assert error.value.reason is Reason.BAD_REQUEST


@given(st.binary(max_size=60), st.sampled_from([b"", b"identity", b"gzip", b"deflate", b"\xff"]))
def test_any_bytes_unpack_or_raise_a_frame_error(frame, encoding):
    try:
        message = framing.unpack(frame, encoding, limit=50)
    except framing.FrameError:
        return
    assert len(message) <= 50
