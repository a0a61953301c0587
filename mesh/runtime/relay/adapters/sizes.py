"""The expected size of a model, for servers that state none and whose memory cannot be observed."""

import json

from mesh.pb import modelruntime_pb2 as pb

FACTOR = 1.25
"""Ratio of a model's memory to the size of its files: ModelMesh's estimate for the servers with an adapter."""

UNKNOWN = 1_000_000
"""Bytes of a model of which nothing is known: ModelMesh's default."""


def of_files(key: str) -> int:
    """Returns the bytes of a model's files, which the key of a request states, or 0 if it does not."""
    try:
        size = json.loads(key)["disk_size_bytes"]
    except (ValueError, KeyError, TypeError):
        return 0
    return size if isinstance(size, int) and size > 0 else 0


def predicted(request: pb.PredictModelSizeRequest, *, default: int = UNKNOWN) -> pb.PredictModelSizeResponse:
    """Returns the expected size of a model, in bytes: `default` if the size of its files is unknown."""
    return pb.PredictModelSizeResponse(sizeInBytes=int(of_files(request.modelKey) * FACTOR) or default)
