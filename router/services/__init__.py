"""The methods that a worker answers itself, about itself: health, reflection, and the server part of V2.

`SERVICES` is looked up by the dispatcher before anything is forwarded. The methods of `mmesh.ModelMesh` are not among
them: they manage models and stand in a module of their own.
"""

from collections.abc import Mapping

from router.services import health, reflection, v2server
from router.services.methods import Method

SERVICES: Mapping[bytes, Method] = {**health.METHODS, **reflection.METHODS, **v2server.METHODS}
"""By full name, with the leading slash. Each takes the worker and the call and answers the call, then or later."""
