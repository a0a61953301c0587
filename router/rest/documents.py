"""Conversion of V2 REST bodies into V2 gRPC messages and back.

A body is a JSON object. With the binary tensor extension, it is followed by the binary data of the tensors that have no
data in the JSON, in the same order. `router.rest.tensors` converts single tensors. `router.rest.v2` handles HTTP.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mesh.pb import inference_pb2 as pb
from mesh.statuses import MeshError, Reason, not_unicode
from mesh.wire import encoding, framing
from router.rest import jsontext, tensors
from router.rest.pieces import Body, Contents, Piece
from router.rest.tensors import bad

_BASE64 = ("base64", "b64")  # as content_type of a BYTES input; ModelMesh's REST proxy accepts both


@dataclass(frozen=True, slots=True)
class Form:
    """The form of a reply: the outputs that the client wants as binary data."""

    binary: bool = False  # for outputs not named below
    outputs: Mapping[str, bool] = field(default_factory=dict)

    def is_binary(self, output: str) -> bool:
        """Returns whether the output follows the JSON as binary data."""
        return self.outputs.get(output, self.binary)

    def dump(self) -> list[Any]:
        """Returns the form as JSON."""
        return [self.binary, dict(self.outputs)]

    @classmethod
    def load(cls, dumped: list[Any]) -> "Form":
        """Returns the form from the JSON that `dump` returned."""
        return cls(*dumped)


ALL_JSON = Form()
"""The form of replies to most requests, without binary data."""


class Costly(Exception):
    """The error that a body takes too long to convert in an event loop."""


class _Unsure(Exception):
    """The error that a float in the JSON may stand for an integer beyond 64 bits. To find out, the JSON has to be
    parsed strictly."""


_RAW_TAG = b"\x3a"  # ModelInferRequest.raw_input_contents, of length-delimited type
_RAW_OUTPUT = 0x32  # ModelInferResponse.raw_output_contents


def decode_request(
    model: str, version: str, body: bytes, header_length: int | None
) -> tuple[pb.ModelInferRequest, Form]:
    """Returns the message for a body, and the form that the reply takes. The first `header_length` bytes of the body
    are JSON; with None, the whole body is. Raises MeshError."""
    request, raws, form = decode_parts(model, version, Body([body]), header_length)
    request.raw_input_contents.extend(map(b"".join, raws))
    return request, form


def framed(encoded: bytes, raws: Sequence[Contents]) -> bytes:
    """Returns the gRPC frame of an encoded message and its raw contents. Copies the contents once, where protobuf would
    copy them twice."""
    return b"".join(frame_parts(encoded, raws))


def frame_parts(encoded: bytes, raws: Sequence[Contents]) -> Contents:
    """Returns the same as `framed` in parts, without copying the contents."""
    parts: Contents = [b"", encoded]
    for raw in raws:
        parts.append(_RAW_TAG + encoding.varint(sum(map(len, raw))))
        parts += raw
    parts[0] = framing.prefix(sum(map(len, parts)))
    return parts


def decode_parts(
    model: str,
    version: str,
    body: Body,
    header_length: int | None,
    *,
    bound: int | None = None,
    loaded: jsontext.JsonObject | None = None,
) -> tuple[pb.ModelInferRequest, list[Contents], Form]:
    """Returns the message without its raw contents, the raw contents, and the form of the reply. `loaded` is the JSON
    if it was parsed already. Raises MeshError, and Costly if more than `bound` bytes of strings would have to be
    examined one by one."""
    if header_length is not None and header_length > body.size:
        raise bad(f"Inference-Header-Content-Length is {header_length}, but the body has only {body.size} bytes")
    head = body.joined() if header_length is None else body.beginning(header_length)
    blobs = None if header_length is None else body
    try:
        return _Decoding(loaded or jsontext.load(head), head, blobs, bound).message(model, version)
    except _Unsure:
        return _Decoding(jsontext.load_strictly(head), head, blobs, bound).message(model, version)


class _Decoding:
    __slots__ = ("_blobs", "_bound", "_exactly", "_head", "_loaded", "_names", "_raws", "_taken")

    def __init__(self, loaded: jsontext.JsonObject, head: bytes, blobs: Body | None, bound: int | None) -> None:
        """Begins to decode. `head` is the JSON. `blobs` is the body, with the binary data after the JSON, or None if
        the body is JSON only."""
        self._loaded = loaded
        self._head = head
        self._blobs = blobs
        self._bound = bound
        self._exactly: list[dict[str, Any]] = []  # the inputs, parsed again with exact numbers, once needed
        self._names: set[str] = set()
        self._raws: list[Contents] = []
        self._taken = len(head)  # bytes of the body that are used up

    def message(self, model: str, version: str) -> tuple[pb.ModelInferRequest, list[Contents], Form]:
        """Returns the same as `decode_parts`. Raises MeshError, Costly, _Unsure."""
        document = self._loaded.members
        request = pb.ModelInferRequest(model_name=model, model_version=version, id=_text(document, "id", "the request"))
        parameters = _parameters(document, "the request")
        everything = parameters.pop("binary_data_output", False)
        if not isinstance(everything, bool):
            raise bad("the request: binary_data_output must be true or false")
        self._set_parameters(request.parameters, parameters, "the request")
        for index, item in enumerate(_objects(document, "inputs", required=True)):
            self._add_input(request, index, item)
        if self._blobs is not None and self._taken != self._blobs.size:
            left = self._blobs.size - self._taken
            raise bad(f"{left} bytes of binary data are left over: no input's binary_data_size covers them")
        return request, self._raws, Form(binary=everything, outputs=self._add_outputs(request))

    def _add_input(self, request: pb.ModelInferRequest, index: int, item: dict[str, Any]) -> None:
        name = _name(item, "an input")
        what = f"input {name!r:.100}"
        if name in self._names:
            raise bad(f"{what} occurs twice")
        self._names.add(name)
        datatype = tensors.check_datatype(what, item.get("datatype"))
        shape = tensors.check_shape(what, item.get("shape"))
        parameters = _parameters(item, what)
        size = parameters.pop("binary_data_size", None)
        _no_shared_memory(parameters, what)
        if size is None:
            if "data" not in item:
                raise bad(f"{what} has neither data nor the parameter binary_data_size: send one of them")
            encoded = datatype == "BYTES" and parameters.get("content_type") in _BASE64
            if encoded:  # the contents are the bytes themselves from here on
                del parameters["content_type"]
            contents = tensors.raw_from_json(
                what,
                datatype,
                shape,
                item["data"],
                exact=functools.partial(self._exact, index),
                base64=encoded,
                careful=self._loaded.careful,
            )
            raw: Contents = [contents]
        else:
            if "data" in item:
                raise bad(f"{what} has both data and the parameter binary_data_size: send one of them")
            raw = self._blob(what, datatype, shape, size)
        added = request.inputs.add(name=name, datatype=datatype, shape=shape)
        self._set_parameters(added.parameters, parameters, what)
        self._raws.append(raw)

    def _blob(self, what: str, datatype: str, shape: tuple[int, ...], size: object) -> Contents:
        """Returns the next blob, of `size` bytes, without copying it. Raises MeshError, Costly, _Unsure."""
        if type(size) is float:
            self._demand_strictness()
        if type(size) is not int or size < 0:
            raise bad(f"{what}: binary_data_size must be a whole number, 0 or more")
        blobs, taken = self._blobs, self._taken
        if blobs is None:
            text = f"{what} has a binary_data_size, but the header Inference-Header-Content-Length is missing"
            raise bad(f"{text}: send it with the length of the JSON part")
        if taken + size > blobs.size:
            raise bad(f"{what}: binary_data_size is {size}, but only {blobs.size - taken} bytes of the body are left")
        blob = blobs.cut(taken, taken + size)
        self._taken += size
        if self._bound is not None and size > self._bound and datatype == "BYTES":
            raise Costly
        tensors.check_raw(what, datatype, shape, blob)
        return blob

    def _exact(self, index: int) -> object:
        """Returns the data of an input, with its number literals read exactly."""
        if not self._exactly:
            self._exactly = jsontext.load_object(self._head, parse_float=tensors.whole)["inputs"]
        return self._exactly[index]["data"]

    def _add_outputs(self, request: pb.ModelInferRequest) -> dict[str, bool]:
        chosen: dict[str, bool] = {}
        for item in _objects(self._loaded.members, "outputs", required=False):
            name = _name(item, "a requested output")
            what = f"requested output {name!r:.100}"
            parameters = _parameters(item, what)
            binary = parameters.pop("binary_data", None)
            if binary is not None:
                if not isinstance(binary, bool):
                    raise bad(f"{what}: binary_data must be true or false")
                chosen[name] = binary
            _no_shared_memory(parameters, what)
            self._set_parameters(request.outputs.add(name=name).parameters, parameters, what)
        return chosen

    def _set_parameters(self, target: Any, parameters: dict[str, Any], what: str) -> None:
        for name, value in parameters.items():
            parameter = target[_encodable(name, f"{what}: a parameter's name")]
            if isinstance(value, bool):
                parameter.bool_param = value
            elif isinstance(value, str):
                parameter.string_param = _encodable(value, f"{what}: parameter {name!r:.100}")
            elif isinstance(value, float):
                if abs(value) >= 1 << 63:
                    self._demand_strictness()
                parameter.double_param = value
            elif isinstance(value, int) and -(1 << 63) <= value < 1 << 63:
                parameter.int64_param = value
            elif isinstance(value, int) and 0 <= value < 1 << 64:
                parameter.uint64_param = value
            else:
                raise bad(f"{what}: parameter {name!r:.100} must be a string, a 64-bit number, true or false")

    def _demand_strictness(self) -> None:
        """Raises _Unsure unless the JSON was parsed strictly, because a float in it may stand for an integer beyond 64
        bits."""
        if not self._loaded.strict:
            raise _Unsure


def raw_request(
    model: str, version: str, body: Body, metadata: pb.ModelMetadataResponse
) -> tuple[pb.ModelInferRequest, list[Contents], Form]:
    """Returns the message for a body that consists of the bytes of the model's only input. The input's shape follows
    from the metadata.

    A BYTES input is one string, not preceded by its length. Raises MeshError if the shape cannot be determined.
    """
    if len(metadata.inputs) != 1:
        text = f"a body without JSON needs a model with one input, but this one has {len(metadata.inputs)}"
        raise bad(f"{text}: send a JSON part that names the inputs")
    expected = metadata.inputs[0]
    what = f"input {expected.name!r:.100}"
    datatype = tensors.check_datatype(what, expected.datatype)
    contents = list(body.pieces)
    shape = list(expected.shape)
    unknown = [index for index, size in enumerate(shape) if size < 0]
    if datatype == "BYTES":
        if any(size != 1 for size in shape if size >= 0):
            raise bad(f"{what} does not take exactly one string, as a body without JSON contains: send a JSON part")
        shape = [1] * len(shape)
        contents = [body.size.to_bytes(4, "little"), *body.pieces]
    elif unknown:
        if len(unknown) > 1:
            raise bad(f"{what} has the shape {shape}: with more than one variable dimension the body needs a JSON part")
        row = tensors.width_of(datatype) * math.prod(size for size in shape if size >= 0)
        if not row:
            raise bad(f"{what} has the shape {shape}, which has no elements: the body needs a JSON part")
        if body.size % row:
            raise bad(f"{what}: the body has {body.size} bytes, which is not a multiple of a row's {row} bytes")
        shape[unknown[0]] = body.size // row
    tensors.check_raw(what, datatype, tuple(shape), contents)
    request = pb.ModelInferRequest(model_name=model, model_version=version)
    request.inputs.add(name=expected.name, datatype=datatype, shape=shape)
    return request, [contents], Form(binary=True)


def encode_response(response: pb.ModelInferResponse, form: Form) -> tuple[bytes, int | None]:
    """Returns the body for a reply, and the length of its JSON part if binary data follows. Raises MeshError."""
    parts, json_length = encode_parts(response, form)
    return b"".join(parts), json_length


def split(frame: Piece) -> tuple[bytes, list[memoryview]]:
    """Splits a framed ModelInferResponse into the rest of the message and the raw contents, without copying the
    contents. Raises ValueError if it is malformed."""
    message = memoryview(frame)[framing.PREFIX :]
    rest = []
    raws = []
    before = 0
    for tag, start, end in encoding.fields(message):
        if tag == _RAW_OUTPUT:
            raws.append(message[start:end])
        else:
            rest.append(message[before:end])
        before = end
    return b"".join(rest), raws


def all_binary(response: pb.ModelInferResponse, raws: Sequence[Piece], form: Form) -> bool:
    """Returns whether the body needs no conversion, because every output follows the JSON unchanged."""
    return len(raws) == len(response.outputs) and all(form.is_binary(output.name) for output in response.outputs)


def encode_parts(
    response: pb.ModelInferResponse, form: Form, raws: Sequence[Piece] | None = None
) -> tuple[Contents, int | None]:
    """Returns the body in parts: the JSON, then each output's binary data. `raws` has the raw contents if they are not
    in the message. Raises MeshError."""
    raw: Sequence[Piece] = response.raw_output_contents if raws is None else raws
    if raw and len(raw) != len(response.outputs):
        counts = f"{len(response.outputs)} outputs, but raw contents for {len(raw)}"
        text = f"the model server's answer has {counts}: check the model server"
        raise MeshError(Reason.INTERNAL, text)
    outputs: list[dict[str, Any]] = []
    blobs: Contents = []
    any_binary = False
    for index, output in enumerate(response.outputs):
        what = f"output {output.name!r:.100}"
        shown: dict[str, Any] = {"name": output.name, "datatype": output.datatype, "shape": list(output.shape)}
        parameters = _show_parameters(output.parameters)
        if form.is_binary(output.name):
            blob = raw[index] if raw else tensors.raw_from_typed(what, output.datatype, output.contents)
            parameters["binary_data_size"] = len(blob)
            blobs.append(blob)
            any_binary = True
        elif raw:
            shown["data"] = tensors.json_from_raw(what, output.datatype, raw[index])
        else:
            shown["data"] = tensors.json_from_typed(what, output.datatype, output.contents)
        if parameters:
            shown["parameters"] = parameters
        outputs.append(shown)
    document: dict[str, Any] = {"model_name": response.model_name}
    if response.model_version:
        document["model_version"] = response.model_version
    if response.id:
        document["id"] = response.id
    if response.parameters:
        document["parameters"] = _show_parameters(response.parameters)
    document["outputs"] = outputs
    head = jsontext.dump(document)
    return ([head, *blobs], len(head)) if any_binary else ([head], None)


def metadata_document(metadata: pb.ModelMetadataResponse) -> dict[str, Any]:
    """Returns a model's metadata as a REST document."""

    def listed(parts: Any) -> list[dict[str, Any]]:
        return [{"name": part.name, "datatype": part.datatype, "shape": list(part.shape)} for part in parts]

    return {
        "name": metadata.name,
        "versions": list(metadata.versions),
        "platform": metadata.platform,
        "inputs": listed(metadata.inputs),
        "outputs": listed(metadata.outputs),
    }


