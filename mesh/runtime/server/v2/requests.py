"""The reading of a ModelInferRequest, at a cost that depends on the model's inputs, not on the sender.

Protobuf reads everything in a message: four million empty strings, a shape of three million dimensions, a hundred
thousand inputs. Such messages have only a few MB, but take seconds to read, with the interpreter's lock held, while
every other model of the pod waits. A message above 16 KiB is therefore first *outlined*, before protobuf reads it: raw
and typed contents are cut out without a copy. They are read later, for their input, up to the number of elements in its
shape. The number of fields that are read is limited.

`light` reads requests that may be read in the event loop. `read` reads the others in a thread, once the call has been
counted.
"""

from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError

from mesh.pb import inference_pb2
from mesh.runtime.server.v2.tensors import MAX_RANK, Raw, bad
from mesh.statuses import MeshError, Reason
from mesh.wire import encoding, framing

SMALL = 16384
"""Size in bytes up to which every message is read in the event loop, at worst in 3 ms. For larger messages, cutting out
contents (3 us) costs less than protobuf's copies of them."""

MEDIUM = 128 << 10
"""Size in bytes up to which a message with typed numbers is read in the event loop, at worst in 5 ms."""

LARGE = 1 << 20
"""Size of raw contents, in bytes, above which a thread copies them."""

_NAME, _INPUT, _RAW = 0x0A, 0x2A, 0x3A  # tags of a ModelInferRequest's fields
_SHAPE, _CONTENTS = 0x1A, 0x2A  # of an input's fields; the shape is packed
_LONGEST_SHAPE = 10 * MAX_RANK  # bytes

_parse = inference_pb2.ModelInferRequest.FromString


Request = tuple[Any, "list[Raw] | Any", list[Raw] | None]
"""A request that has been read except for its contents: the ModelInferRequest; its raw contents, one for each input, or
none if they are typed; its encoded typed contents, one for each input, or None if they are in the message."""


@dataclass(frozen=True, slots=True)
class Heavy:
    """A request that must not be read in the event loop."""

    frame: bytes
    encoding: bytes
    limit: int  # bytes of the message


def light(frame: bytes, encoding_: bytes, *, limit: int) -> Request | Heavy:
    """Reads a request if that is quick, and otherwise returns a `Heavy`. Raises `MeshError`."""
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
    """Reads a heavy request. Must run in a thread: the time depends on the size. Raises `MeshError`."""
    try:
        frame = heavy.frame
        message = framing.unpack(frame, heavy.encoding, limit=heavy.limit) if frame[0] else memoryview(frame)[5:]
        rest, raws, contents = outline(memoryview(message))
        return _parse(rest), raws, contents
    except (DecodeError, ValueError) as error:
        raise _garbage(error) from error


def name(request: Request | Heavy) -> bytes:
    """Returns the name of the model. Raises `MeshError` if the name cannot be read without decompressing the
    message."""
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
    """Cuts the raw contents, uncopied, out of an encoded ModelInferRequest. Raises ValueError if malformed."""
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
    """Cuts all contents out of an encoded ModelInferRequest. Returns the rest, the raw contents, and the typed contents
    of each input.

    Raises ValueError if the message is malformed, and `MeshError` for contents that no model accepts.
    """
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
    """Cuts the contents out of an encoded input. Returns the rest, the contents, and the number of fields that may
    still be read."""
    kept: list[Raw] = []
    pieces: list[Raw] = []  # protobuf joins a message that comes in several pieces
    before = 0
    for tag, start, end in encoding.fields(message, limit=left):
        left -= 1
        if tag == _CONTENTS:
            pieces.append(message[start:end])
        else:
            if tag == _SHAPE and end - start > _LONGEST_SHAPE:
                raise bad(
                    f"an input has a shape of more than {MAX_RANK} dimensions, the most that this server supports"
                )
            kept.append(message[before:end])
        before = end
    return b"".join(kept), pieces[0] if len(pieces) == 1 else b"".join(pieces), left


def _unfolded(frame: bytes, encoding_: bytes, limit: int) -> bytes | None:
    """Decompresses a message. Returns None if the result is not small. Raises `MeshError`."""
    try:
        return framing.unpack(frame, encoding_, limit=min(SMALL, limit))
    except framing.FrameError as error:
        if error.reason is Reason.TOO_LARGE and limit > SMALL:
            return None
        raise


def _garbage(error: Exception) -> MeshError:
    return bad(f"the message is not a ModelInferRequest: {error}")
