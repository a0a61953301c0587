"""What one worker process consists of, for the services that it answers itself.

Health, reflection, REST and management need parts of the worker; handing them this keeps them free of knowing how it
is put together, which is `router.process.worker`'s business.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from mesh.telemetry import metrics
from router.calls.dispatch import Dispatcher
from router.management.models import Management
from router.rest.bodies import Bodies
from router.rest.conversions import Conversions
from router.settings import RouterSettings
from router.state.dynamic import Dynamic
from router.state.view import View


@dataclass(slots=True, kw_only=True)
class Worker:
    """One worker's parts."""

    settings: RouterSettings
    view: View
    dispatcher: Dispatcher
    management: Management
    dynamic: Dynamic
    registry: metrics.Registry  # this worker's metrics
    ready: Callable[[], str | None]  # None: ready; a text: why not
    bodies: Bodies  # of REST
    conversions: Conversions
    snapshots: Callable[[], Awaitable[metrics.Snapshot]]  # metrics of all workers of this router pod, merged; bounded
