"""The protection of management over REST against foreign web pages.

Without a preflight, browsers send requests that a form could send (a POST with one of three content types, or none) to
any address. A page on the Internet could thus register models in a mesh on its reader's laptop. Therefore a request
that changes something must have JSON's content type, or the mesh's own header. For either, a browser sends a preflight
first, which always fails because there is no CORS here. Requests whose `Origin` differs from the address to which they
were sent are refused as well.

The owner of a page can also make its host name resolve to 127.0.0.1, and then the origin is the same. Therefore, if the
mesh listens on loopback only, the host in a request must be one of this machine's names.
"""

import ipaddress
import urllib.parse

from aiohttp import HttpVersion11, web

from mesh.options import values
from mesh.statuses import MeshError, Reason

HEADER = "X-Mesh-Request"
"""A header that a form cannot send. Its value does not matter."""

_READING = frozenset({"GET", "HEAD", "OPTIONS"})
_JSON = frozenset(
    {"application/json", "application/x-ndjson", "application/ndjson", "application/jsonl", "application/jsonlines"}
)
_OURS = frozenset({"localhost", "mesh"})  # `mesh`: the edge gives it to HTTP/1.0 requests that name no host


def is_loopback(address: str) -> bool:
    """Returns whether a listening address (`127.0.0.1:8033`) can only be reached from this machine."""
    host, _ = values.parse_address(address)
    return _is_local(host)


def check(request: web.Request, *, loopback: bool) -> None:
    """Checks that no foreign web page can have sent a request. Otherwise raises MeshError."""
    host = _host_of(request.headers.get("Host", ""))
    if not host and request.version < HttpVersion11:
        host = "mesh"  # Envoy's default; browsers always name a host
    if loopback and not _is_local(host):
        text = f"this mesh listens on loopback only, but the request is for the host {host:.100}: use localhost"
        raise MeshError(Reason.FORBIDDEN, text)
    origin = request.headers.get("Origin")
    if origin is not None and not _same(origin, request.headers.get("Host", "")):
        text = f"the request comes from a web page of {origin:.100}, but was sent to the host {host:.100}"
        way = "use a program, or if a proxy is between them, let it pass on the Host header"
        raise MeshError(Reason.FORBIDDEN, f"{text}, and foreign pages may not manage this mesh: {way}")
    if request.method in _READING or request.method == "DELETE":  # browsers send a preflight first
        return
    if HEADER not in request.headers and not _is_json(request.headers.get("Content-Type", "")):
        text = f"send the header Content-Type: application/json, or {HEADER}: 1 (it proves that no web page sent this)"
        raise MeshError(Reason.UNSUPPORTED_TYPE, text)


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind in _JSON or (kind.startswith("application/") and kind.endswith("+json"))


def _host_of(authority: str) -> str:
    """Returns the host in a `Host` header, without its port."""
    host = authority.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


def _is_local(host: str) -> bool:
    if host in _OURS or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _same(origin: str, authority: str) -> bool:
    """Returns whether an origin (`http://host:port`) is the address to which a request was sent. `null` never is."""
    try:
        parts = urllib.parse.urlsplit(origin)
        port = parts.port
    except ValueError:
        return False
    if parts.scheme not in ("http", "https") or parts.hostname is None:
        return False
    default = 443 if parts.scheme == "https" else 80
    theirs = (parts.hostname, port or default)
    try:
        asked = urllib.parse.urlsplit(f"{parts.scheme}://{authority.strip()}")
        return theirs == (asked.hostname, asked.port or default)
    except ValueError:
        return False
