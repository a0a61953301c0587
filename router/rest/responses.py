"""Failures as aiohttp responses."""

import json
import math
from typing import Any

from aiohttp import web

from mesh.statuses import MeshError
from router.rest import errors


def of_error(error: MeshError) -> web.Response:
    """Returns the response for a failure of the router's own."""
    return response(*errors.of_error(error))


def response(status: int, body: dict[str, Any]) -> web.Response:
    """Returns the response with that body, and `Retry-After` if the body says how long to wait."""
    headers = {}
    if "retry_after" in body:
        headers["Retry-After"] = str(max(1, math.ceil(body["retry_after"])))
    return web.Response(status=status, body=json.dumps(body).encode(), content_type="application/json", headers=headers)
