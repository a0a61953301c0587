"""Names of the metadata that Mesh reads and adds, as lower-case bytes on the wire.

Names that begin with `mesh-` are internal: the router passes none of them on from clients' requests, so that no client
can address a copy.
"""

import urllib.parse
from collections.abc import Iterable

from mesh.wire.metadata import Block, encode_bin

INTERNAL = b"mesh-"

COPY = b"mesh-copy"  # request: the token (`mesh.schema.copytoken`) of the copy that the call is for
VERIFIED = b"mesh-verified"  # request: the router has read the model's record within the last second; it is unchanged
ETCD_AWAY = b"mesh-etcd-away"  # request: the router could not read the record, because etcd does not answer
VERIFY_FIRST = b"mesh-verify-first"  # reply: the pod requires one of the two headers above; no model got the call
NOT_HERE = b"mesh-not-here"  # reply: this pod does not hold the copy; no model got the call
AS = b"mesh-as"  # request: the alias by which the model is called, and its version, for the reply (`named_as`)
VERSIONS = b"mesh-versions"  # request: the versions for a reply that lists them (`listed`)
LOAD = b"mesh-load"  # reply: calls in flight in the pod, not counting this one

MODEL_ID = b"mm-model-id"
MODEL_ID_BIN = b"mm-model-id-bin"
VMODEL_ID = b"mm-vmodel-id"
VMODEL_ID_BIN = b"mm-vmodel-id-bin"
LEGACY_MODEL_ID = b"tas-model-id"

AUTHORIZATION = b"authorization"  # a client's credentials; for the router alone, never passed on
PEER = b"mesh-peer"  # set by Envoy on requests to management: the address of the client
CLIENT_CERTIFICATE = b"x-forwarded-client-cert"  # set by Envoy, if asked to: the client's certificate

# On the SPI: metadata for Mesh's own model server, beyond the SPI's messages. Other servers ignore it.
SPI_COPY = "mesh-copy"
SPI_SLOT = "mesh-slot"
SPI_OPTIMISED = "mesh-optimised"  # path of the model as optimised by onnxruntime
SPI_NOTE = "mesh-note-bin"  # reply: a note for people about a model that was loaded
SPI_STUCK = "mesh-stuck"  # reply: the failed load still runs and cannot be ended


def named_as(alias: str, version: str) -> bytes:
    """Returns the value of `AS` for an alias and the name of its version."""
    return f"{_quoted(alias)}/{_quoted(version)}".encode()


def read_as(value: bytes) -> tuple[str, str]:
    """Returns alias and version from the value of `AS`."""
    alias, _, version = value.decode("ascii", "replace").partition("/")
    return urllib.parse.unquote(alias), urllib.parse.unquote(version)


def listed(versions: Iterable[str]) -> bytes:
    """Returns the value of `VERSIONS` for these versions."""
    return "/".join(map(_quoted, versions)).encode()


def read_listed(value: bytes) -> list[str]:
    """Returns the versions from the value of `VERSIONS`."""
    return [urllib.parse.unquote(version) for version in value.decode("ascii", "replace").split("/")]


def _quoted(text: str) -> str:
    return urllib.parse.quote(text, safe="")


def addressed(model_id: str, token: bytes) -> Block:
    """Returns the metadata of all calls to one copy: the copy's token, and the model's id as runtimes read it."""
    raw = model_id.encode("utf-8", "surrogatepass")
    added = [(COPY, token), (MODEL_ID_BIN, encode_bin(raw))]
    if model_id and all(" " <= character <= "~" for character in model_id):
        added.append((MODEL_ID, raw))
    return Block(added)
