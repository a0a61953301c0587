"""The handler of every model that Mesh registers at a TorchServe.

TorchServe has no V2 gRPC that carries raw contents, so Mesh's relay sends V2's messages in the map of `Predictions`,
under the names below. This handler answers them: for a TorchScript file with the model itself, and for a `.mar` by the
archive's own handler, which gets the request as V2's JSON, in the form in which TorchServe's Open Inference Protocol
passes it. All other calls reach the archive's own handler as they are.

An answer to V2 begins with one byte, a status code of gRPC. The message follows if the code is 0, and the error's text
otherwise. So callers get the code and the text of an error, which TorchServe would replace.

This file is copied into the folder of each model, together with mesh_v2.py. It imports nothing of Mesh.
"""

from __future__ import annotations  # for Python 3.8

import base64
import ctypes
import json
import os
import traceback
from typing import Any, Callable

import mesh_v2 as v2
import torch

INFER, METADATA, READY = "mesh-v2-infer", "mesh-v2-metadata", "mesh-v2-ready"
FAILURE = "failure.txt"

_INVALID_ARGUMENT, _INTERNAL, _UNIMPLEMENTED = 3, 13, 12
_TEXT = 1000  # characters of an error

_TYPES = {
    "BOOL": torch.bool,
    "UINT8": torch.uint8,
    "INT8": torch.int8,
    "INT16": torch.int16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "FP16": torch.float16,
    "BF16": torch.bfloat16,
    "FP32": torch.float32,
    "FP64": torch.float64,
}
_NAMES = {kind: name for name, kind in _TYPES.items()}


class MeshHandler:
    """The handler of one model, as TorchServe calls it. It must be this module's only class."""

    def initialize(self, context: Any) -> None:
        """Loads the model. Leaves the reason of a failure in the model's folder, because TorchServe does not pass it
        on."""
        folder = context.system_properties["model_dir"]
        try:
            described = context.manifest["model"]
            self._own = described.get("meshHandler")
            if self._own:
                described["handler"] = self._own
                self._handle = _own_handler(self._own, folder, context)
            else:
                self._load(os.path.join(folder, described["serializedFile"]), context)
        except Exception as error:
            with open(os.path.join(folder, FAILURE), "w") as file:
                file.write(_told(error))
            raise

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[Any]:
        """Answers a batch of calls."""
        if not self._own:
            return [self._answered(row) for row in data]
        rows = [self._parsed(row) for row in data]
        pending = [row["row"] for row in rows if "answer" not in row]
        try:
            results = iter(self._handle(pending, context) if pending else ())
        except Exception as error:
            if not all("answer" in row or "request" in row for row in rows):
                raise  # TorchServe answers the calls that do not come from Mesh
            traceback.print_exc()
            failed = _failed(_INTERNAL, f"the model's handler failed: {_told(error)}")
            return [row.get("answer", failed) for row in rows]
        return [row["answer"] if "answer" in row else _own_answer(row.get("request"), next(results)) for row in rows]

    # --- TorchScript

    def _load(self, path: str, context: Any) -> None:
        number = context.system_properties.get("gpu_id")
        on_gpu = torch.cuda.is_available() and number is not None
        self._device = torch.device(f"cuda:{number}" if on_gpu else "cpu")
        self._model = torch.jit.load(path, map_location=self._device)
        self._model.eval()
        self._arguments = [one.name for one in self._model.forward.schema.arguments[1:]]

    def _answered(self, row: dict[str, Any]) -> bytes:
        try:
            if METADATA in row:
                return _answer(v2.metadata(v2.read_name(row[METADATA]), "pytorch_torchscript"))
            if READY in row:
                return _answer(v2.READY)
            if INFER not in row:
                return _failed(_UNIMPLEMENTED, "a TorchScript model takes requests of V2 only")
            name, number, tensors, wanted, typed = v2.read_request(row[INFER])
            outputs = self._forward(tensors)
            if wanted:
                missing = [one for one in wanted if one not in outputs]
                if missing:
                    raise v2.BadRequest(f"the model has no output {missing[0]!r}: it has {', '.join(outputs)}")
                outputs = {one: outputs[one] for one in wanted}
            return _answer(v2.response(name, number, [_described(*one) for one in outputs.items()], typed))
        except v2.BadRequest as error:
            return _failed(_INVALID_ARGUMENT, str(error))
        except (RuntimeError, TypeError, ValueError) as error:  # what torch raises, as for a shape that does not fit
            return _failed(_INVALID_ARGUMENT, f"the model cannot answer the request: {_told(error)}")

    def _forward(self, tensors: list[v2.Tensor]) -> dict[str, Any]:
        """Calls the model with inputs by the names of its arguments if all have such names, else in their order.
        Returns the outputs by name."""
        made = {}
        for name, datatype, shape, raw in tensors:
            if datatype not in _TYPES:
                raise v2.BadRequest(f"input {name!r}: a TorchScript model takes {', '.join(_TYPES)}, not {datatype}")
            flat = torch.frombuffer(bytearray(raw), dtype=_TYPES[datatype]) if raw else torch.empty(0)
            made[name] = flat.to(_TYPES[datatype]).reshape(shape).to(self._device)
        if len(made) != len(tensors):
            raise v2.BadRequest("two inputs have the same name: give each a name of its own")
        with torch.no_grad():
            if made and set(made) <= set(self._arguments):
                result = self._model(**made)
            else:
                result = self._model(*made.values())
        return _outputs(result)

    # --- the handler of an archive

    def _parsed(self, row: dict[str, Any]) -> dict[str, Any]:
        """Returns the row for the archive's handler, with the V2 request if the call has one, or the answer if the
        handler does not get the call."""
        try:
            if METADATA in row:
                return {"answer": _answer(v2.metadata(v2.read_name(row[METADATA]), "torchserve"))}
            if READY in row:
                return {"answer": _answer(v2.READY)}
            if INFER not in row:
                return {"row": row}
            request = v2.read_request(row[INFER])
            name, number, tensors, _, _ = request
            inputs = []
            for title, datatype, shape, raw in tensors:
                if datatype == "BF16":
                    raise v2.BadRequest(
                        f"input {title!r}: this model gets its inputs as JSON, which has no BF16: send FP32"
                    )
                data = v2.values(datatype, raw)
                if datatype == "BYTES":
                    data = [base64.b64encode(one).decode() for one in data]
                inputs.append({"name": title, "shape": shape, "datatype": datatype, "data": data})
            return {"row": {"body": {"id": number, "model_name": name, "inputs": inputs}}, "request": request}
        except v2.BadRequest as error:
            return {"answer": _failed(_INVALID_ARGUMENT, str(error))}


