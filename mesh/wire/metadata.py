"""Metadata as it travels in HTTP/1.1 headers and trailers: time-outs, status texts, binary values, and whole blocks.

The rules are gRPC's (grpc/grpc, doc/PROTOCOL-HTTP2.md). This module enforces two more for both ends: no value from a
handler or a caller can end a line or the head early (it could then forge a reply), and the transport's own names are
neither shown to handlers nor accepted from them.
"""

import binascii
import math
import re
import urllib.parse
from collections.abc import Iterable
from typing import Self

from mesh.telemetry import logs
from mesh.wire import call

log = logs.get(__name__)

# --- names of the transport ---

_FRAMING = frozenset({
    b"connection", b"content-length", b"content-type", b"expect", b"host", b"http2-settings", b"keep-alive",
    b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade",
})  # fmt: skip
_STATUS = frozenset({b"grpc-status", b"grpc-message", b"grpc-timeout"})

# Envoy adds these. They say nothing about the call, and vary between calls.
_ENVOY = frozenset({
    b"x-envoy-attempt-count", b"x-envoy-decorator-operation", b"x-envoy-downstream-service-cluster",
    b"x-envoy-downstream-service-node", b"x-envoy-expected-rq-timeout-ms", b"x-envoy-external-address",
    b"x-envoy-internal", b"x-envoy-original-path", b"x-envoy-peer-metadata",
    b"x-envoy-peer-metadata-id", b"x-envoy-upstream-service-time",
    b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-port", b"x-forwarded-proto",
    b"x-request-id",
})  # fmt: skip

NOT_METADATA = (
    _FRAMING | _STATUS | _ENVOY | {b"accept-encoding", b"date", b"grpc-accept-encoding", b"grpc-encoding", b"server"}
)
"""Names that are removed from received metadata. In sent metadata, the handler may set some of them, such as
`grpc-encoding`."""

RESERVED = _FRAMING | _STATUS
"""Names that only the transport may set."""

DETAILS = b"grpc-status-details-bin"
"""The trailer with an encoded google.rpc.Status: a failure's reason, for programs."""

# --- time-outs ---

_UNITS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_MAX_DIGITS = 8


def parse_timeout(value: bytes) -> float | None:
    """Returns the seconds of a `grpc-timeout`, such as b"500m" or b"2S", or None if it is invalid."""
    unit = _UNITS.get(value[-1:])
    digits = value[:-1]
    if unit is None or not digits.isdigit() or len(digits) > _MAX_DIGITS:
        return None
    return int(digits) * unit


def format_timeout(seconds: float) -> bytes:
    """Returns a `grpc-timeout` of at least `seconds`, in the finest unit that fits 8 digits; b"1n" if the time is
    over."""
    if not seconds > 0:  # NaN too
        return b"1n"
    if seconds < 99:
        return b"%du" % math.ceil(seconds * 1e6)
    if seconds < 99_999:
        return b"%dm" % math.ceil(seconds * 1e3)
    if seconds < 99_999_999:
        return b"%dS" % math.ceil(seconds)
    return b"99999999S"  # three years


# --- status texts ---

_TEXT_PLAIN = bytes(set(range(0x20, 0x7F)) - {0x25})  # printable, without %
_TEXT_SPECIAL = re.compile(rb"[^\x20-\x24\x26-\x7e]|^ | $")  # spaces at the ends would be lost in transit
_MAX_TEXT = 4096  # bytes; gRPC clients refuse a reply with more than 8 KiB of metadata, which would lose the whole text


def encode_text(text: str) -> bytes:
    """Encodes a status text for `grpc-message`: UTF-8, percent-encoded; cut off after 4 KiB."""
    raw = text[:_MAX_TEXT].encode("utf-8", "replace")
    if raw.translate(None, _TEXT_PLAIN) or raw[:1] == b" " or raw[-1:] == b" ":
        raw = _TEXT_SPECIAL.sub(lambda match: b"%%%02X" % match[0][0], raw)
    if len(raw) <= _MAX_TEXT and len(text) <= _MAX_TEXT:
        return raw
    cut = raw[: _MAX_TEXT - 3]
    return re.sub(rb"%.?$", b"", cut).rstrip(b" ") + b"..."


def decode_text(raw: bytes) -> str:
    """Decodes the status text in a `grpc-message`. Invalid parts are kept or replaced, and never raise an error."""
    return urllib.parse.unquote_to_bytes(raw).decode("utf-8", "replace") if raw else ""


# --- binary values ---


def decode_bin(value: bytes) -> bytes:
    """Decodes a `-bin` value: base64, with or without its padding. Raises ValueError."""
    return binascii.a2b_base64(value.rstrip(b"=") + b"=" * (-len(value.rstrip(b"=")) % 4), strict_mode=True)


def encode_bin(value: bytes) -> bytes:
    """Encodes bytes as a `-bin` value: base64 without padding, as gRPC asks for."""
    return binascii.b2a_base64(value, newline=False).rstrip(b"=")


# --- blocks of headers ---

_VALUE = bytes(range(0x20, 0x7F))
_NAME = re.compile(rb"[0-9a-z_.!#$%&'*+^`|~-]+")
_MAX_LINES = 4096
_MAX_LINE = 256  # bytes

# Cache of valid headers and their lines: a look-up takes 0.1 us, checking and writing a header 0.5 us.
_lines: dict[call.Header, bytes] = {}
_line_of = _lines.__getitem__
_warned: set[bytes] = set()  # names whose omission was logged, so that each is logged once


class Block(tuple[call.Header, ...]):
    """Headers that are sent with many calls. Their lines are made once."""

    lines: bytes

    def __new__(cls, headers: Iterable[call.Header]) -> Self:
        """Makes a block, and the lines of its headers."""
        made = super().__new__(cls, headers)
        made.lines = encode_headers(tuple(made))
        return made


def encode_headers(headers: call.Headers) -> bytes:
    """Returns the lines of a head or of trailers, each with its line end; b"" for none.

    Metadata that cannot be sent is left out, with one log line for each name: names that are not lower-case header
    names or are reserved for the transport, and values with anything but printable ASCII (gRPC allows no other).
    """
    if not headers:
        return b""
    if type(headers) is Block:
        return headers.lines
    try:
        return b"".join(map(_line_of, headers))
    except KeyError:
        return b"".join([_lines.get(header) or _line(*header) for header in headers])


def _line(name: bytes, value: bytes) -> bytes:
    if name in RESERVED or _NAME.fullmatch(name) is None:
        return _drop(name, "its name")
    if value.translate(None, _VALUE):
        return _drop(name, "its value")
    line = b"%b: %b\r\n" % (name, value)
    if len(line) <= _MAX_LINE:
        if len(_lines) >= _MAX_LINES:
            _lines.clear()
        _lines[name, value] = line
    return line


def _drop(name: bytes, what: str) -> bytes:
    if name not in _warned and len(_warned) < _MAX_LINES:
        _warned.add(name)
        log.warning("metadata cannot be sent and is left out", name=name[:100], because=what)
    return b""
