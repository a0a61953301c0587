"""V2's methods on the server: live, ready, metadata.

To clients, the server is the whole mesh. Live means that this worker answers. Ready means that an inference can be
served: this router and at least one runtime pod are ready. That is stricter than the router's own readiness (`/ready`
on its probe port, `grpc.health.v1`), by which load balancers choose among routers. A router registers models and lists
pods even while no runtime pod is up, and taking all routers out of service would only hide the reason.
"""

import importlib.metadata
from collections.abc import Callable

from mesh.pb import inference_pb2 as pb
from mesh.schema import records
from router.state.view import View

NAME = "mesh"
EXTENSIONS = ("binary_tensor_data",)

try:
    VERSION = importlib.metadata.version("mesh-serving")
except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
    VERSION = "0"


class V2Server:
    """The V2 server that one worker presents to clients."""

    def __init__(self, view: View, ready: Callable[[], str | None]) -> None:
        """Makes the server. `ready` returns the reason why this router accepts no calls, or None if it does."""
        self._view = view
        self._router = ready

    def live(self, _: pb.ServerLiveRequest) -> pb.ServerLiveResponse:
        """Answers that the server is live, which means only that this worker answers."""
        return pb.ServerLiveResponse(live=True)

    def ready(self, _: pb.ServerReadyRequest) -> pb.ServerReadyResponse:
        """Returns whether an inference can be served. `why_not_ready` gives the reason if not."""
        return pb.ServerReadyResponse(ready=self.why_not_ready() is None)

    def metadata(self, _: pb.ServerMetadataRequest) -> pb.ServerMetadataResponse:
        """Returns the server's name, version and extensions."""
        return pb.ServerMetadataResponse(name=NAME, version=VERSION, extensions=EXTENSIONS)

    def why_not_ready(self) -> str | None:
        """Returns the reason why no inference can be served now, or None if the mesh is ready. Suspect pods count as
        ready."""
        reason = self._router()
        if reason is not None:
            return reason
        pods = self._view.pods.values()
        if any(pod.record is not None and pod.record.state == records.READY for pod in pods):
            return None
        states = sorted(pod.record.state for pod in pods if pod.record is not None)
        return f"no runtime pod is ready ({', '.join(states)})" if states else "there is no runtime pod"
