"""The name that a call asks for, and the part of its metadata that is passed to the model server.

The rules and texts are ModelMesh's, so that its clients notice no difference. If the method has a field path, the
id is in the message, and otherwise in the metadata. The three V2 methods have field paths, and a data-plane
configuration may give one to other methods (`dataplane`). Only the part of the message up to the id is read. A
compressed message is decompressed to read the id, but forwarded unchanged. Calls whose metadata has several ids are
passed to `several`.

`aliases` finds the model behind a name, `view` and `coldstart` a copy of it; `dispatch` handles methods other than
inference.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

from mesh.schema.records import MAX_ID_BYTES
from mesh.statuses import MeshError, Reason
from mesh.v2 import PREFIX
from mesh.wire import framing, headers, metadata
from mesh.wire.call import Call, Header
from router.calls import extensions, fieldpath
from router.calls.dataplane import Dataplane

_REFUSED = (
    b"/mmesh.ModelRuntime/",  # for agents' calls to model servers, never for clients
    b"/com.ibm.watson.tas.internal.proto.ModelServer/",
    b"/mesh.agent.v1.Agent/",
    b"/mmesh.ModelMesh/",  # existing methods of these two services are answered before a call gets here
    b"/com.ibm.watson.tas.proto.TasRuntime/",
)
_MAX_METHODS = 1000  # remembered names; they come from clients
_MAX_NAMES = 4000
_NAME_LENGTH = framing.PREFIX + 1  # where the length of a name stands that begins an uncompressed message
_MAX_NAME = 256  # bytes of a remembered name: a head may have 64 KiB
_UNPACKED = 1 << 20  # bytes: 3 ms at most
_MAX_TEXT = 200  # characters of a client's text that an error quotes

MAX_IDS = 100
"""Largest number of ids in one call."""

Kind = Literal[0, 1, 2]
"""The kind of a name. It follows from the place where the call has the name."""

MODEL: Final = 0
"""A model: the name is in `mm-model-id`, or in the message at a path whose rule in the data-plane configuration lacks
`vModelId`."""

NAME: Final = 1
"""A vmodel if there is one of that name, otherwise a model: the name is in the message."""

VMODEL: Final = 2
"""A vmodel: the name is in `mm-vmodel-id`."""

Asked = tuple[str, Kind, str]
"""A name, its kind, and the version of it that the call wants, or "" for any."""


@dataclass(frozen=True, slots=True)
class Method:
    """The properties of one method."""

    name: bytes  # with its leading slash
    label: str  # for metrics: the part after the last slash
    path: tuple[int, ...] = ()  # field numbers of the id in the request; empty: metadata only
    kind: Kind = NAME  # of an id at that path
    versioned: bool = False  # the request names a version too, as V2's requests do
    infers: bool = True  # asks a model for a result
    describes: bool = False  # the reply lists the existing versions
    safe: bool = False  # may be sent again even if the first server may have received it
    unary: bool = False  # known to have one message and one reply, and so to end soon
    refused: str = ""  # never forwarded, and why
    lacking: str = ""  # why a call that names no model is refused, if not just for the lack of a header


V2_METHODS: Mapping[bytes, Method] = {
    PREFIX + name.encode(): Method(
        PREFIX + name.encode(),
        name,
        path=(1,),
        versioned=True,
        infers=name == "ModelInfer",
        describes=name == "ModelMetadata",
        safe=True,
        unary=True,
    )
    for name in ("ModelInfer", "ModelMetadata", "ModelReady")
}


class SeveralIds(Exception):
    """The outcome for a call whose metadata has several ids. `values` are the ids, and `binary` is the `-bin` header
    under which each of them is sent alone."""

    def __init__(self, values: list[bytes], binary: bytes) -> None:
        super().__init__(f"{len(values)} ids")
        self.values = values
        self.binary = binary


class Routes:
    """The known methods, each with the place of the model id in its calls."""

    __slots__ = ("_closed", "_methods", "_names")

    def __init__(self, *, methods: Mapping[bytes, Method] = V2_METHODS) -> None:
        self._methods = dict(methods)
        self._closed = False  # methods that are not listed are refused
        self._names: dict[bytes, str] = {}  # by the beginning of a V2 message, up to the tag after the name

    def adopt(self, config: Dataplane | None) -> None:
        """Applies a data-plane configuration, or none, to the calls that begin from now on."""
        if config is None:
            self._methods, self._closed = dict(V2_METHODS), False
            return
        methods = dict(V2_METHODS) if config.others else {}
        for name, rule in config.methods.items():
            known = V2_METHODS.get(name) or _unlisted(name)
            versioned = known.versioned and rule.path == known.path
            kind: Kind = NAME if rule.vmodel else MODEL
            methods[name] = replace(known, path=rule.path, kind=kind, versioned=versioned, lacking="")
        self._methods, self._closed = methods, not config.others

    def method(self, name: bytes) -> Method:
        """Returns the properties of a method. For an unknown method, the model id comes from the metadata."""
        found = self._methods.get(name)
        if found is None:
            found = _unlisted(name, closed=self._closed)
            if len(self._methods) < _MAX_METHODS and len(name) <= _MAX_NAME:
                self._methods[name] = found
        return found

    def asked(self, call: Call, method: Method, frame: bytes | None) -> Asked:
        """Returns the name that the call asks for. `frame` is the call's first message, or None if the call has none or
        only the metadata matter. Raises MeshError: BAD_REQUEST, TOO_LARGE, UNSUPPORTED. Raises SeveralIds if the
        metadata has several ids."""
        version = ""
        beginning = b""
        if method.path and frame is not None:
            if method.versioned and len(frame) > _NAME_LENGTH and not frame[0]:
                beginning = frame[framing.PREFIX : _NAME_LENGTH + 2 + frame[_NAME_LENGTH]]
                known = self._names.get(beginning)
                if known is not None:
                    return known, method.kind, ""
            try:
                # The flag is nearly always 0.
                if frame[0]:
                    found, version = _in_compressed(call, method, frame)
                elif method.versioned:
                    found, version = fieldpath.name_and_version(frame, framing.PREFIX)
                else:
                    found = fieldpath.extract(frame, method.path, framing.PREFIX)
            except UnicodeDecodeError as error:
                part = "id or version" if method.versioned else "id"
                raise MeshError(Reason.BAD_REQUEST, f"the model {part} in the request is not UTF-8") from error
            except (ValueError, IndexError) as error:
                raise MeshError(Reason.BAD_REQUEST, f"no model id can be read from the request: {error}") from error
            if found:
                name = _checked(found)
                if beginning and fieldpath.settles(beginning):
                    self._remember(beginning, name)
                return name, method.kind, version
            if found is not None:
                raise MeshError(Reason.BAD_REQUEST, "provided model-id must be non-empty")
        name, kind = id_of_metadata(call.headers, method.lacking)
        return name, kind, version

    def _remember(self, beginning: bytes, name: str) -> None:
        if len(self._names) >= _MAX_NAMES:
            self._names.clear()  # those in use come back soon
        self._names[beginning] = name


def _unlisted(name: bytes, *, closed: bool = False) -> Method:
    """Returns the properties of a method that is neither V2's nor in the configuration."""
    text = name.decode("utf-8", "replace")
    refused = ""
    if closed or name.startswith(_REFUSED):
        refused = f"Method not found or not permitted: {text[1:_MAX_TEXT]}"
    label = text.rpartition("/")[2][:_MAX_TEXT] or "-"
    lacking = extensions.of_method(label) if name.startswith(PREFIX) else ""
    return Method(name, label, refused=refused, lacking=lacking)


