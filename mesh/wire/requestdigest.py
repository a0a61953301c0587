"""A digest of a request's content, which identifies a request that crashed a model server.

The model's name and version and the request's `id` are left out: a caller that retries may send another id, and the
same model may be called by an alias. For a long request the digest covers only the beginning and the length, so it is
cheap, and can be computed from the part of a request that is left in a dead server's shared memory.
"""

import hashlib

from mesh.wire import encoding, framing

KEPT = 65536
"""Bytes of a frame that are enough to compute its digest."""

SIZE = 16
"""Bytes of a digest."""

_HASHED = KEPT // 2  # the omitted fields fit into the other half; longer ones are not omitted
_FIELDS = 1000  # number of fields that are examined; the bytes after them are digested unchanged
_NAMES = (0x0A, 0x12, 0x1A)  # tags of a ModelInferRequest's fields


def digest(frame: bytes | memoryview, size: int = 0) -> bytes:
    """Returns the digest of the request in a frame. `frame` may be only the first `KEPT` bytes; `size` is then the
    number of bytes of the whole frame (0: as many as `frame` has). Never raises."""
    view = memoryview(frame)
    size = (size or len(view)) - framing.PREFIX
    hashed = hashlib.blake2b(digest_size=SIZE)
    view = view[: KEPT + framing.PREFIX]
    left = _HASHED
    body = view[framing.PREFIX :]
    before = 0
    if view and not view[0]:
        try:
            for tag, _, end in encoding.fields(body, limit=_FIELDS):
                if tag in _NAMES:
                    size -= end - before
                elif left:
                    piece = body[before : min(end, before + left)]
                    hashed.update(piece)
                    left -= len(piece)
                before = end
        except ValueError:
            pass  # the kept part ends here, or the bytes are not a message
    hashed.update(body[before : before + left])
    hashed.update(b"%d" % size)
    return hashed.digest()
