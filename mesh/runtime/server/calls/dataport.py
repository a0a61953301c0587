"""The data port: V2 inference for the copies in this pod.

If the model is known to be quick (`pace`), a call is parsed, run and answered in the event loop, without a task, a
thread or an await, so that a call of a small model costs little more than the model itself. Longer calls are passed to
`runs`, and `watch` stops runs in the loop that were wrongly expected to be quick.

Every call is answered: bad input with INVALID_ARGUMENT and a text, and a call for a copy that is not in this pod with
*not here*. Once the agent's permission has expired, every call is answered *not here*. While the agent cannot reach
etcd, a call is served only if its router has verified the record or, for some time, if its router cannot reach etcd
either (`placement.fence`).
"""

import asyncio
import importlib.metadata
import time
from collections.abc import Callable
from functools import partial
from time import CLOCK_BOOTTIME, clock_gettime_ns
from typing import Any

from google.protobuf.message import DecodeError

from mesh.pb import inference_pb2
from mesh.runtime.port import answers
from mesh.runtime.port.copies import Copies
from mesh.runtime.port.permission import named, permitted
from mesh.runtime.server.calls.runs import Run, Runs
from mesh.runtime.server.calls.watch import CallWatch
from mesh.runtime.server.copies import ServedCopy
from mesh.runtime.server.v2 import alignment, intake, requests
from mesh.runtime.server.v2.shortcuts import Asked
from mesh.runtime.server.v2.tensors import bad, brief
from mesh.runtime.sharedmemory.board import MODE_BITS, Board
from mesh.statuses import MeshError, Reason
from mesh.telemetry import logs
from mesh.v2 import PREFIX
from mesh.wire import framing, headers
from mesh.wire.call import Call, CallCancelled
from placement.fence import Mode

log = logs.get(__name__)

VERSION = importlib.metadata.version("mesh-serving")

_SMALL = requests.SMALL  # bytes of contents

# Indexes into board.METHODS.
_INFER, _METADATA, _READY, _OTHER = range(4)