def _in_compressed(call: Call, method: Method, frame: bytes) -> tuple[str | None, str]:
    """Returns the id (or None) and the version in a compressed message. Encoders write them first, so at most
    `_UNPACKED` bytes are decompressed: 16 MiB would block the event loop for 50 ms."""
    beginning = framing.beginning(frame, call.encoding, _UNPACKED)
    try:
        if method.versioned:
            return fieldpath.name_and_version(beginning)
        return fieldpath.extract(beginning, method.path), ""
    except UnicodeDecodeError:
        raise
    except ValueError:
        if len(beginning) < _UNPACKED:
            raise
        return None, ""


def _checked(model_id: str) -> str:
    """Returns the id. Raises MeshError if the id is longer than that of any registered model can be."""
    if len(model_id) > MAX_ID_BYTES:
        raise MeshError(Reason.BAD_REQUEST, f"model id is longer than {MAX_ID_BYTES} bytes")
    return model_id


def id_of_metadata(received: list[Header], lacking: str = "") -> tuple[str, Kind]:
    """Returns the name in the metadata, and its kind. Raises SeveralIds, and MeshError: BAD_REQUEST, UNSUPPORTED.

    `lacking` is the text for a call of an extension's method without an id. If it is empty, the text says that the
    header is missing."""
    models = _values(received, headers.MODEL_ID, headers.MODEL_ID_BIN)
    vmodels = _values(received, headers.VMODEL_ID, headers.VMODEL_ID_BIN)
    if models and vmodels:
        raise MeshError(Reason.BAD_REQUEST, "must include only one of model id and vmodel id")
    if not models and not vmodels:
        models = [value for name, value in received if name == headers.LEGACY_MODEL_ID][:1]
        if not models and lacking:
            raise MeshError(Reason.UNSUPPORTED, lacking)
        if not models:
            raise MeshError(Reason.BAD_REQUEST, "must include mm-model-id header")
    kind = "vmodel" if vmodels else "model"
    values = models or vmodels
    if not all(values):
        raise MeshError(Reason.BAD_REQUEST, f"provided {kind}-id header must be non-empty")
    if len(values) > 1:
        binary = headers.VMODEL_ID_BIN if vmodels else headers.MODEL_ID_BIN
        raise _too_many(binary) if len(values) > MAX_IDS else SeveralIds(values, binary)
    try:
        return _checked(values[0].decode()), VMODEL if vmodels else MODEL
    except UnicodeDecodeError as error:
        raise MeshError(Reason.BAD_REQUEST, f"provided {kind}-id header is not UTF-8") from error


