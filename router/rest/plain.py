"""Inference over REST on the plain HTTP server of `mesh.wire`: the hot path behind Envoy.

Small requests and their replies are converted in plain callbacks, without a task or timer. Requests that take longer
(large JSON, compressed bodies, bodies without JSON) run in tasks. Both use `inference`, as does the aiohttp
application, which serves the same paths without Envoy.
"""

import asyncio
from collections.abc import Awaitable, Coroutine, Sequence
from functools import partial
from typing import Any, NamedTuple

from mesh.access.principals import Principal
from mesh.access.verbs import Verb
from mesh.process.tasks import Tasks
from mesh.statuses import Code, MeshError, Reason
from mesh.telemetry import logs
from mesh.wire.budget import Budget, Hold
from mesh.wire.call import Header
from mesh.wire.localcall import LocalAnswer
from mesh.wire.plainrequest import Answer, Head, PlainRequest
from router.access.credentials import Unsettled
from router.access.guard import Guard
from router.calls import answers
from router.inference.models import Caller, CallFailed, Models
from router.rest import documents, errors
from router.rest.asked import HEADER_LENGTH, MODELS, Asked, ModelPath, PlainFields
from router.rest.inference import Inference
from router.rest.pieces import Body

log = logs.get(__name__)

_PEER = "rest"
_LENGTH = HEADER_LENGTH.lower().encode()


class _Note(NamedTuple):
    """A parsed request head, shared by all requests with an equal head."""

    asked: Asked
    target: ModelPath
    header_length: int | None
    plain: bool  # the body has JSON and is not compressed
    timeout: float  # seconds
    metadata: Sequence[Header]


