"""Conversion of metadata between the wire, where binary values are base64, and `grpc.aio`, where they are bytes."""

from collections.abc import Iterable

from mesh.telemetry import logs
from mesh.wire import headers
from mesh.wire import metadata as wire
from mesh.wire.call import Header

log = logs.get(__name__)

Pairs = tuple[tuple[str, str | bytes], ...]

_NOT_SENT = (headers.INTERNAL, b"grpc-", b"mm-")
_NAMES_NOT_SENT = frozenset({headers.LEGACY_MODEL_ID, b"content-type", b"user-agent", b"te", b"host"})


def to_server(received: Iterable[Header], model_id: str) -> Pairs:
    """Returns the metadata that a foreign server gets: the client's, and the model's id. Raises ValueError for a binary
    value that is not base64."""
    raw = model_id.encode("utf-8", "surrogatepass")
    sent: list[tuple[str, str | bytes]] = [("mm-model-id-bin", raw)]
    if all(" " <= character <= "~" for character in model_id):
        sent.append(("mm-model-id", model_id))
    for name, value in received:
        if name.startswith(_NOT_SENT) or name in _NAMES_NOT_SENT:
            continue
        if name.endswith(b"-bin"):
            sent += [(name.decode(), wire.decode_bin(part.strip())) for part in value.split(b",")]
        else:
            sent.append((name.decode(), value.decode("ascii")))
    return tuple(sent)


def from_server(received: object) -> list[Header]:
    """Returns the metadata of a server's reply that the client gets. Mesh's own names are left out, so that no server
    can claim that a model is not here."""
    returned: list[Header] = []
    for key, value in received or ():  # type: ignore[attr-defined]
        name = key.encode()
        if name.startswith(headers.INTERNAL):
            continue
        if isinstance(value, bytes):
            returned.append((name, wire.encode_bin(value)))
        else:
            returned.append((name, value.encode("ascii", "replace")))
    return returned