# --- parts of documents ---


def _objects(document: dict[str, Any], name: str, *, required: bool) -> list[dict[str, Any]]:
    items = document.get(name)
    if items is None and not required:
        return []
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise bad(f"{name} must be a list of objects")
    return items


def _name(item: dict[str, Any], what: str) -> str:
    name = item.get("name")
    if not isinstance(name, str) or not name:
        raise bad(f"the name of {what} must be a non-empty string")
    return _encodable(name, f"{what}: its name")


def _text(document: dict[str, Any], name: str, what: str) -> str:
    value = document.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise bad(f"{what}: {name} must be a string")
    return _encodable(value, f"{what}: {name}")


def _encodable(text: str, what: str) -> str:
    """Returns the text, which `what` names in errors. Raises MeshError for half of a surrogate pair, which JSON can
    represent but a message cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise not_unicode(what) from error
    return text


def _parameters(item: dict[str, Any], what: str) -> dict[str, Any]:
    parameters = item.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise bad(f"{what}: parameters must be an object")
    return dict(parameters)


def _no_shared_memory(parameters: dict[str, Any], what: str) -> None:
    for name in parameters:
        if name.startswith("shared_memory_"):
            text = f"{what}: {name:.60}: the shared memory extensions are not supported, send the tensor's data"
            raise MeshError(Reason.UNSUPPORTED, text)


def _show_parameters(parameters: Mapping[str, pb.InferParameter]) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for name, parameter in parameters.items():
        choice = parameter.WhichOneof("parameter_choice")
        if choice is not None:
            value = getattr(parameter, choice)
            # JSON has neither NaN nor infinities, but an answer should not fail because of a parameter.
            shown[name] = str(value) if isinstance(value, float) and not math.isfinite(value) else value
    return shown
