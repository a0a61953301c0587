"""The dispatch of calls: to a service in this worker, to management, to a model, or to several.

All transports (the HTTP/1.1 server, the `grpc.aio` edge, REST) use this handler, so a call has the same meaning on each
of them.
"""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any

from mesh.access.verbs import Verb
from mesh.statuses import MeshError, Reason
from mesh.telemetry import logs
from mesh.wire.call import Call, CallCancelled, Handler
from router.access.credentials import Unsettled
from router.access.guard import Guard
from router.calls import answers, several, streams
from router.calls.forwarder import Forwarder
from router.calls.routes import Asked, Method, Routes, SeveralIds, names_several
from router.calls.unary import UnaryCall

log = logs.get(__name__)

Allow = Callable[[str], None]
"""A function that raises MeshError if the caller may not call the model or alias of that name."""


class Dispatcher:
    """The handler of all calls of a worker."""

    def __init__(self, forwarder: Forwarder, routes: Routes, guard: Guard | None = None) -> None:
        """Makes a dispatcher. With a `guard`, a call is forwarded only if the guard allows the caller to call the
        model."""
        self.forwarder = forwarder
        self._guard = guard
        self._routes = routes
        self._services: Mapping[bytes, Handler] = {}
        self._several = several.SeveralCalls(forwarder, self.dispatch)

    def serve(self, services: Mapping[bytes, Handler]) -> None:
        """Sets the handlers, by full method name, for the methods that this worker answers itself."""
        self._services = services

    def forwards(self, call: Call) -> bool:
        """Returns whether the messages of a stream are only passed on, so that large messages may arrive in pieces.
        This is so if the metadata has the id of a single model."""
        if call.method in self._services:
            return False
        method = self._routes.method(call.method)
        return not method.path and not method.refused and not names_several(call.headers)

    def dispatch(self, call: Call) -> None:
        """Answers the call, now or later. Never raises, whatever the client sends."""
        service = self._services.get(call.method)
        if service is not None:
            service(call)
            return
        method = self._routes.method(call.method)
        if self._guard is None:
            self._admit(call, method, None)
            return
        try:
            principal = self._guard.known(call.headers)
        except Unsettled as unsettled:
            self._start(call, method, self._introduced(call, method, self._guard, unsettled), "identify a caller")
        except MeshError as error:  # nothing of the request has been read
            self._refuse(call, method, b"", error)
        else:
            self._admit(call, method, partial(self._guard.allow, principal, Verb.INFER))

    async def _introduced(self, call: Call, method: Method, guard: Guard, unsettled: Unsettled) -> None:
        """Waits until the caller is identified, then carries or refuses the call."""
        try:
            with several.cancelled_with(call):
                principal = await unsettled.settle(call.deadline)
        except MeshError as error:
            self._refuse(call, method, b"", error)
        else:
            self._admit(call, method, partial(guard.allow, principal, Verb.INFER))

    def _admit(self, call: Call, method: Method, allow: Allow | None) -> None:
        """Carries the call of a known caller. `allow` decides on the names that the call asks for; None allows all."""
        routes = self._routes
        if method.refused:
            answers.fail(call, MeshError(Reason.UNKNOWN_METHOD, method.refused))
            return
        frame = call.frame
        if frame is None:
            if names_several(call.headers):
                self._start(call, method, self._one_message(call, method, allow), "read a request for several models")
            else:
                self.forwarder.tasks.start(streams.carry(self.forwarder, routes, call, method, allow), "stream")
            return
        try:
            asked = routes.asked(call, method, frame)
            if allow is not None:
                allow(asked[0])
            found = self.forwarder.aliases.settled(call, asked)
        except SeveralIds as ids:
            # Each of these calls comes back here with the caller's credentials, and is decided by its own id.
            self.forwarder.tasks.start(self._several.carry(call, frame, ids), "call several models")
            return
        except MeshError as error:
            self._refuse(call, method, frame, error)
            return
        if found is not None:
            UnaryCall(self.forwarder, call, frame, method, asked, found).begin()
        else:
            self._start(call, method, self._resolved(call, method, frame, asked), "resolve a name")

    def _start(self, call: Call, method: Method, work: Coroutine[Any, Any, None], name: str) -> None:
        """Starts the task that owns the call until it is answered or passed on."""
        self.forwarder.tasks.start(self._owned(call, method, work), name)

    async def _owned(self, call: Call, method: Method, work: Coroutine[Any, Any, None]) -> None:
        """Awaits the work of one call. If it fails unexpectedly, answers the call: otherwise a caller without a
        deadline would wait forever."""
        try:
            await work
        except asyncio.CancelledError:
            if not call.cancelled:
                self._refuse(call, method, b"", answers.stopping())
        except Exception:
            log.exception("a call failed in the router's own code", method=call.method)
            self._refuse(call, method, b"", answers.internal_error())

    async def _resolved(self, call: Call, method: Method, frame: bytes, asked: Asked) -> None:
        """Resolves the call's name by reading etcd, then forwards the call."""
        try:
            async with asyncio.timeout_at(call.deadline):
                found = await self.forwarder.aliases.resolve(call, asked)
        except MeshError as error:
            self._refuse(call, method, frame, error)
        except TimeoutError:
            text = (
                f"etcd did not answer within the call's deadline, so {asked[0][:200]} was not looked up: "
                "call with a later deadline"
            )
            self._refuse(call, method, frame, MeshError(Reason.DEADLINE, text))
        else:
            if not call.cancelled:
                UnaryCall(self.forwarder, call, frame, method, asked, found).begin()

    async def _one_message(self, call: Call, method: Method, allow: Allow | None) -> None:
        """Carries a call with several ids that arrives as a stream. Waits for its only message, and then treats it as a
        unary call."""
        try:
            with several.cancelled_with(call):
                async with asyncio.timeout_at(call.deadline):
                    frame = await call.read()
                    if frame is None or await call.read() is not None:
                        raise MeshError(Reason.BAD_REQUEST, "a call with several model ids needs exactly one message")
            asked = self._routes.asked(call, method, frame)
            if allow is not None:
                allow(asked[0])
        except SeveralIds as ids:
            assert frame is not None
            await self._several.carry(call, frame, ids)
        except MeshError as error:
            self._refuse(call, method, b"", error)
        except TimeoutError:
            text = "the request did not arrive completely within the call's deadline: call with a later deadline"
            self._refuse(call, method, b"", MeshError(Reason.DEADLINE, text))
        except CallCancelled:
            pass
        else:  # the id in the message counts, not those in the metadata
            await self._resolved(call, method, frame, asked)

    def _refuse(self, call: Call, method: Method, frame: bytes, error: MeshError) -> None:
        answers.fail(call, error)
        self.forwarder.meter.call(method.label, error.reason.code, 0.0, len(frame))
