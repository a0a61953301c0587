"""Splicing of ids into encoded messages, compared with what protobuf reads."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.pb import inference_pb2
from mesh.runtime.relay.splice import SpliceError, append, drop, splice
from tests.support.anymessage import Made, made
from tests.support.exampleproto import PredictRequest

TEXTS = st.text(max_size=200).filter(lambda text: text.isprintable())
INNER = st.builds(lambda name, note: {"model_name": name, "note": note}, TEXTS, TEXTS)
REQUESTS = st.fixed_dictionaries(
    {}, optional={"model_name": TEXTS, "text": TEXTS, "inner": INNER, "texts": st.lists(TEXTS, max_size=4)}
)


def encoded(parts: list[dict]) -> bytes:
    """Returns several encoded messages one after the other, which protobuf reads as a single message."""
    return b"".join(PredictRequest(**part).SerializeToString() for part in parts)


@given(made(), TEXTS)
def test_a_string_at_any_path_of_any_message_reads_as_set(one: Made, model_id: str) -> None:
    """In messages of any type, protobuf reads a spliced message as the original in which the string at the path is
    set."""
    assert one.parse(splice(one.encoded, one.path, model_id.encode())) == one.with_text(model_id)


@given(made(), made(), TEXTS)
def test_a_message_written_in_two_parts_is_spliced_as_its_merge(one: Made, other: Made, model_id: str) -> None:
    """Two encoded messages of a type, one after the other, mean their merge, in which the string is set."""
    twice = one.encoded + one.with_text(other.text or "").SerializeToString()
    merged = one.parse(twice)
    spliced = one.parse(splice(twice, one.path, model_id.encode()))
    assert spliced == Made(merged, one.path).with_text(model_id)


@given(st.lists(REQUESTS, max_size=3), TEXTS)
def test_a_field_of_the_message_reads_as_set(parts: list[dict], model_id: str) -> None:
    """The field may have been set before, once or repeatedly."""
    message = encoded(parts)
    expected = PredictRequest.FromString(message)
    expected.model_name = model_id
    assert PredictRequest.FromString(splice(message, (1,), model_id.encode())) == expected


@given(st.lists(REQUESTS, max_size=3), TEXTS)
def test_a_field_of_an_embedded_message_reads_as_set(parts: list[dict], model_id: str) -> None:
    """Splicing into an embedded message changes only its id. Repeated occurrences of the message are merged, and a
    missing one is created."""
    message = encoded(parts)
    expected = PredictRequest.FromString(message)
    expected.inner.model_name = model_id
    spliced = splice(message, (3, 7), model_id.encode())
    assert PredictRequest.FromString(spliced) == expected
    assert spliced.count(b"\x1a") == 0 or PredictRequest.FromString(spliced).inner.model_name == model_id


@given(st.lists(REQUESTS, min_size=1, max_size=3), TEXTS)
def test_only_one_occurrence_is_left(parts: list[dict], model_id: str) -> None:
    """No former id stays in a spliced message, not even where only a parser that takes the first occurrence would find
    it."""
    once = splice(encoded(parts), (3, 7), model_id.encode())
    assert splice(once, (3, 7), model_id.encode()) == splice(
        splice(once, (3, 7), b"x" * 300), (3, 7), model_id.encode()
    )


@given(st.binary(max_size=60), st.lists(st.integers(1, 40), min_size=1, max_size=3))
def test_any_bytes_are_spliced_or_refused(message: bytes, path: list[int]) -> None:
    try:
        spliced = splice(message, path, b"id")
    except SpliceError:
        return
    assert splice(spliced, path, b"id") == splice(spliced, path, b"id")
    assert b"id" in spliced


@pytest.mark.parametrize(
    ("message", "why"),
    [
        pytest.param(b"\x08\x01", "neither a string", id="a number at the path"),
        pytest.param(b"\x0d\0\0\0\0", "neither a string", id="a fixed number at the path"),
        pytest.param(b"\x12\x05ab", "longer than the rest of the message", id="cut off"),
        pytest.param(b"\xff\xff", "a varint is cut off", id="an endless number"),
        pytest.param(b"\x13\x0c", "a group that is not open", id="another group ends"),
        pytest.param(b"\x07", "the number 0", id="field 0"),
        pytest.param(b"\x17", "wire type 7", id="an unknown wire type"),
    ],
)
def test_what_is_wrong_is_said(message: bytes, why: str) -> None:
    with pytest.raises(SpliceError, match=why):
        splice(message, (1,), b"id")


def test_groups_and_unknown_fields_stay() -> None:
    group = b"\x2b\x30\x05\x2c"  # field 5, a group with field 6
    assert splice(group + b"\x0a\x01a", (1,), b"id") == group + b"\x0a\x02id"


def test_values_are_added_to_a_repeated_field() -> None:
    message = inference_pb2.ModelMetadataResponse(name="m", versions=["1"]).SerializeToString()
    assert inference_pb2.ModelMetadataResponse.FromString(append(message, 2, [b"2", b"3"])).versions == ["1", "2", "3"]


def test_a_field_is_dropped_wherever_it_stands() -> None:
    """A message without the field is returned as it is. A field that is not a string is refused."""
    message = inference_pb2.ModelInferRequest(model_name="m", model_version="1", id="7")
    twice = message.SerializeToString() + inference_pb2.ModelInferRequest(model_version="2").SerializeToString()
    left = drop(twice, 2)
    assert inference_pb2.ModelInferRequest.FromString(left) == inference_pb2.ModelInferRequest(model_name="m", id="7")
    assert drop(left, 2) is left
    with pytest.raises(SpliceError):
        drop(b"\x10\x01", 2)