class DataPort:
    """The handler of the data port's calls. Used only in the event loop's thread."""

    def __init__(
        self, copies: Copies[ServedCopy], board: Board, runs: Runs, watch: CallWatch, *, max_message: int
    ) -> None:
        self._copies = copies
        self._observe = board.observe
        self._inline = board.at_work.inline
        self._board = board
        self._runs = runs
        self._clock = runs.clock
        self._watch = watch
        self._max_message = max_message
        self._loop = asyncio.get_running_loop()
        self._reading: set[asyncio.Task[None]] = set()
        self._methods: dict[bytes, Callable[[Call, bytes], None]] = {
            PREFIX + b"ModelInfer": self._infer,
            PREFIX + b"ModelMetadata": self._metadata,
            PREFIX + b"ModelReady": self._ready,
        }
        constants = {
            b"ServerLive": inference_pb2.ServerLiveResponse(live=True),
            b"ServerReady": inference_pb2.ServerReadyResponse(ready=True),
            b"ServerMetadata": inference_pb2.ServerMetadataResponse(name="mesh-onnx", version=VERSION),
        }
        for name, message in constants.items():
            self._methods[PREFIX + name] = _constant(framing.pack(message.SerializeToString()))

    def handle(self, call: Call) -> None:
        """Begins to answer one call. Never raises."""
        method = self._methods.get(call.method)
        if method is None:
            name = brief(call.method.decode(errors="replace"))
            answers.fail(
                call,
                MeshError(Reason.UNKNOWN_METHOD, f"unknown method {name}: the model server serves V2 inference only"),
            )
            return
        frame = call.frame
        if frame is None:
            task = self._loop.create_task(self._read(call, method))
            self._reading.add(task)
            task.add_done_callback(self._reading.discard)
            return
        try:
            method(call, frame)
        except MeshError as error:
            answers.fail(call, error)
        except Exception:
            log.exception("call failed in the model server's own code", method=call.method)
            answers.fail(call, MeshError(Reason.INTERNAL, "internal error in the model server; its log has the cause"))

    async def close(self) -> None:
        """Ends the tasks that wait for further parts of a request."""
        for task in self._reading:
            task.cancel()
        await asyncio.gather(*self._reading, return_exceptions=True)

    async def _read(self, call: Call, method: Callable[[Call, bytes], None]) -> None:
        """Reads a request that arrives as a stream. V2's methods accept one message."""
        try:
            frame = await call.read()
            if frame is None or await call.read() is not None:
                answers.fail(
                    call, bad(f"{call.method.decode()} takes exactly one message: send one, and end the request")
                )
                return
            method(call, frame)
        except CallCancelled:
            return
        except MeshError as error:
            answers.fail(call, error)
        except Exception:
            log.exception("call failed in the model server's own code", method=call.method)
            answers.fail(call, MeshError(Reason.INTERNAL, "internal error in the model server; its log has the cause"))

    # -- what a call is meant for

    def _message(self, call: Call, frame: bytes) -> bytes:
        try:
            return framing.unpack(frame, call.encoding, limit=min(requests.SMALL, self._max_message))
        except framing.FrameError as error:
            if error.reason is Reason.TOO_LARGE:
                raise bad(
                    f"a request for a model's status or metadata may have at most {requests.SMALL} bytes"
                ) from error
            raise

    def _copy(
        self, call: Call, model_id: bytes, token: bytes | None, method: int, started_ns: int
    ) -> ServedCopy | None:
        """Returns the copy that the call is meant for, or None if the call was answered without one."""
        if not model_id:
            raise bad("the call names no model: set model_name, or mm-model-id in the metadata")
        copy = self._copies.find(model_id, token)
        if copy is None:
            answers.not_here(call, self._board, method, started_ns)
            return None
        fence = self._board.fence
        # The mode is in the lowest bits, where a few nanoseconds make no difference.
        if fence & MODE_BITS == Mode.PROVEN and fence > clock_gettime_ns(CLOCK_BOOTTIME):
            return copy
        return copy if permitted(call, self._board, fence, method, started_ns) else None

    # -- the methods

    def _infer(self, call: Call, frame: bytes) -> None:
        started_ns = time.monotonic_ns()
        model_id, token, named_as = named(call)
        copy = asked = request = later = None
        if model_id is None:  # the message has the model's name
            request = requests.light(frame, call.encoding, limit=self._max_message)
            model_id = requests.name(request)
        copy = self._copy(call, model_id, token, _INFER, started_ns)
        if copy is None:
            return
        try:
            if request is None:
                asked = copy.shortcuts.find(frame)
            if asked is None:
                if request is None:
                    request = requests.light(frame, call.encoding, limit=self._max_message)
                asked, later = _asked(copy, request, frame)
                if later is not None and named_as is not None:
                    later = partial(_named_later, later, named_as)
            deadline = call.deadline
            if deadline is not None and deadline <= self._loop.time():
                raise MeshError(Reason.DEADLINE, "the deadline had passed when the call reached the pod")
            if asked is None:
                inline, held = False, len(frame)
            else:
                feed, size, answer, raw, request_id = asked
                if named_as is not None:
                    answer = answer.named(named_as)
                inline, held = copy.pace.inline[size.bit_length()], size
            if not inline and (refusal := self._runs.refuse(held)) is not None:
                raise refusal
        except MeshError as error:
            self._refused(call, copy, error, started_ns)
            return
        row = copy.row
        if inline:
            watch = self._watch
            row.begin(started_ns, runs=1)
            self._inline(frame)
            cpu_ns = self._clock() if size > _SMALL else 0
            watch.since_ns = started_ns
            if watch.asleep:
                watch.wake()
            try:
                arrays = copy.session.run(answer.names, feed, watch.options)
                watch.since_ns = 0
                if cpu_ns:  # outputs never share memory with the input, which the next call overwrites
                    pieces = answer.pieces(arrays, request_id, raw=raw)
                else:
                    reply = answer.encode(arrays, request_id, raw=raw)
            except Exception as error:
                watch.since_ns = 0
                if not watch.stopped():
                    self._failed(call, copy, self._runs.error(copy, error), started_ns)
                    return
                copy.pace.too_long(size)
                row.ran(time.monotonic_ns() - started_ns)
            else:
                if cpu_ns:
                    call.reply_in_pieces(pieces, answers.load(self._runs.count))
                else:
                    call.reply(reply, answers.load(self._runs.count))
                ended_ns = time.monotonic_ns()
                took_ns = ended_ns - started_ns  # everything here kept the loop busy, not only the model
                # Time on the clock is also lost to other processes. On two busy cores, that moved 30 % of the calls
                # with 100 KB into threads, for twice the cost. Small calls are too short for that to matter.
                copy.pace.note(size, self._clock() - cpu_ns if cpu_ns else took_ns)
                row.end(ended_ns, runs=1, busy_ns=took_ns, failed=False)
                self._observe(_INFER, 0, took_ns)
                return
        else:
            row.begin(started_ns)
        if asked is not None:
            asked = (alignment.own(feed), size, answer, raw, request_id)
        self._runs.submit(Run(call, copy, sent=frame, held=held, asked=asked, read=later, started_ns=started_ns))

    def _refused(self, call: Call, copy: ServedCopy, error: MeshError, started_ns: int) -> None:
        """Answers a call that has not reached the model. The call still counts as a use, because a caller with a bad
        request tries again."""
        copy.row.begin(started_ns)
        answers.fail(call, error)
        now = time.monotonic_ns()
        copy.row.end(now, runs=0, busy_ns=0, failed=True)
        self._observe(_INFER, int(error.reason.code), now - started_ns)

    def _failed(self, call: Call, copy: ServedCopy, error: MeshError, started_ns: int) -> None:
        """Answers a call whose model failed in the loop."""
        answers.fail(call, error)
        now = time.monotonic_ns()
        copy.row.end(now, runs=1, busy_ns=now - started_ns, failed=True)
        self._observe(_INFER, int(error.reason.code), now - started_ns)

    def _metadata(self, call: Call, frame: bytes) -> None:
        copy = self._asked(call, frame, inference_pb2.ModelMetadataRequest, _METADATA)
        if copy is not None:
            named_as, listed = call.header(headers.AS), call.header(headers.VERSIONS)
            alias = "" if named_as is None else headers.read_as(named_as)[0]
            metadata = copy.metadata(alias, [] if listed is None else headers.read_listed(listed))
            call.reply(framing.pack(metadata), answers.load(self._runs.count))

    def _ready(self, call: Call, frame: bytes) -> None:
        copy = self._asked(call, frame, inference_pb2.ModelReadyRequest, _READY)
        if copy is not None:
            call.reply(_IS_READY, answers.load(self._runs.count))

    def _asked(self, call: Call, frame: bytes, kind: Any, method: int) -> ServedCopy | None:
        """Returns the copy that a status or metadata request is about, or None if the request was answered without one.
        Such requests do not count as uses."""
        started_ns = time.monotonic_ns()
        model_id, token, _ = named(call)
        if model_id is None:
            try:
                model_id = kind.FromString(self._message(call, frame)).name.encode()
            except DecodeError as error:
                raise bad(
                    f"the request cannot be decoded: send a message of type {kind.DESCRIPTOR.full_name}"
                ) from error
        copy = self._copy(call, model_id, token, method, started_ns)
        if copy is not None:
            self._observe(method, 0, time.monotonic_ns() - started_ns)
        return copy


