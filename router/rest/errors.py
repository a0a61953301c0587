"""Failures as REST answers: the HTTP status from the table in `mesh.statuses`, and the reason as JSON.

A failure in the worker's own dispatcher comes back through a call, as a gRPC status with details. The HTTP status
follows from the reason in the details, because reasons with different HTTP statuses may share a gRPC code. A model
server's answer has no such details, so its code decides.
"""

import json
import math
from typing import Any

from google.protobuf.message import DecodeError

from mesh import statuses
from mesh.pb import details_pb2
from mesh.statuses import Code, MeshError, Reason
from mesh.wire import metadata
from mesh.wire.call import Header
from router.calls import answers
from router.inference.localcall import LocalAnswer

_MAX_TEXT = 4000  # bytes


def of_answer(answer: LocalAnswer) -> tuple[int, dict[str, Any]]:
    """Returns HTTP status and body for a call that failed."""
    error = _our_own(answer)
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
    """Returns the status, headers and encoded body. If the body says how long to wait, the headers contain
    `Retry-After`."""
    headers = []
    if "retry_after" in body:
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(body["retry_after"]))))
    return status, headers, json.dumps(body).encode()


def _our_own(answer: LocalAnswer) -> MeshError | None:
    encoded = answer.metadata(answers.DETAILS)
    if encoded is None:
        return None
    try:
        status = details_pb2.Status.FromString(metadata.decode_bin(encoded))
        reason, retry_after, details = None, None, {}
        for detail in status.details:
            if detail.type_url.endswith("/google.rpc.ErrorInfo"):
                info = details_pb2.ErrorInfo.FromString(detail.value)
                if info.domain == statuses.DOMAIN and info.reason in Reason.__members__:
                    reason, details = Reason[info.reason], dict(info.metadata)
            elif detail.type_url.endswith("/google.rpc.RetryInfo"):
                delay = details_pb2.RetryInfo.FromString(detail.value).retry_delay
                retry_after = delay.seconds + delay.nanos / 1e9
    except (ValueError, DecodeError):  # details from a model server, and malformed: use its code and text
        return None
    if reason is None or reason.code != answer.code:
        return None
    return MeshError(reason, answer.text, retry_after=retry_after, details=details)