def _too_many(header: bytes) -> MeshError:
    text = f"a call may name at most {MAX_IDS} ids ({header.decode()}): make several calls"
    return MeshError(Reason.BAD_REQUEST, text)


ID_HEADERS = frozenset((headers.MODEL_ID, headers.MODEL_ID_BIN, headers.VMODEL_ID, headers.VMODEL_ID_BIN))


def names_several(received: list[Header]) -> bool:
    """Returns whether the metadata has several ids. Returns False for ids that `id_of_metadata` refuses."""
    found = [value for name, value in received if name in ID_HEADERS]
    if len(found) < 2 and not any(b"," in value for value in found):
        return False
    try:
        id_of_metadata(received)
    except SeveralIds:
        return True
    except MeshError:
        return False
    return False


def _values(received: list[Header], plain: bytes, binary: bytes) -> list[bytes]:
    """Returns the values of the plain header, or if it is missing, the decoded values of the binary header. Raises
    MeshError BAD_REQUEST if they are too many or not base64."""
    found = [value for name, value in received if name == plain]
    if found:
        return found
    for name, value in received:
        if name == binary:
            if value.count(b",") >= MAX_IDS:
                raise _too_many(binary)
            for part in value.split(b","):  # gRPC libraries may join repeated binary values with commas
                try:
                    found.append(metadata.decode_bin(part.strip()))
                except ValueError as error:
                    raise MeshError(
                        Reason.BAD_REQUEST, f"the header {binary.decode()} is not base64: encode the id in base64"
                    ) from error
    return found


class _Passes(dict[bytes, bool]):
    """A cache that says which names in a client's metadata are passed on. Each call costs one look-up."""

    def __missing__(self, name: bytes) -> bool:
        passes = not name.startswith((headers.INTERNAL, b"mm-", b"grpc-")) and name not in (
            headers.LEGACY_MODEL_ID,
            headers.AUTHORIZATION,
            headers.CLIENT_CERTIFICATE,
            b"content-type",
            b"user-agent",
        )
        if len(self) < _MAX_NAMES and len(name) <= _MAX_NAME:
            self[name] = passes
        return passes


passes = _Passes()
"""A table by header name: `passes[name]` is True if the model server gets a client's header of that name. It gets no
headers of the mesh or of the transport, and no credentials."""


def passed(call: Call) -> tuple[Header, ...]:
    """Returns the headers of a client's call that the model server gets. Calls with the same head share them."""
    head = call.head
    if head is None:
        return tuple([header for header in call.headers if passes[header[0]]])
    note = head.note
    if type(note) is not metadata.Block:
        note = head.note = metadata.Block(header for header in call.headers if passes[header[0]])
    return note


class _Returns(dict[bytes, bool]):
    """A cache that says which names in a reply's metadata are returned to the client."""

    def __missing__(self, name: bytes) -> bool:
        returns = not name.startswith(headers.INTERNAL)
        if len(self) < _MAX_NAMES and len(name) <= _MAX_NAME:
            self[name] = returns
        return returns


returns = _Returns()
"""A table by header name: `returns[name]` is True if the client gets a model server's header or trailer of that
name."""
