"""The metadata that the relay forwards, and its conversion for `grpc.aio`, where binary values are bytes, not
base64."""

from collections.abc import Iterable

from mesh.wire import headers
from mesh.wire import metadata as wire
from mesh.wire.call import Header, Headers

Pairs = tuple[tuple[str, str | bytes], ...]

_NOT_SENT = (headers.INTERNAL, b"grpc-", b"mm-")
_NAMES_NOT_SENT = frozenset({headers.LEGACY_MODEL_ID, b"content-type", b"user-agent", b"te", b"host"})


def to_server(received: Iterable[Header], model_id: str) -> list[Header]:
    """Returns the metadata that a foreign server gets: the model's id, and the client's own metadata."""
    raw = model_id.encode("utf-8", "surrogatepass")
    sent = [(headers.MODEL_ID_BIN, wire.encode_bin(raw))]
    if all(" " <= character <= "~" for character in model_id):
        sent.append((headers.MODEL_ID, raw))
    for header in received:
        name = header[0]
        if not name.startswith(_NOT_SENT) and name not in _NAMES_NOT_SENT:
            sent.append(header)
    return sent


def to_client(received: Iterable[Header]) -> list[Header]:
    """Returns the metadata of a server's answer that the client gets. Leaves out Mesh's own names, so that no server
    can claim that a model is not here."""
    return [header for header in received if not header[0].startswith(headers.INTERNAL)]


def pairs(sent: Headers) -> Pairs:
    """Returns metadata in the form that `grpc.aio` requires. Raises ValueError for a binary value that is not base64,
    and for a text that is not ASCII."""
    made: list[tuple[str, str | bytes]] = []
    for name, value in sent:
        if name.endswith(b"-bin"):
            made += [(name.decode(), wire.decode_bin(part.strip())) for part in value.split(b",")]
        else:
            made.append((name.decode(), value.decode("ascii")))
    return tuple(made)


def from_pairs(received: Iterable[tuple[str, str | bytes]] | None) -> list[Header]:
    """Returns metadata of `grpc.aio` in the form that it has on the wire."""
    return [
        (key.encode(), wire.encode_bin(value) if isinstance(value, bytes) else value.encode("ascii", "replace"))
        for key, value in received or ()
    ]