class PlainInference:
    """The handler of POST requests below `/v2/models/`."""

    def __init__(self, models: Models, inference: Inference, budget: Budget, guard: Guard | None = None) -> None:
        """Makes the handler. With a `guard`, requests that the dispatcher would refuse are refused before their bodies
        are converted."""
        self._guard = guard
        self._models = models
        self._inference = inference
        self._budget = budget
        self._tasks = Tasks()

    async def close(self) -> None:
        """Ends the tasks of requests that are still in flight."""
        await self._tasks.close()

    def refusal(self, error: MeshError) -> Answer:
        """Returns the answer for an error that the router itself raised."""
        return errors.encoded(*errors.of_error(error))

    def opening(self, head: Head, begun: bytes, size: int) -> tuple[bytes, documents.Form] | None:
        """Returns the beginning of the message for a body of `size` bytes that begins with `begun`, and the form of the
        reply. Returns None if the rest of the body cannot be read behind that beginning."""
        try:
            note = _read(head)
        except MeshError:  # `serve` says why
            return None
        if not note.plain:
            return None
        head.note = note
        return self._inference.opening(note.target, begun, note.header_length, size)

    def serve(self, request: PlainRequest, principal: Principal | None = None) -> None:
        """Answers the request, immediately or later. `principal` is the caller, if already known."""
        try:
            guard = self._guard
            if guard is not None and principal is None:
                principal = guard.known(request.head.fields)
            note = request.head.note
            if not isinstance(note, _Note):
                note = request.head.note = _read(request.head)
            if guard is not None and principal is not None:
                guard.allow(principal, Verb.INFER, note.target.model)
            if isinstance(request.opened, documents.Form):
                self._begin(request, note, request.pieces[0], request.opened)
                return
            if note.plain:
                quick = self._inference.quick(note.target, Body(request.pieces), note.header_length)
                if quick is not None:
                    self._begin(request, note, *quick)
                    return
        except Unsettled as unsettled:
            self._run(request, self._introduced(request, unsettled))
            return
        except MeshError as error:
            self._fail(request, errors.of_error(error))
            return
        self._run(request, self._long(request, note))

    async def _introduced(self, request: PlainRequest, unsettled: Unsettled) -> None:
        principal = await unsettled.settle()
        request.on_cancel(None)
        self.serve(request, principal)

    def _begin(self, request: PlainRequest, note: _Note, frame: bytes, form: documents.Form) -> None:
        request.take()  # the frame has it all
        caller = Caller(asyncio.get_running_loop().time() + note.timeout, note.metadata, _PEER)
        call = self._models.begin(frame, caller, partial(self._answered, request, note.target.model, caller, form))
        if not request.phase:
            request.on_cancel(call.cancel)

    def _answered(
        self, request: PlainRequest, model: str, caller: Caller, form: documents.Form, answer: LocalAnswer
    ) -> None:
        try:
            if answer.code != Code.OK or answer.frame is None:
                self._fail(request, errors.of_answer(answer))
            elif (quick := self._inference.quick_answer(model, answer, form)) is not None:
                _send(request, *quick)
            else:
                self._run(request, self._conclude(request, model, caller, form, answer))
        except MeshError as error:
            self._fail(request, errors.of_error(error))
        except Exception:
            self._broken(request)

    def _run(self, request: PlainRequest, work: Coroutine[Any, Any, None]) -> None:
        """Answers in a task, which ends if the client goes away."""
        task = self._tasks.start(self._guarded(request, work), "inference over REST")
        request.on_cancel(task.cancel)

    async def _conclude(
        self, request: PlainRequest, model: str, caller: Caller, form: documents.Form, answer: LocalAnswer
    ) -> None:
        with self._budget.hold() as hold:
            request.hand_over(hold)
            await self._inference.conclude(model, answer, form, caller, hold, partial(_sent, request))

    async def _long(self, request: PlainRequest, note: _Note) -> None:
        with self._budget.hold() as hold:
            request.hand_over(hold)
            await self._inference.infer(note.asked, note.target, hold, partial(_body, request), partial(_sent, request))

    async def _guarded(self, request: PlainRequest, work: Awaitable[None]) -> None:
        try:
            await work
        except CallFailed as failed:
            self._fail(request, errors.of_answer(failed.answer))
        except MeshError as error:
            self._fail(request, errors.of_error(error))
        except Exception:
            self._broken(request)

    def _fail(self, request: PlainRequest, failure: tuple[int, dict[str, Any]]) -> None:
        status, fields, body = errors.encoded(*failure)
        request.answer(status, (body,), fields=fields)

    def _broken(self, request: PlainRequest) -> None:
        log.exception("a request failed in the router's own code", target=request.head.target)
        self._fail(request, errors.of_error(answers.internal_error()))


def _read(head: Head) -> _Note:
    raw_path = head.target.partition(b"?")[0]
    try:
        path = raw_path.decode()
    except UnicodeDecodeError as error:
        raise MeshError(Reason.BAD_REQUEST, "the path is not UTF-8") from error
    if head.method != b"POST" or not path.startswith(MODELS):
        raise MeshError(
            Reason.UNKNOWN_METHOD,
            f"{head.method.decode()} {path:.200} is not served here: POST to {MODELS}MODEL/infer",
        )
    asked = Asked(path, PlainFields(head.fields), _PEER)
    target = asked.inference()
    header_length = asked.header_length()
    plain = header_length != 0 and not asked.encoding()
    return _Note(asked, target, header_length, plain, asked.timeout(), asked.metadata())


async def _body(request: PlainRequest, _: Hold) -> Body:
    return Body(request.take())


async def _sent(
    request: PlainRequest, pieces: Sequence[bytes | memoryview], *, content_type: str, headers: dict[str, str]
) -> None:
    fields = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    request.answer(200, pieces, content_type=content_type.encode(), fields=fields)


def _send(request: PlainRequest, pieces: Sequence[bytes | memoryview], json_length: int | None) -> None:
    if json_length is None:
        request.answer(200, pieces)
    else:
        request.answer(200, pieces, content_type=b"application/octet-stream", fields=((_LENGTH, b"%d" % json_length),))
