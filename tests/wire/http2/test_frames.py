"""Frames of HTTP/2."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.wire.http2 import frames
from mesh.wire.http2.frames import ProtocolError, Setting


@given(st.dictionaries(st.sampled_from(list(Setting)), st.integers(1 << 14, (1 << 24) - 1)))
def test_settings_are_read_as_they_were_written(values: dict[Setting, int]) -> None:
    assert frames.read_settings(frames.settings(values)[frames.HEAD :]) == list(values.items())


@pytest.mark.parametrize(
    "content",
    [
        b"\0\1\0\0\0",
        frames.settings({Setting.INITIAL_WINDOW_SIZE: 1 << 31})[frames.HEAD :],
        frames.settings({Setting.MAX_FRAME_SIZE: 100})[frames.HEAD :],
        frames.settings({Setting.MAX_FRAME_SIZE: 1 << 24})[frames.HEAD :],
    ],
)
def test_invalid_settings_are_refused(content: bytes) -> None:
    with pytest.raises(ProtocolError):
        frames.read_settings(content)


@given(st.binary(max_size=50), st.integers(0, 255))
def test_padding_is_removed(content: bytes, padding: int) -> None:
    padded = bytes([padding]) + content + bytes(padding)
    assert frames.unpadded(frames.PADDED, padded) == content
    assert frames.unpadded(0, padded) == padded


@pytest.mark.parametrize("content", [b"", b"\1", b"\x05abcd"])
def test_more_padding_than_content_is_refused(content: bytes) -> None:
    with pytest.raises(ProtocolError):
        frames.unpadded(frames.PADDED, content)
