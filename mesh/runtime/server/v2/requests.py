"""A ModelInferRequest from the bytes that it came as, without more work than its use is worth.

Protobuf reads whatever a message holds: four million empty texts, a shape of three million dimensions, a hundred
thousand inputs. Those are a few MB to send and seconds to read, with the interpreter's lock held, while every other
model of the pod waits. So a message above 16 KiB is only *outlined* before protobuf sees it: raw and typed contents are
cut out, uncopied, and read later for the input that they belong to, by as many elements as that input's shape has; and
there is a bound to the fields that are looked at.

`light` tells what may be read in the event loop. All else is read in a thread, after its call was counted, by `read`.
"""

from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError

from mesh.pb import inference_pb2
from mesh.runtime.server.v2.tensors import MAX_RANK, Raw, bad
from mesh.statuses import MeshError, Reason
from mesh.wire import encoding, framing

SMALL = 16384
"""Bytes that are read in the event loop, whatever they hold: at worst 3 ms. Cutting contents out costs 3 us, which is
less than protobuf's copying from here on."""

MEDIUM = 128 << 10
"""Bytes of a message with typed contents that are still read in the event loop: as numbers, 5 ms at worst."""

LARGE = 1 << 20
"""Bytes of raw contents beyond which even copying them is done in a thread."""

_NAME, _INPUT, _RAW = 0x0A, 0x2A, 0x3A  # tags of a ModelInferRequest's fields
_SHAPE, _CONTENTS = 0x1A, 0x2A  # of an input's, the shape being packed
_LONGEST_SHAPE = 10 * MAX_RANK  # bytes

_parse = inference_pb2.ModelInferRequest.FromString


Request = tuple[Any, "list[Raw] | Any", list[Raw] | None]
"""A request that is read but for its contents: the ModelInferRequest; its raw contents, one an input, or none where
they are typed; its encoded typed contents, one an input, or None where they stand in the message."""


@dataclass(frozen=True, slots=True)
class Heavy:
    """A request that is not to be read in the event loop."""

    frame: bytes
    encoding: bytes
    limit: int  # bytes of the message


def light(frame: bytes, encoding_: bytes, *, limit: int) -> Request | Heavy:
    """Reads a request as far as that is quick. Raises `MeshError`."""
    try:
        if len(frame) <= SMALL:
            message: bytes | None = frame[5:] if not frame[0] else _unfolded(frame, encoding_, limit)
            if message is not None:
                request = _parse(message)
                return request, request.raw_input_contents, None
        elif not frame[0]:
            rest, raws = split(memoryview(frame)[5:])
            if len(rest) <= SMALL:
                return _parse(rest), raws, None
            if len(frame) <= MEDIUM:
                rest, raws, contents = outline(memoryview(frame)[5:])
                if len(rest) <= SMALL:
                    return _parse(rest), raws, contents
        return Heavy(frame, encoding_, limit)
    except (DecodeError, ValueError) as error:
        raise _garbage(error) from error


def read(heavy: Heavy) -> Request:
    """Reads one that is not. For a thread: it may take as long as its size allows. Raises `MeshError`."""
    try:
        frame = heavy.frame
        message = framing.unpack(frame, heavy.encoding, limit=heavy.limit) if frame[0] else memoryview(frame)[5:]
        rest, raws, contents = outline(memoryview(message))
        return _parse(rest), raws, contents
    except (DecodeError, ValueError) as error:
        raise _garbage(error) from error


def name(request: Request | Heavy) -> bytes:
    """Returns the name of the model. Raises `MeshError` where it cannot be told without unfolding the message."""
    if not isinstance(request, Heavy):
        return request[0].model_name.encode()  # type: ignore[no-any-return]
    if request.frame[0]:
        raise bad("a compressed message above 16 KiB must name its model in the metadata: mm-model-id")
    found = b""
    view = memoryview(request.frame)[5:]
    for tag, start, end in encoding.fields(view):
        if tag == _NAME:
            found = bytes(view[start:end])
    return found


def split(message: memoryview) -> tuple[bytes, list[Raw]]:
    """Cuts the raw contents, uncopied, out of an encoded ModelInferRequest. Raises ValueError where malformed."""
    rest = []
    raws: list[Raw] = []
    before = 0
    for tag, start, end in encoding.fields(message):
        if tag == _RAW:
            raws.append(message[start:end])
        else:
            rest.append(message[before:end])
        before = end
    return b"".join(rest), raws


def outline(message: memoryview) -> tuple[bytes, list[Raw], list[Raw]]:
    """Cuts all contents out of an encoded ModelInferRequest: the rest, the raw ones, the typed ones of each input.

    Raises ValueError where malformed, and `MeshError` for what no model could be fed."""
    rest: list[Raw] = []
    raws: list[Raw] = []
    contents: list[Raw] = []
    before = 0
    left = encoding.MAX_FIELDS
    for tag, start, end in encoding.fields(message):
        left -= 1
        if tag == _RAW:
            raws.append(message[start:end])
        elif tag == _INPUT:
            kept, typed, left = _without_contents(message[start:end], left)
            rest += (b"\x2a", encoding.varint(len(kept)), kept)
            contents.append(typed)
        else:
            rest.append(message[before:end])
        before = end
    return b"".join(rest), raws, contents


def _without_contents(message: memoryview, left: int) -> tuple[bytes, Raw, int]:
    """Cuts the contents out of an encoded input; also returns how many fields may still be looked at."""
    kept: list[Raw] = []
    pieces: list[Raw] = []  # protobuf joins a message that comes in several pieces
    before = 0
    for tag, start, end in encoding.fields(message, limit=left):
        left -= 1
        if tag == _CONTENTS:
            pieces.append(message[start:end])
        else:
            if tag == _SHAPE and end - start > _LONGEST_SHAPE:
                raise bad(f"an input has a shape of more than the {MAX_RANK} dimensions that this server handles")
            kept.append(message[before:end])
        before = end
    return b"".join(kept), pieces[0] if len(pieces) == 1 else b"".join(pieces), left


def _unfolded(frame: bytes, encoding_: bytes, limit: int) -> bytes | None:
    """Unpacks a compressed message; None where it is not small. Raises `MeshError`."""
    try:
        return framing.unpack(frame, encoding_, limit=min(SMALL, limit))
    except framing.FrameError as error:
        if error.reason is Reason.TOO_LARGE and limit > SMALL:
            return None
        raise


def _garbage(error: Exception) -> MeshError:
    return bad(f"the message is not a ModelInferRequest: {error}")
