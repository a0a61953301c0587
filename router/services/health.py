"""`grpc.health.v1.Health`: whether this router can serve, for load balancers and `grpc_health_probe`.

It says the same as the `/ready` probe, whichever of our services is asked for: they are ready together.
"""

import asyncio
from typing import TYPE_CHECKING

from mesh.pb import health_pb2 as pb
from mesh.statuses import Code, MeshError, Reason
from mesh.v2 import SERVICE
from mesh.wire import call as wire
from mesh.wire import framing
from router.services import methods

if TYPE_CHECKING:
    from router.process.context import Worker

KNOWN = frozenset({"", SERVICE, "mmesh.ModelMesh", "grpc.health.v1.Health"})

MAX_WATCHES = 1000
"""Calls of Watch at once, in one worker: each looks once a second, at 20 us."""

_watches: set[wire.Call] = set()
_LOOK = 1.0  # seconds between looks of a watch: readiness is a question, it sends no events

_Status = pb.HealthCheckResponse.ServingStatus


def _status(worker: "Worker", service: str) -> _Status:
    if service not in KNOWN:
        return pb.HealthCheckResponse.SERVICE_UNKNOWN
    return pb.HealthCheckResponse.SERVING if worker.ready() is None else pb.HealthCheckResponse.NOT_SERVING


async def _check(worker: "Worker", call: wire.Call) -> None:
    frame = await call.read()
    request = methods.decode(pb.HealthCheckRequest, call, frame or framing.pack(b""))
    status = _status(worker, request.service)
    if status == pb.HealthCheckResponse.SERVICE_UNKNOWN:  # as the protocol demands, of Check only
        call.fail(Code.NOT_FOUND, f"unknown service {request.service:.200}")
    else:
        call.reply(framing.pack(pb.HealthCheckResponse(status=status).SerializeToString()))


async def _watch(worker: "Worker", call: wire.Call) -> None:
    if len(_watches) >= MAX_WATCHES:
        text = f"{MAX_WATCHES} calls watch the health of this worker: use Check"
        raise MeshError(Reason.OVERLOADED, text, retry_after=_LOOK)
    _watches.add(call)
    try:
        await _follow(worker, call)
    finally:
        _watches.discard(call)


async def _follow(worker: "Worker", call: wire.Call) -> None:
    frame = await call.read()
    request = methods.decode(pb.HealthCheckRequest, call, frame or framing.pack(b""))
    call.start()
    last = None
    while True:
        status = _status(worker, request.service)
        if status != last:
            last = status
            await call.write(framing.pack(pb.HealthCheckResponse(status=status).SerializeToString()))
        await asyncio.sleep(_LOOK)


METHODS = {
    b"/grpc.health.v1.Health/Check": methods.streaming(_check),
    b"/grpc.health.v1.Health/Watch": methods.streaming(_watch),
}
