"""Doors with V2 requests to a model, over gRPC or REST."""

import json
from collections.abc import Mapping

import numpy as np

from tests.bench.door import METHOD, Door
from tests.support.localmesh import infer_request


def grpc(address: str, model: str, values: np.ndarray, answer: int, headers: Mapping[str, str] | None = None) -> Door:
    """Returns a gRPC door whose requests have raw contents."""
    return Door("grpc", address, METHOD, infer_request(model, x=values).SerializeToString(), answer, headers or {})


def rest(
    address: str,
    model: str,
    values: np.ndarray,
    answer: int,
    headers: Mapping[str, str] | None = None,
    *,
    binary: bool,
) -> Door:
    """Returns a REST door whose tensors are JSON both ways, or binary both ways. Requests have the optional id, because
    KServe needs it."""
    headers = headers or {}
    one: dict[str, object] = {"name": "x", "shape": values.shape, "datatype": "FP32"}
    path = f"/v2/models/{model}/infer"
    if not binary:
        # Only as many digits as a float needs, because Python would print those of a double.
        one["data"] = [float(str(value)) for value in values.ravel()]
        body = json.dumps({"id": "42", "inputs": [one]}).encode()
        return Door("rest", address, path, body, answer, {"content-type": "application/json", **headers})
    one["parameters"] = {"binary_data_size": values.nbytes}
    head = json.dumps({"id": "42", "inputs": [one], "parameters": {"binary_data_output": True}}).encode()
    more = {"content-type": "application/octet-stream", "inference-header-content-length": str(len(head))}
    return Door("rest", address, path, head + values.tobytes(), answer, {**more, **headers})
