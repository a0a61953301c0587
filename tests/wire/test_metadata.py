"""Time-outs, status texts and binary values in headers: round trips, and bytes that must never reach a header line."""

import math
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mesh.wire import metadata


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (b"1H", 3600.0),
        (b"2M", 120.0),
        (b"3S", 3.0),
        (b"250m", 0.25),
        (b"10u", 1e-5),
        (b"99999999n", 0.099999999),
        (b"0S", 0.0),
    ],
)
def test_time_outs_are_read_in_every_unit(value, seconds):
    assert metadata.parse_timeout(value) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "value", [b"", b"S", b"1", b"1s", b"-1S", b"+1S", b" 1S", b"1 S", b"1_0S", b"123456789S", b"1.5S", b"\xb2S"]
)
def test_what_is_no_time_out_is_none(value):
    assert metadata.parse_timeout(value) is None


@given(st.floats(min_value=1e-6, max_value=9e7))
def test_a_time_out_arrives_no_shorter_and_hardly_longer(seconds):
    value = metadata.format_timeout(seconds)
    assert re.fullmatch(rb"\d{1,8}[umS]", value)
    parsed = metadata.parse_timeout(value)
    assert parsed is not None
    assert seconds * (1 - 1e-12) <= parsed <= seconds * 1.0001 + 2e-6


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan])
def test_no_time_left_is_the_shortest_time_out(seconds):
    assert metadata.format_timeout(seconds) == b"1n"


def test_endless_time_is_the_longest_time_out():
    assert metadata.parse_timeout(metadata.format_timeout(math.inf)) == 99999999.0


@given(st.text(max_size=300))
@example(" model\r\nx: y ")
@example("100% größer")
@example("\0\x7f")
@example(" ")
def test_status_texts_come_back_and_fit_into_a_header(text):
    raw = metadata.encode_text(text)
    assert re.fullmatch(rb"[ -~]*", raw)
    assert raw == raw.strip(), "HTTP would drop blanks at the ends"
    assert metadata.decode_text(raw) == text.encode("utf-8", "replace").decode()


@given(st.integers(4000, 4200), st.sampled_from(["a", "%", "é", "a é", "\n"]))
def test_a_long_status_text_is_cut_off_and_stays_readable(count, piece):
    raw = metadata.encode_text(piece * count)
    assert len(raw) <= 4096
    assert metadata.decode_text(raw).startswith(piece * 400)
    assert not re.search(rb"%(?![0-9A-F]{2})", raw), "an escape was cut in two"


@given(st.binary(max_size=100))
def test_any_status_text_can_be_read(raw):
    assert isinstance(metadata.decode_text(raw), str)


@given(st.binary(max_size=100))
def test_binary_values_come_back_with_and_without_padding(value):
    encoded = metadata.encode_bin(value)
    assert b"=" not in encoded
    assert metadata.decode_bin(encoded) == value
    assert metadata.decode_bin(encoded + b"=" * (-len(encoded) % 4)) == value


@pytest.mark.parametrize("value", [b"a", b"a b=", b"\xff\xff", b"ab$d", b"YQ==YQ=="])
def test_what_is_not_base64_raises_a_value_error(value):
    with pytest.raises(ValueError):
        metadata.decode_bin(value)


NAMES = st.from_regex(rb"[0-9a-z_.-]{1,12}", fullmatch=True).filter(lambda name: name not in metadata.RESERVED)
VALUES = st.from_regex(rb"[!-~]([ -~]{0,20}[!-~])?", fullmatch=True) | st.just(b"")


@given(st.lists(st.tuples(NAMES, VALUES), max_size=8))
def test_good_headers_are_written_as_they_are(headers):
    block = metadata.encode_headers(headers)
    assert block == b"".join(name + b": " + value + b"\r\n" for name, value in headers)


@given(st.lists(st.tuples(st.binary(max_size=8), st.binary(max_size=8)), max_size=8))
@example([(b"a", b"b\r\nset: c")])
@example([(b"a\r\nset", b"c")])
@example([(b"a: b\r\nset", b"c")])
@example([(b"", b"c")])
@example([(b"a", b"b\n"), (b"c", b"\r")])
@example([(b"a", b"\r\n"), (b"c\r\n", b"d")])
def test_whatever_the_headers_every_line_is_one_of_them_and_valid(headers):
    block = metadata.encode_headers(headers)
    assert block == b"" or block.endswith(b"\r\n")
    for line in block.split(b"\r\n")[:-1]:
        name, _, value = line.partition(b": ")
        assert (name, value) in headers
        assert re.fullmatch(rb"[0-9a-z_.!#$%&'*+^`|~-]+: [ -~]*", line)


@pytest.mark.parametrize("name", [*sorted(metadata.RESERVED), b"Upper", b"sp ace", b"col:on"])
def test_names_of_the_transport_and_bad_names_are_left_out_and_the_rest_stays(name):
    headers = [(b"before", b"1"), (name, b"2"), (b"after", b"3")]
    assert metadata.encode_headers(headers) == b"before: 1\r\nafter: 3\r\n"
