"""Errors as REST answers: the HTTP status from the table in `mesh.statuses`, and the reason as JSON.

An error of the worker's own dispatcher is a gRPC status with details. The HTTP status follows from the reason in the
details, because reasons with different HTTP statuses may have the same gRPC code. A model server's answer has no such
details, so its gRPC code decides.
"""

import json
import math
from typing import Any

from mesh import statuses
from mesh.statuses import Code, MeshError, Reason
from mesh.wire.call import Header
from mesh.wire.localcall import LocalAnswer
from router.calls import answers

_MAX_TEXT = 4000  # bytes

CHALLENGE = (b"www-authenticate", b'Bearer realm="mesh"')
"""The header field of every answer to an unknown caller (RFC 9110, 11.6.1)."""


def of_answer(answer: LocalAnswer) -> tuple[int, dict[str, Any]]:
    """Returns HTTP status and body for a call that failed."""
    error = answers.our_own(answer)
    if error is not None:
        return of_error(error)
    try:
        name = Code(answer.code).name
    except ValueError:
        name = Code.UNKNOWN.name
    text = statuses.shortened(answer.text, _MAX_TEXT) or name
    return statuses.http_of_code(answer.code), {"error": text, "reason": name, "code": answer.code}


def of_error(error: MeshError) -> tuple[int, dict[str, Any]]:
    """Returns the HTTP status and body for an error that the router itself raised."""
    text = statuses.shortened(error.text, _MAX_TEXT)
    body: dict[str, Any] = {"error": text, "reason": error.reason.name, "code": int(error.reason.code)}
    if error.retry_after is not None:
        body["retry_after"] = round(error.retry_after, 3)
    if error.details:
        body["details"] = error.details
    return error.reason.http, body


def encoded(status: int, body: dict[str, Any]) -> tuple[int, list[Header], bytes]:
    """Returns the status, headers and encoded body. The headers contain `Retry-After` if the body says how long to
    wait, and CHALLENGE if the status is 401."""
    headers: list[Header] = []
    if status == Reason.UNAUTHENTICATED.http:
        headers.append(CHALLENGE)
    if "retry_after" in body:
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(body["retry_after"]))))
    return status, headers, json.dumps(body).encode()
