"""`grpc.health.v1.Health`: the readiness of the worker that answers, for load balancers and `grpc_health_probe`.

The answer is the same for each of the router's services, because all of them are ready at the same time. The probe
`/ready` answers for the whole router pod.
"""

import asyncio
from collections.abc import Callable, Mapping

from mesh.pb import health_pb2 as pb
from mesh.statuses import Code, MeshError, Reason
from mesh.v2 import SERVICE
from mesh.wire import call as wire
from mesh.wire import framing
from router.services.methods import decode, streaming

KNOWN = frozenset({"", SERVICE, "mmesh.ModelMesh", "grpc.health.v1.Health"})

MAX_WATCHES = 1000
"""Largest number of concurrent calls of Watch in one worker. Each checks once a second, which takes 20 us."""

_LOOK = 1.0  # seconds between two checks of a watch: readiness has to be polled

_Status = pb.HealthCheckResponse.ServingStatus


class Health:
    """The health of one worker."""

    def __init__(self, ready: Callable[[], str | None]) -> None:
        """Makes the health service. `ready` returns the reason why this worker accepts no calls, or None if it does."""
        self._ready = ready
        self.watches = 0  # calls of Watch in flight

    def methods(self) -> Mapping[bytes, wire.Handler]:
        """Returns the methods by full name, with the leading slash."""
        return {
            b"/grpc.health.v1.Health/Check": streaming(self._check),
            b"/grpc.health.v1.Health/Watch": streaming(self._watch),
        }

    def _status(self, service: str) -> _Status:
        if service not in KNOWN:
            return pb.HealthCheckResponse.SERVICE_UNKNOWN
        return pb.HealthCheckResponse.SERVING if self._ready() is None else pb.HealthCheckResponse.NOT_SERVING

    async def _check(self, call: wire.Call) -> None:
        frame = await call.read()
        request = decode(pb.HealthCheckRequest, call, frame or framing.pack(b""))
        status = self._status(request.service)
        if status == pb.HealthCheckResponse.SERVICE_UNKNOWN:  # as the protocol demands for Check, but not for Watch
            call.fail(Code.NOT_FOUND, f"unknown service {request.service:.200}")
        else:
            call.reply(framing.pack(pb.HealthCheckResponse(status=status).SerializeToString()))

    async def _watch(self, call: wire.Call) -> None:
        if self.watches >= MAX_WATCHES:
            text = f"{MAX_WATCHES} calls already watch the health of this worker, which is the limit: use Check"
            raise MeshError(Reason.OVERLOADED, text, retry_after=_LOOK)
        self.watches += 1
        try:
            await self._follow(call)
        finally:
            self.watches -= 1

    async def _follow(self, call: wire.Call) -> None:
        frame = await call.read()
        request = decode(pb.HealthCheckRequest, call, frame or framing.pack(b""))
        call.start()
        last = None
        while True:
            status = self._status(request.service)
            if status != last:
                last = status
                await call.write(framing.pack(pb.HealthCheckResponse(status=status).SerializeToString()))
            await asyncio.sleep(_LOOK)