def _asked(
    copy: ServedCopy, request: requests.Request | requests.Heavy, frame: bytes
) -> tuple[Asked | None, Callable[[], Asked] | None]:
    """Returns the input and the wanted outputs of a request, with the input in `alignment.LOOP`. If reading the request
    would delay the event loop, returns a function instead, which reads the request in a thread. Raises `MeshError`."""
    if isinstance(request, requests.Heavy):
        heavy = request
        return None, lambda: _read(copy, requests.read(heavy), put=alignment.put)
    if len(frame) > requests.LARGE or (len(frame) > requests.SMALL and copy.session.intake.texts):
        light = request
        return None, lambda: _read(copy, light, put=alignment.put)
    alignment.LOOP.begin()
    asked = _read(copy, request, put=alignment.LOOP.put)
    if len(request[1]) == 1:
        ((name, array),) = asked[0].items()
        copy.shortcuts.learn(frame, copy.session.inputs[name], array.shape, asked[2])
    return asked, None


def _read(copy: ServedCopy, request: requests.Request, *, put: intake.Place) -> Asked:
    """Reads the input and the wanted outputs from a request. Raises `MeshError`."""
    model = copy.session
    message, raws, contents = request
    inputs = message.inputs
    feed, size = model.intake.decode(inputs, raws, contents, put=put)
    answer = copy.answer
    if message.outputs:
        answer = copy.answer_of(intake.requested(message.outputs, model.outputs, model.unsupported))
    return feed, size, answer, bool(raws) or not inputs, message.id.encode()


def _named_later(read: Callable[[], Asked], named_as: bytes) -> Asked:
    """Reads a request whose reply must have other names than the model's id. Raises `MeshError`."""
    feed, size, answer, raw, request_id = read()
    return feed, size, answer.named(named_as), raw, request_id


_IS_READY = framing.pack(inference_pb2.ModelReadyResponse(ready=True).SerializeToString())


def _constant(frame: bytes) -> Callable[[Call, bytes], None]:
    def answer(call: Call, _: bytes) -> None:
        call.reply(frame)

    return answer
