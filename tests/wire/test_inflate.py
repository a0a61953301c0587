"""Decompression of streams: complete, however they are cut, and never beyond the requested amount."""

import gzip
import itertools
import os
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.wire import inflate
from tests.support.examples import examples

BLOBS = st.lists(
    st.one_of(st.binary(max_size=200), st.integers(0, 600_000).map(bytes), st.just(b"text " * 100_000)), max_size=4
)


@settings(max_examples=examples(60), deadline=None)
@given(BLOBS, st.lists(st.integers(1, 40_000), min_size=1, max_size=5))
def test_a_stream_of_members_is_the_same_however_it_is_cut(blobs, sizes):
    data = b"".join(map(gzip.compress, blobs)) or gzip.compress(b"")
    inflater = inflate.Inflater(inflate.GZIP)
    found, start = [], 0
    for size in itertools.cycle(sizes):
        if start >= len(data):
            break
        pieces = list(inflater.feed(data[start : start + size]))
        assert all(0 < len(piece) <= 256 << 10 for piece in pieces)
        found += pieces
        start += size
    inflater.end()
    assert b"".join(found) == b"".join(blobs)
    assert inflater.members == max(len(blobs), 1)


@pytest.mark.parametrize("blob", [b"", b"abc", os.urandom(300_000), bytes(3 << 20)])
def test_a_whole_message_of_either_container(blob):
    assert inflate.whole(gzip.compress(blob), inflate.GZIP, 4 << 20) == blob
    assert inflate.whole(zlib.compress(blob), inflate.ZLIB, 4 << 20) == blob
    assert inflate.whole(gzip.compress(blob) + gzip.compress(b"more"), inflate.GZIP, 4 << 20) == blob + b"more"


@pytest.mark.parametrize(
    ("data", "window"),
    [
        pytest.param(b"", inflate.GZIP, id="nothing"),
        pytest.param(b"not gzip", inflate.GZIP, id="something else"),
        pytest.param(gzip.compress(b"abc")[:-1], inflate.GZIP, id="too short"),
        pytest.param(gzip.compress(b"abc") + b"x", inflate.GZIP, id="followed by something else"),
        pytest.param(gzip.compress(b"abc") + gzip.compress(b"abc")[:-1], inflate.GZIP, id="the second too short"),
        pytest.param(gzip.compress(b"abc")[:-8] + bytes(8), inflate.GZIP, id="a wrong checksum"),
        pytest.param(zlib.compress(b"abc") + zlib.compress(b"abc"), inflate.ZLIB, id="zlib has no members"),
        pytest.param(gzip.compress(b"") * (inflate.MAX_MEMBERS + 1), inflate.GZIP, id="a flood of members"),
    ],
)
def test_what_is_not_whole_is_refused(data, window):
    with pytest.raises(inflate.InflateError):
        inflate.whole(data, window, 1 << 20)


@pytest.mark.parametrize("members", [1, 2])
def test_no_more_is_unpacked_than_the_limit(members):
    data = gzip.compress(bytes(1 << 20)) * members
    assert len(inflate.whole(data, inflate.GZIP, members << 20)) == members << 20
    with pytest.raises(inflate.TooLong):
        inflate.whole(data, inflate.GZIP, (members << 20) - 1)


def test_the_beginning_takes_little_however_long_the_rest_is():
    assert inflate.beginning(gzip.compress(b"id" + bytes(50 << 20)), inflate.GZIP, 1000)[:2] == b"id"
    assert len(inflate.beginning(gzip.compress(bytes(50 << 20)), inflate.GZIP, 1000)) < 1 << 20
    assert inflate.beginning(gzip.compress(b"short"), inflate.GZIP, 1000) == b"short"
