"""V2's methods on the server, over gRPC: `ServerLive`, `ServerReady`, `ServerMetadata`."""

from collections.abc import Mapping

from mesh.pb import inference_pb2 as pb
from mesh.v2 import PREFIX
from mesh.wire.call import Handler
from router.access.guard import Guard
from router.inference.server import V2Server
from router.services.methods import for_known, unary


def methods(server: V2Server, guard: Guard) -> Mapping[bytes, Handler]:
    """Returns the methods by full name, with the leading slash. Those for probes answer every caller."""
    return {
        PREFIX + b"ServerLive": unary(pb.ServerLiveRequest, server.live),
        PREFIX + b"ServerReady": unary(pb.ServerReadyRequest, server.ready),
        **for_known(guard, {PREFIX + b"ServerMetadata": unary(pb.ServerMetadataRequest, server.metadata)}),
    }
