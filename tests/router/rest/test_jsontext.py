"""JSON texts: quick reading gives what `json` gives, and writing gives ASCII that `json` reads back."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.statuses import MeshError, Reason
from router.rest import jsontext

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats(allow_nan=False) | st.text(),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(max_size=3), values, max_size=4),
    max_leaves=12,
)


def outcome(load, text):
    try:
        return load(text)
    except MeshError as error:
        return error.reason, error.text


@given(st.dictionaries(st.text(max_size=5), VALUES, max_size=4), st.booleans(), st.sampled_from([None, 1]))
def test_what_is_read_is_what_json_reads(members, ascii_only, indent):
    """Quick reading gives the same members as `json`, with or without indents and characters outside ASCII."""
    text = json.dumps(members, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "surrogatepass")
    assert outcome(lambda text: jsontext.load(text).members, text) == outcome(jsontext.load_object, text)


WORDS = b'{ } [ ] , : "a" " 1 - 0 . e 1e999 NaN Infinity true false null \\ud800 \\u0000 \xff \xc3\xa4 \0 \xef\xbb\xbf'
PIECES = st.sampled_from([*WORDS.split(), b" ", b"\n", b"\t"])


@given(st.lists(PIECES, max_size=12), st.booleans())
def test_what_is_refused_is_refused_as_json_refuses_it(pieces, inside):
    """Quick reading of a text that is probably broken gives the same members as `json`, or an error with the same
    reason and text."""
    text = b"".join(pieces)
    if inside:
        text = b'{"a":' + text + b"}"
    expected = outcome(jsontext.load_object, text)
    found = outcome(lambda text: jsontext.load(text).members, text)
    assert found == expected or (found != found and expected != expected)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b'{"a": 1, "a": 2}', 2),
        (b'{"a": "\\ud800"}', "\ud800"),
        (b'{"a": 1e999}', math.inf),
        (b'{"a": -0}', 0),
        (b'{"a": -0.0}', -0.0),
    ],
)
def test_corners_of_json_are_read_as_ever(text, value):
    """If an object has two members with one name, the last one counts. Unpaired surrogates and overflowing floats are
    accepted."""
    loaded = jsontext.load(text)
    assert loaded.members["a"] == value
    assert loaded.careful or value != math.inf


def test_an_integer_beyond_64_bits_is_one_if_read_strictly():
    """Quick reading turns an integer beyond 64 bits into a float, and says so. Strict reading keeps the integer."""
    text = b'{"a": 18446744073709551616}'
    loaded = jsontext.load(text)
    assert (loaded.members["a"], type(loaded.members["a"]), loaded.strict) == (2.0**64, float, False)
    strictly = jsontext.load_strictly(text)
    assert (strictly.members["a"], type(strictly.members["a"]), strictly.strict) == (1 << 64, int, True)


@pytest.mark.parametrize("word", [b"true", b"false"])
def test_a_text_with_booleans_says_so(word):
    """A text with booleans is marked for careful checks of each number, because Python takes a boolean for a number."""
    assert jsontext.load(b'{"a": [1, %b]}' % word).careful
    assert not jsontext.load(b'{"a": [1, null, "b"]}').careful


def test_deep_nesting_is_refused():
    with pytest.raises(MeshError, match="nested too deeply") as caught:
        jsontext.load(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}")
    assert caught.value.reason is Reason.BAD_REQUEST


@given(st.text(), st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), max_size=5))
def test_what_is_written_is_ascii_and_reads_back(text, numbers):
    array = np.array(numbers, np.float32)
    written = jsontext.dump({"text": text, "numbers": array.astype(np.float64)})
    assert written.isascii()
    assert json.loads(written) == {"text": text, "numbers": array.tolist()}
