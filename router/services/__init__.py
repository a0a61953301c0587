"""gRPC services that a worker answers itself: health, reflection, the server part of V2, and management.

`methods` is looked up by the dispatcher before anything is forwarded. Each takes a call and answers it, then or later.
"""

from collections.abc import Callable, Mapping

from mesh.wire.call import Handler
from router.inference.server import Server
from router.management.handlers import Management
from router.services import health, modelmesh, reflection, v2server


def methods(
    *, ready: Callable[[], str | None], server: Server, management: Management, managed: modelmesh.Managed
) -> Mapping[bytes, Handler]:
    """Returns all of them by full name, with the leading slash."""
    return {
        **health.Health(ready).methods(),
        **reflection.METHODS,
        **v2server.methods(server),
        **modelmesh.methods(management, managed),
    }
