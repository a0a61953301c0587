"""Protobuf's text format, without a schema: enough to read, change and write a Triton model's `config.pbtxt`.

The reader is stricter than Protobuf's own where the two could disagree about a text. The writer makes a text from the
fields that were read, and copies nothing, so that the server sees exactly the fields that were checked here. Reader and
writer are pure.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

MAX_BYTES = 1 << 20
_MAX_DEPTH = 50
_SHOWN = 40  # characters of the text in an error


class BadText(ValueError):
    """A text that is not in the format. The error says where and why."""


@dataclass(frozen=True, slots=True)
class Word:
    """A number, a truth value, or the name of an enum's value."""

    text: str


@dataclass(frozen=True, slots=True)
class Message:
    """The fields of a message, in order. A list is one field for each of its values."""

    fields: tuple["Field", ...] = ()

    def all(self, name: str) -> list["Value"]:
        """Returns the values of all fields with that name."""
        return [field.value for field in self.fields if field.name == name]

    def without(self, *names: str) -> "Message":
        """Returns the message without the fields that have one of these names."""
        return Message(tuple(field for field in self.fields if field.name not in names))

    def plus(self, fields: Iterable["Field"]) -> "Message":
        """Returns the message with further fields at its end."""
        return Message((*self.fields, *fields))


Value = Word | bytes | Message
"""A field's value; bytes are a string."""


@dataclass(frozen=True, slots=True)
class Field:
    """A field and one value of it."""

    name: str
    value: Value


_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n\v\f]+|\#[^\n]*)
    |(?P<word>[A-Za-z_][A-Za-z0-9_]*|(?:0[xX][0-9A-Fa-f]+|(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?[fF]?)(?![\w.]))
    |(?P<text>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
    |(?P<mark>[:{}<>\[\],;-])""",
    re.VERBOSE,
)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ESCAPE = re.compile(r"\\(?:([0-7]{1,3})|[xX]([0-9A-Fa-f]{1,2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))", re.DOTALL)
_SIMPLE = {"a": 7, "b": 8, "f": 12, "n": 10, "r": 13, "t": 9, "v": 11, "?": 63, "\\": 92, "'": 39, '"': 34}
_ENDS = {"{": "}", "<": ">"}


def parse(text: str | bytes) -> Message:
    """Returns the message of a text. Raises BadText."""
    if isinstance(text, bytes):
        if len(text) > MAX_BYTES:
            raise BadText(f"it has more than {MAX_BYTES:,} bytes")
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            raise BadText("it is not UTF-8") from error
    return _Parser(text).message("", 0)


def to_text(message: Message) -> str:
    """Returns the text of a message."""
    return "".join(f"{line}\n" for line in _lines(message, ""))


class _Parser:
    def __init__(self, text: str) -> None:
        self._tokens = _tokens(text)
        self._next()

    def _next(self) -> None:
        self._kind, self._text, self._line = next(self._tokens)

    def _take(self, *marks: str) -> str:
        """Consumes and returns the next token if it is one of these marks; returns "" otherwise."""
        if self._kind != "mark" or self._text not in marks:
            return ""
        mark = self._text
        self._next()
        return mark

    def _expected(self, what: str) -> BadText:
        found = repr(self._text[:_SHOWN]) if self._text else "the end"
        return BadText(f"line {self._line}: expected {what}, but found {found}")

    def message(self, end: str, depth: int) -> Message:
        """Reads fields up to a mark, or up to the end of the text."""
        if depth > _MAX_DEPTH:
            raise BadText(f"line {self._line}: messages are nested more than {_MAX_DEPTH} levels deep")
        fields: list[Field] = []
        while not (self._take(end) if end else self._kind == "end"):
            if self._kind != "word" or not _NAME.fullmatch(self._text):
                raise self._expected(f"a field's name or {end!r}" if end else "a field's name")
            name = self._text
            self._next()
            colon = self._take(":")
            if mark := self._take("{", "<"):
                fields.append(Field(name, self.message(_ENDS[mark], depth + 1)))
            elif self._take("["):
                fields += [Field(name, value) for value in self._list(depth)]
            elif colon:
                fields.append(Field(name, self._scalar()))
            else:
                raise self._expected("':' or '{'")
            self._take(",", ";")
        return Message(tuple(fields))

    def _list(self, depth: int) -> Iterator[Value]:
        if self._take("]"):
            return
        while True:
            mark = self._take("{", "<")
            yield self.message(_ENDS[mark], depth + 1) if mark else self._scalar()
            if self._take("]"):
                return
            if not self._take(","):
                raise self._expected("',' or ']'")

    def _scalar(self) -> Word | bytes:
        if self._kind == "text":
            parts = b""
            while self._kind == "text":  # adjacent strings are one
                parts += self._unescaped(self._text[1:-1])
                self._next()
            return parts
        sign = self._take("-")
        if self._kind != "word":
            raise self._expected("a value")
        word = Word(sign + self._text)
        self._next()
        return word

    def _unescaped(self, text: str) -> bytes:
        parts: list[bytes] = []
        at = 0
        for found in _ESCAPE.finditer(text):
            parts.append(text[at : found.start()].encode())
            at = found.end()
            octal, hexadecimal, short, long, simple = found.groups()
            number = int(octal, 8) if octal else int(hexadecimal, 16) if hexadecimal else _SIMPLE.get(simple or "", 256)
            if short or long:
                try:
                    parts.append(chr(int(short or long, 16)).encode())
                except ValueError:  # no character, or half of one
                    number = 256
                else:
                    continue
            if number > 255:
                raise BadText(f"line {self._line}: {found[0]!r} is not a valid escape")
            parts.append(bytes([number]))
        parts.append(text[at:].encode())
        return b"".join(parts)


def _tokens(text: str) -> Iterator[tuple[str, str, int]]:
    at, line = 0, 1
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise BadText(f"line {line}: {text[at : at + _SHOWN].splitlines()[0]!r} cannot be read")
        kind, content = str(found.lastgroup), found[0]
        if kind != "space":
            yield kind, content, line
        line += content.count("\n")
        at = found.end()
    while True:
        yield "end", "", line


def _lines(message: Message, indent: str) -> Iterator[str]:
    for field in message.fields:
        match field.value:
            case Message() as inner:
                yield f"{indent}{field.name} {{"
                yield from _lines(inner, indent + "  ")
                yield f"{indent}}}"
            case bytes() as text:
                yield f'{indent}{field.name}: "{_escaped(text)}"'
            case Word(text=word):
                yield f"{indent}{field.name}: {word}"


def _escaped(text: bytes) -> str:
    plain = {byte: chr(byte) for byte in range(32, 127)} | {34: '\\"', 92: "\\\\"}
    return "".join(plain.get(byte) or f"\\{byte:03o}" for byte in text)