def _own_handler(named: str, folder: str, context: Any) -> Callable[[list[Any], Any], list[Any]]:
    """Loads an archive's own handler, as TorchServe loads handlers. Returns the function that answers a batch."""
    from ts.model_loader import TsModelLoader

    loader = TsModelLoader()
    file = named.split(":")[0]
    there = os.path.isfile(os.path.join(folder, file if file.endswith(".py") else f"{file}.py"))
    try:
        module, function = loader._load_handler_file(named)
    except ImportError:
        if there:
            raise
        module, function = loader._load_default_handler(named), None
    function = function or "handle"
    if hasattr(module, function):
        found, initialize = loader._get_function_entry_point(module, function)
    else:
        found, initialize = loader._get_class_entry_point(module)
    initialize(context)
    handle: Callable[[list[Any], Any], list[Any]] = found
    return handle


def _own_answer(request: Any, result: Any) -> Any:
    if request is None:
        return result
    name, number, _, wanted, typed = request
    try:
        outputs = [one for one in _of_result(result) if not wanted or one[0] in wanted]
        return _answer(v2.response(name, number, outputs, typed))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return _failed(_INTERNAL, f"the answer of the model's handler cannot be expressed in V2: {_told(error)}")


def _of_result(result: Any) -> list[v2.Tensor]:
    """Returns tensors from what an archive's handler has returned: V2's JSON, numbers, a tensor, or anything else,
    which becomes a text in JSON."""
    if isinstance(result, (str, bytes, bytearray)):
        try:
            parsed = json.loads(result)
        except ValueError:
            parsed = None
        if isinstance(parsed, dict) and isinstance(parsed.get("outputs"), list):
            result = parsed
    if isinstance(result, dict) and isinstance(result.get("outputs"), list):
        return [_of_json(one) for one in result["outputs"]]
    if isinstance(result, torch.Tensor):
        return [_described("output", result)]
    if isinstance(result, (int, float, list, tuple)):
        try:
            return [_described("output", torch.tensor(result, dtype=None if _whole(result) else torch.float64))]
        except (ValueError, TypeError, RuntimeError):
            pass  # not numbers, or of unequal lengths
    text = result if isinstance(result, (str, bytes, bytearray)) else json.dumps(result)
    return [("output", "BYTES", [1], v2.pack("BYTES", [text]))]


def _of_json(output: dict[str, Any]) -> v2.Tensor:
    data = _flat(output["data"])
    shape = [int(size) for size in output["shape"]]
    return str(output["name"]), str(output["datatype"]), shape, v2.pack(str(output["datatype"]), data)


def _flat(data: Any) -> list[Any]:
    return [one for part in data for one in _flat(part)] if isinstance(data, (list, tuple)) else [data]


def _whole(result: Any) -> bool:
    return all(isinstance(one, int) for one in _flat(result))


def _outputs(result: Any) -> dict[str, Any]:
    """Returns the outputs of a TorchScript model by name: a dictionary's own names, `output`, or `output_0` to
    `output_N`."""
    if isinstance(result, torch.Tensor):
        return {"output": result}
    if isinstance(result, dict):
        found = {str(name): value for name, value in result.items()}
    elif isinstance(result, (tuple, list)):
        found = {f"output_{place}": value for place, value in enumerate(result)}
    else:
        found = {"output": torch.tensor(result)}
    return {name: value if isinstance(value, torch.Tensor) else torch.tensor(value) for name, value in found.items()}


def _described(name: str, tensor: Any) -> v2.Tensor:
    if tensor.dtype not in _NAMES:
        raise ValueError(f"the output {name!r} has the type {tensor.dtype}, which V2 does not have")
    plain = tensor.detach().cpu().contiguous()
    raw = ctypes.string_at(plain.data_ptr(), plain.numel() * plain.element_size()) if plain.numel() else b""
    return name, _NAMES[plain.dtype], list(plain.shape), raw


def _answer(message: bytes) -> bytes:
    return b"\0" + message


def _failed(code: int, text: str) -> bytes:
    return bytes([code]) + text[:_TEXT].encode("utf-8", "replace")


def _told(error: Exception) -> str:
    """Returns the last line of an error's text, because torch's errors quote the model's program first."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = lines[-1].strip() if lines else ""
    return text if text.startswith(type(error).__name__) else f"{type(error).__name__}: {text}"
