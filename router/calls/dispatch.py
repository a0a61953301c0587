"""The dispatch of calls: to a service in this worker, to management, or to a model.

All transports (the HTTP/1.1 server, the `grpc.aio` edge, REST) share this handler, so a call means the same on each of
them.
"""

import asyncio
from collections.abc import Mapping

from mesh.statuses import MeshError, Reason
from mesh.wire.call import Call, Handler
from router.calls import answers, streams
from router.calls.forwarder import Forwarder
from router.calls.routes import Asked, Method, Routes
from router.calls.unary import UnaryCall


class Dispatcher:
    """The handler of all calls of a worker."""

    def __init__(self, forwarder: Forwarder, routes: Routes) -> None:
        self.forwarder = forwarder
        self._routes = routes
        self._services: Mapping[bytes, Handler] = {}

    def serve(self, services: Mapping[bytes, Handler]) -> None:
        """Registers handlers for the methods that this worker answers itself."""
        self._services = services

    def dispatch(self, call: Call) -> None:
        """Answers the call, now or later. Does not raise, whatever the client sends."""
        service = self._services.get(call.method)
        if service is not None:
            service(call)
            return
        routes = self._routes
        method = routes.method(call.method)
        if method.refused:
            answers.fail(call, MeshError(Reason.UNKNOWN_METHOD, method.refused))
            return
        frame = call.frame
        if frame is None:
            self.forwarder.tasks.start(streams.carry(self.forwarder, routes, call, method), "stream")
            return
        try:
            asked = routes.asked(call, method, frame)
            found = self.forwarder.aliases.settled(call, asked)
        except MeshError as error:
            self._refuse(call, method, frame, error)
            return
        if found is not None:
            UnaryCall(self.forwarder, call, frame, method, asked, found).begin()
        else:
            self.forwarder.tasks.start(self._resolved(call, method, frame, asked), "resolve a name")

    async def _resolved(self, call: Call, method: Method, frame: bytes, asked: Asked) -> None:
        """Resolves the call's name by reading etcd, then forwards the call to that model."""
        try:
            async with asyncio.timeout_at(call.deadline):
                found = await self.forwarder.aliases.resolve(call, asked)
        except MeshError as error:
            self._refuse(call, method, frame, error)
        except TimeoutError:
            self._refuse(call, method, frame, MeshError(Reason.DEADLINE, "the deadline has passed"))
        else:
            if not call.cancelled:
                UnaryCall(self.forwarder, call, frame, method, asked, found).begin()

    def _refuse(self, call: Call, method: Method, frame: bytes, error: MeshError) -> None:
        answers.fail(call, error)
        self.forwarder.meter.call(method.label, error.reason.code, 0.0, len(frame))
