"""Handlers for a service's methods, which turn frames into messages and failures into statuses.

Unary methods whose request has arrived are answered immediately, without a task. All others run in tasks that end when
their caller goes away.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from mesh.process.tasks import Tasks
from mesh.statuses import MeshError, Reason
from mesh.wire import call as wire
from mesh.wire import framing
from router.access import operations
from router.access.credentials import Unsettled
from router.access.guard import Guard
from router.calls import answers

M = TypeVar("M", bound=Message)

MAX_REQUEST = 1 << 20  # bytes; these requests only hold names

_tasks = Tasks()  # each ends with its call, and calls end with their connections


def decode(message: type[M], call: wire.Call, frame: bytes) -> M:
    """Returns the request in a frame. Raises MeshError BAD_REQUEST if the frame contains no such message, TOO_LARGE if
    it has more than MAX_REQUEST bytes."""
    try:
        return message.FromString(framing.unpack(frame, call.encoding, limit=MAX_REQUEST))
    except DecodeError as error:
        raise MeshError(
            Reason.BAD_REQUEST,
            f"the request cannot be decoded: send a message of type {message.DESCRIPTOR.full_name}",
        ) from error


def unary(message: type[M], answer: Callable[[M], Message]) -> wire.Handler:
    """Returns the handler of a method that answers one message with one message. `answer` may raise MeshError."""

    def reply(call: wire.Call, frame: bytes) -> None:
        try:
            call.reply(framing.pack(answer(decode(message, call, frame)).SerializeToString()))
        except MeshError as error:
            answers.fail(call, error)

    async def late(call: wire.Call) -> None:
        frame = await call.read()
        if frame is None:
            raise MeshError(Reason.BAD_REQUEST, "the call has no request message")
        reply(call, frame)

    def method(call: wire.Call) -> None:
        if call.frame is not None:
            reply(call, call.frame)
        else:
            run(call, lambda: late(call))

    return method


def for_known(guard: Guard, handlers: Mapping[bytes, wire.Handler]) -> dict[bytes, wire.Handler]:
    """Returns handlers that answer only known callers. If the guard also admits unknown callers to such operations,
    returns the handlers unchanged."""
    if not guard.asks(operations.SERVER.verb):
        return dict(handlers)

    def known(handler: wire.Handler) -> wire.Handler:
        def answer(call: wire.Call) -> None:
            try:
                guard.known(call.headers)
            except Unsettled as unsettled:
                run(call, partial(late, unsettled, call))
            except MeshError as error:
                answers.fail(call, error)
            else:
                handler(call)

        async def late(unsettled: Unsettled, call: wire.Call) -> None:
            await unsettled.settle(call.deadline)
            asyncio.get_running_loop().call_soon(_handle, handler, call)  # not before this task has given the call back

        return answer

    return {name: known(handler) for name, handler in handlers.items()}


def _handle(handler: wire.Handler, call: wire.Call) -> None:
    """Calls a handler from the event loop. If it fails, answers the call, as transports do."""
    try:
        handler(call)
    except Exception:
        answers.internal(call, "a call")


def streaming(serve: Callable[[wire.Call], Awaitable[None]]) -> wire.Handler:
    """Returns the handler of a streaming method. `serve` finishes the call, and is cancelled when the caller goes
    away."""
    return lambda call: run(call, lambda: serve(call))


def run(call: wire.Call, work: Callable[[], Awaitable[None]]) -> None:
    """Runs the work of one call. If it raises an error, the error becomes the answer."""

    async def guarded() -> None:
        try:
            await work()
        except wire.CallCancelled:
            pass  # the caller has gone
        except MeshError as error:
            answers.fail(call, error)
        except Exception:
            answers.internal(call, "a call")
        finally:
            call.on_cancel(None)

    task = _tasks.start(guarded(), f"serve {call.method!r}")

    def cancel() -> None:
        task.cancel()

    call.on_cancel(cancel)
