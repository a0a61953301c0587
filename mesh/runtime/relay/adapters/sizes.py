"""The expected size of a model, for servers that state none and whose memory cannot be observed."""

import json

from mesh.pb import modelruntime_pb2 as pb

FACTOR = 1.25
"""Memory of a model over the size of its files: the predecessor's estimate for the servers with an adapter."""


def predicted(request: pb.PredictModelSizeRequest, *, default: int) -> pb.PredictModelSizeResponse:
    """Returns the expected size of a model, in bytes: `default` if the size of its files is unknown."""
    try:
        size = json.loads(request.modelKey)["disk_size_bytes"]
    except (ValueError, KeyError, TypeError):
        size = 0
    known = isinstance(size, int) and size > 0
    return pb.PredictModelSizeResponse(sizeInBytes=int(size * FACTOR) if known else default)
