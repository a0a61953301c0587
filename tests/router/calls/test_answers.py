"""Error texts, shortened to what a client can receive."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.statuses import MAX_TEXT, MeshError, Reason, shortened
from mesh.wire import metadata
from router.calls import answers
from tests.support.fakecalls import FakeCall

MAX_METADATA = 8 << 10  # gRPC libraries' default


@given(st.text(st.characters(codec="utf-8"), max_size=5000), st.integers(10, 3000))
def test_a_shortened_text_is_the_beginning_and_fits(text, limit):
    short = shortened(text, limit)
    assert len(short.encode("utf-8", "replace")) <= limit
    if short != text.encode("utf-8", "replace").decode():
        assert short.endswith("...")
        assert text.startswith(short.removesuffix("..."))


@pytest.mark.parametrize("letter", ["a", "ä", "模", "\U0001f600", "\n", "%", "\ud800"])
@pytest.mark.parametrize("size", [MAX_TEXT, 10_000, 2_000_000])
def test_any_failure_fits_into_the_metadata_of_a_reply(letter, size):
    call = FakeCall()
    answers.fail(call, MeshError(Reason.BAD_REQUEST, letter * size, retry_after=1.0))
    ((code, text, _, headers, trailers),) = call.answers
    assert code == Reason.BAD_REQUEST.code
    lines = metadata.encode_text(text) + metadata.encode_headers([*headers, *trailers])
    assert len(lines) + 200 < MAX_METADATA
