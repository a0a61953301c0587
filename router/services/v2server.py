"""V2's methods on the server, over gRPC: `ServerLive`, `ServerReady`, `ServerMetadata`."""

from collections.abc import Mapping

from mesh.pb import inference_pb2 as pb
from mesh.v2 import PREFIX
from mesh.wire.call import Handler
from router.inference.server import V2Server
from router.services.methods import unary


def methods(server: V2Server) -> Mapping[bytes, Handler]:
    """Returns the methods by full name, with the leading slash."""
    return {
        PREFIX + b"ServerLive": unary(pb.ServerLiveRequest, server.live),
        PREFIX + b"ServerReady": unary(pb.ServerReadyRequest, server.ready),
        PREFIX + b"ServerMetadata": unary(pb.ServerMetadataRequest, server.metadata),
    }
