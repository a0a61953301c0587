"""Protobuf messages of types that Hypothesis makes up: any field numbers, any kinds of fields, and a path through
nested messages to a string."""

from dataclasses import dataclass
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import strategies as st

_FIELD = descriptor_pb2.FieldDescriptorProto
_ONE, _SEVERAL = _FIELD.LABEL_OPTIONAL, _FIELD.LABEL_REPEATED
_TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=150)

_KINDS: dict[int, st.SearchStrategy[Any]] = {
    _FIELD.TYPE_STRING: _TEXTS,
    _FIELD.TYPE_BYTES: st.binary(max_size=150),
    _FIELD.TYPE_INT64: st.integers(-(2**63), 2**63 - 1),
    _FIELD.TYPE_UINT32: st.integers(0, 2**32 - 1),
    _FIELD.TYPE_BOOL: st.booleans(),
    _FIELD.TYPE_DOUBLE: st.floats(allow_nan=False),
    _FIELD.TYPE_FLOAT: st.floats(width=32, allow_nan=False),
    _FIELD.TYPE_SFIXED64: st.integers(-(2**63), 2**63 - 1),
    _FIELD.TYPE_FIXED32: st.integers(0, 2**32 - 1),
}

_NUMBERS = st.one_of(st.integers(1, 20), st.integers(1, 18_999), st.integers(20_000, (1 << 29) - 1))


@dataclass(frozen=True)
class Made:
    """A message of a made-up type, and the path of field numbers to one of its strings."""

    message: Any
    path: tuple[int, ...]

    @property
    def encoded(self) -> bytes:
        """The message as protobuf writes it."""
        return self.message.SerializeToString()

    @property
    def text(self) -> str | None:
        """The string at the path as protobuf reads it, or None if the string or a message on the path is not set."""
        at = self.message
        for depth in range(len(self.path)):
            if not at.HasField(f"on{depth}"):
                return None
            at = getattr(at, f"on{depth}")
        return at

    def parse(self, data: bytes) -> Any:
        return type(self.message).FromString(data)

    def with_text(self, text: str) -> Any:
        """Returns a copy of the message in which protobuf has set the string at the path."""
        copy = type(self.message)()
        copy.CopyFrom(self.message)
        at = copy
        for depth in range(len(self.path) - 1):
            at = getattr(at, f"on{depth}")
        setattr(at, f"on{len(self.path) - 1}", text)
        return copy


@st.composite
def made(draw: st.DrawFn, max_depth: int = 4) -> Made:
    """Returns messages of made-up types. All fields have explicit presence, so even an empty string is written."""
    path = tuple(draw(st.lists(_NUMBERS, min_size=1, max_size=max_depth)))
    file = descriptor_pb2.FileDescriptorProto(name="made.proto", package="made", syntax="proto2")
    others: list[dict[str, Any]] = []
    for depth, number in enumerate(path):
        kind = file.message_type.add(name=f"M{depth}")
        on = kind.field.add(name=f"on{depth}", number=number, label=_ONE)
        if depth < len(path) - 1:
            on.type, on.type_name = _FIELD.TYPE_MESSAGE, f".made.M{depth + 1}"
        else:
            on.type = _FIELD.TYPE_STRING
        values: dict[str, Any] = {}
        numbers = draw(st.lists(_NUMBERS.filter(lambda one, own=number: one != own), unique=True, max_size=4))
        for other in numbers:
            label, of = draw(st.sampled_from((_ONE, _SEVERAL))), draw(st.sampled_from(sorted(_KINDS)))
            kind.field.add(name=f"f{other}", number=other, type=of, label=label)
            one = _KINDS[of]
            if draw(st.booleans()):
                values[f"f{other}"] = draw(one if label == _ONE else st.lists(one, max_size=3))
        others.append(values)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    types = [
        message_factory.GetMessageClass(pool.FindMessageTypeByName(f"made.M{depth}")) for depth in range(len(path))
    ]
    inner: Any = draw(st.none() | _TEXTS)
    for depth in reversed(range(len(path))):
        on = {} if inner is None else {f"on{depth}": inner}
        inner = None if on == {} and depth and draw(st.booleans()) else types[depth](**others[depth], **on)
    return Made(inner, path)
