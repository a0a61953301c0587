"""Errors as aiohttp responses."""

from typing import Any

from aiohttp import web

from mesh.statuses import MeshError
from router.rest import errors


def of_error(error: MeshError) -> web.Response:
    """Returns the response for an error that the router itself raised."""
    return response(*errors.of_error(error))


def response(status: int, body: dict[str, Any]) -> web.Response:
    """Returns the response with a body. Adds `Retry-After` if the body says how long to wait."""
    status, headers, encoded = errors.encoded(status, body)
    named = {name.decode().title(): value.decode() for name, value in headers}
    return web.Response(status=status, body=encoded, content_type="application/json", headers=named)
