"""The parts of a worker that its REST application needs."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from mesh.schema.authstore import AuthStore
from mesh.telemetry import metrics
from router.access.audit import Audit
from router.access.guard import Guard
from router.inference.models import Models
from router.inference.server import V2Server
from router.management.handlers import Management
from router.rest.bodies import Bodies
from router.rest.inference import Inference
from router.settings import RouterSettings
from router.state.view import View


@dataclass(slots=True, kw_only=True)
class Parts:
    """The parts of one worker that REST handlers use."""

    settings: RouterSettings
    server: V2Server
    models: Models
    inference: Inference
    management: Management
    view: View
    bodies: Bodies
    guard: Guard
    audit: Audit
    authstore: AuthStore
    snapshots: Callable[[], Awaitable[metrics.Snapshot]]  # merged metrics of all workers of this router pod
    dataplane: Callable[[], Mapping[str, object] | None]  # the configuration in force, if there is one
    grants_file: Callable[[], Mapping[str, object] | None]  # the grants of the followed file, if there is one
