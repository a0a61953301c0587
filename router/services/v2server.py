"""The server part of V2: `ServerLive`, `ServerReady`, `ServerMetadata`. REST asks the same functions.

The server that clients see is the whole mesh, so live means that this worker answers, and ready that an inference can
be served: this router is ready, and a runtime pod as well. That is stricter than the router's own readiness (`/ready`
of its probe port, `grpc.health.v1`), by which load balancers choose among routers: models are registered and pods
looked at through a router also while no runtime pod is up, and taking all routers away would only hide the reason.
"""

import importlib.metadata
from typing import TYPE_CHECKING

from mesh.pb import inference_pb2 as pb
from mesh.schema import records
from mesh.v2 import PREFIX
from router.services import methods

if TYPE_CHECKING:
    from router.process.context import Worker

NAME = "mesh"
EXTENSIONS = ("binary_tensor_data",)

try:
    VERSION = importlib.metadata.version("mesh-serving")
except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
    VERSION = "0"


def why_not_ready(worker: "Worker") -> str | None:
    """Says why no inference can be served now; None: it can. Pods that are only suspected still count."""
    reason = worker.ready()
    if reason is not None:
        return reason
    pods = worker.view.pods.values()
    if any(pod.record is not None and pod.record.state == records.READY for pod in pods):
        return None
    states = sorted(pod.record.state for pod in pods if pod.record is not None)
    return f"no runtime pod is ready ({', '.join(states)})" if states else "there is no runtime pod"


def _live(_: "Worker", __: pb.ServerLiveRequest) -> pb.ServerLiveResponse:
    return pb.ServerLiveResponse(live=True)


def _ready(worker: "Worker", _: pb.ServerReadyRequest) -> pb.ServerReadyResponse:
    return pb.ServerReadyResponse(ready=why_not_ready(worker) is None)


def _metadata(_: "Worker", __: pb.ServerMetadataRequest) -> pb.ServerMetadataResponse:
    return pb.ServerMetadataResponse(name=NAME, version=VERSION, extensions=EXTENSIONS)


METHODS = {
    PREFIX + b"ServerLive": methods.unary(pb.ServerLiveRequest, _live),
    PREFIX + b"ServerReady": methods.unary(pb.ServerReadyRequest, _ready),
    PREFIX + b"ServerMetadata": methods.unary(pb.ServerMetadataRequest, _metadata),
}
