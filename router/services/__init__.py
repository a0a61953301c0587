"""gRPC services that a worker answers itself: health, reflection, the server part of V2, and management.

The dispatcher looks up each call's method in `methods` before it forwards the call. A method answers the call
immediately or later.
"""

from collections.abc import Callable, Mapping

from mesh.wire.call import Handler
from router.access.audit import Audit
from router.access.guard import Guard
from router.inference.server import V2Server
from router.management.handlers import Management
from router.services import health, modelmesh, reflection, v2server
from router.services.methods import for_known


def methods(
    *,
    ready: Callable[[], str | None],
    server: V2Server,
    management: Management,
    managed: modelmesh.Managed,
    guard: Guard,
    audit: Audit,
) -> Mapping[bytes, Handler]:
    """Returns all methods by full name, with the leading slash."""
    return {
        **health.Health(ready).methods(),
        **for_known(guard, reflection.METHODS),
        **v2server.methods(server, guard),
        **modelmesh.methods(management, managed, guard, audit),
    }
