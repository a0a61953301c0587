"""Protobuf's text format without a schema, compared with Protobuf's own reader and Triton's schema."""

import pytest
from google.protobuf import text_format
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2

from mesh.modelfiles import pbtxt
from mesh.modelfiles.pbtxt import BadText, Field, Message, Word

LAYOUT = """
# A comment, "with: { quotes
name: "theirs"  backend: 'py' "thon"
input [ { name: "a", data_type: TYPE_FP32 dims: [ -1, 3 ] }, <name: "b"; dims: 0x10> ]
output: { name: "\\x41\\101\\u00fc\\n\\"" dims: [] },
instance_group [ { kind: KIND_CPU count: 2; } ];
dynamic_batching { }
parameters: { key: "k" value: { string_value: 'it''s' } }
version_policy: { specific: { versions: [1, 2] } } max_batch_size:8
optimization { cuda { graphs: true } gather_kernel_buffer_threshold: 5 }
response_cache { enable: false } model_warmup { name: "w" batch_size: 1 }
"""


def theirs(text: str) -> model_config_pb2.ModelConfig:
    """Returns the message that Protobuf's own reader makes from a text."""
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def test_a_description_means_the_same_after_reading_and_writing() -> None:
    """Everything in a description survives reading and writing, except comments and separators."""
    read = pbtxt.parse(LAYOUT)
    assert theirs(pbtxt.to_text(read)) == theirs(LAYOUT)
    assert read.all("backend") == [b"python"]
    assert read.all("max_batch_size") == [Word("8")]
    assert pbtxt.parse("a: - 5").all("a") == [Word("-5")]
    assert pbtxt.parse(pbtxt.to_text(read)) == read


def test_fields_are_left_out_and_added() -> None:
    read = pbtxt.parse('name: "x" max_batch_size: 8')
    made = read.without("name").plus([Field("backend", b"fil")])
    assert theirs(pbtxt.to_text(made)) == model_config_pb2.ModelConfig(max_batch_size=8, backend="fil")


names = st.sampled_from(("name", "backend", "platform", "default_model_filename"))
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
dims = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4)
tensors = st.builds(
    lambda name, kind, sizes: model_config_pb2.ModelInput(name=name, data_type=kind, dims=sizes),
    texts,
    st.sampled_from(list(model_config_pb2.DataType.values())),
    dims,
)
configs = st.builds(
    lambda strings, inputs, parameters, batch: model_config_pb2.ModelConfig(
        **strings,
        input=inputs,
        max_batch_size=batch,
        parameters={key: model_config_pb2.ModelParameter(string_value=value) for key, value in parameters.items()},
    ),
    st.dictionaries(names, texts),
    st.lists(tensors, max_size=3),
    st.dictionaries(texts, texts, max_size=3),
    st.integers(-(2**31), 2**31 - 1),
)


@settings(max_examples=100, deadline=None)
@given(configs, st.booleans(), st.booleans(), st.booleans())
def test_any_description_is_read_as_protobuf_reads_it(
    config: model_config_pb2.ModelConfig, line: bool, short: bool, utf8: bool
) -> None:
    """Descriptions in each of Protobuf's own styles mean the same after reading and writing."""
    text = text_format.MessageToString(config, as_one_line=line, use_short_repeated_primitives=short, as_utf8=utf8)
    assert theirs(pbtxt.to_text(pbtxt.parse(text))) == config


words = st.sampled_from(
    (
        "name",
        "input",
        "dims",
        ":",
        "{",
        "}",
        "[",
        "]",
        "<",
        ">",
        ",",
        ";",
        "-",
        "1",
        "'a'",
        '"b"',
        "\n",
        "#c\n",
        "1.5f",
        "\\",
    )
)


@settings(max_examples=300, deadline=None)
@given(st.lists(words, max_size=12).map(" ".join))
def test_what_protobuf_refuses_is_never_read_as_something_else(text: str) -> None:
    """A text is either refused, or Protobuf's own reader reads the rewritten text like the original."""
    try:
        read = pbtxt.parse(text)
    except BadText as error:
        assert str(error)
        return
    written = pbtxt.to_text(read)
    assert pbtxt.parse(written) == read
    try:
        expected = theirs(text)
    except text_format.ParseError:
        return  # such as an unknown field, or a value of the wrong type
    assert theirs(written) == expected


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40) | st.text(max_size=40))
def test_no_text_does_more_than_be_refused(text: bytes | str) -> None:
    """For any bytes, the reader returns a message or raises its own error."""
    try:
        assert isinstance(pbtxt.parse(text), Message)
    except BadText as error:
        assert str(error)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a", "line 1: expected ':' or '{', but found the end"),
        ("a:\n\n}", "line 3: expected a value, but found '}'"),
        ("a {\n b: 1", "line 2: expected a field's name or '}'"),
        ('a: "x', "line 1: '\"x' cannot be read"),
        ("a: 1x", "line 1: '1x' cannot be read"),
        ("[x.y]: 1", r"expected a field's name, but found '\['"),
        (r'a: "\q"', "is not a valid escape"),
        (r'a: "\ud800"', "is not a valid escape"),
        (r'a: "\777"', "is not a valid escape"),
        ("a: [1,]", "expected a value"),
        ("a: [1 2]", r"expected ',' or '\]'"),
        ("a{" * 60, "more than 50 levels deep"),
        (b"\xff", "not UTF-8"),
        (b" " * (pbtxt.MAX_BYTES + 1), "more than 1,048,576 bytes"),
    ],
)
def test_an_error_says_where_and_why(text: str | bytes, says: str) -> None:
    with pytest.raises(BadText, match=says):
        pbtxt.parse(text)
