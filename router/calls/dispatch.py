"""The dispatch of each call: to a service of the worker's own, to management, or on to a model.

All transports (the HTTP/1.1 server, the `grpc.aio` edge, REST) share this handler, so a call means the same over each.
"""

from collections.abc import Mapping

from mesh.statuses import MeshError, Reason
from mesh.wire.call import Call, Handler
from router.calls import answers, streams
from router.calls.forwarder import Forwarder
from router.calls.routes import Routes
from router.calls.unary import UnaryCall


class Dispatcher:
    """The one handler of all calls of a worker."""

    def __init__(self, forwarder: Forwarder, routes: Routes) -> None:
        self.forwarder = forwarder
        self._routes = routes
        self._services: Mapping[bytes, Handler] = {}

    def serve(self, services: Mapping[bytes, Handler]) -> None:
        """Registers methods that are answered here, each by its handler."""
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
            model_id = routes.model_id(call, method, frame)
        except MeshError as error:
            answers.fail(call, error)
            self.forwarder.meter.call(method.label, error.reason.code, 0.0, len(frame))
            return
        UnaryCall(self.forwarder, call, frame, method, model_id).begin()
