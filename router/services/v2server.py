"""The server part of V2: `ServerLive`, `ServerReady`, `ServerMetadata`. REST asks the same functions.

The server that clients see is the whole mesh, so live means that this worker answers, and ready that it can serve.
"""

import importlib.metadata
from typing import TYPE_CHECKING

from mesh.pb import inference_pb2 as pb
from router.services import methods

if TYPE_CHECKING:
    from router.context import Worker

NAME = "mesh"
EXTENSIONS = ("binary_tensor_data",)

try:
    VERSION = importlib.metadata.version("mesh-serving")
except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
    VERSION = "0"


def _live(_: "Worker", __: pb.ServerLiveRequest) -> pb.ServerLiveResponse:
    return pb.ServerLiveResponse(live=True)


def _ready(worker: "Worker", _: pb.ServerReadyRequest) -> pb.ServerReadyResponse:
    return pb.ServerReadyResponse(ready=worker.ready() is None)


def _metadata(_: "Worker", __: pb.ServerMetadataRequest) -> pb.ServerMetadataResponse:
    return pb.ServerMetadataResponse(name=NAME, version=VERSION, extensions=EXTENSIONS)


_V2 = b"/inference.GRPCInferenceService/"

METHODS = {
    _V2 + b"ServerLive": methods.unary(pb.ServerLiveRequest, _live),
    _V2 + b"ServerReady": methods.unary(pb.ServerReadyRequest, _ready),
    _V2 + b"ServerMetadata": methods.unary(pb.ServerMetadataRequest, _metadata),
}
