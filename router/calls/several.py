"""Calls with several model ids: one call for each id, and one reply that merges theirs.

As in ModelMesh, repeated `mm-model-id` or `mm-vmodel-id` headers (or their `-bin` forms) name the models. Each
model gets the same request. The encoded replies, in the order of the ids, are joined into one message, which protobuf
reads as their merge. Ids that are not registered are left out, unless the call says `mm-required: all`. Any other
failure fails the whole call.

Each of the calls passes through the dispatcher like a call from outside, so that aliases, cold starts, retries and
metrics work as for every call. Only a few of these calls are in flight at the same time.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator

from mesh.statuses import MeshError, Reason, too_large
from mesh.wire import framing, localcall, metadata
from mesh.wire.call import Call, Handler, Header
from mesh.wire.localcall import LocalAnswer
from router.calls import answers, replies
from router.calls.forwarder import Forwarder
from router.calls.routes import ID_HEADERS, SeveralIds

REQUIRED = b"mm-required"
"""The header that says, with the value `all`, that no model may be missing."""

_MAX_METADATA = 4096  # bytes of merged headers: gRPC clients refuse more than 8 KiB


class _OneFailed(Exception):
    """The failure of one of the calls, with which the whole call fails."""

    def __init__(self, answer: LocalAnswer) -> None:
        super().__init__(answer.text)
        self.answer = answer


class SeveralCalls:
    """The calls with several ids of one worker."""

    def __init__(self, forwarder: Forwarder, dispatch: Handler) -> None:
        self._forwarder = forwarder
        self._dispatch = dispatch

    async def carry(self, call: Call, frame: bytes, ids: SeveralIds) -> None:
        """Carries one call to its end. Never raises."""
        try:
            with self._forwarder.budget.hold() as hold, cancelled_with(call):
                self._answer(call, await self._each(call, frame, ids, hold.counts))
        except _OneFailed as failed:
            answer = failed.answer
            call.fail(answer.code, answer.text, answer.headers, answer.trailers)
        except MeshError as error:
            answers.fail(call, error)
        except asyncio.CancelledError:
            if not call.cancelled:
                answers.fail(call, answers.stopping())
        except Exception:
            answers.internal(call, "a call with several ids")

    async def _each(self, call: Call, frame: bytes, ids: SeveralIds, count: Callable[[int], None]) -> list[LocalAnswer]:
        """Makes the calls. Returns the replies in the order of the ids, without those of missing models. Raises
        _OneFailed if a call fails, and MeshError if a model is missing that must not be, if none is found, or if the
        replies are too large together."""
        needed = any(name == REQUIRED and value.strip().lower() == b"all" for name, value in call.headers)
        shared = [header for header in call.headers if header[0] not in ID_HEADERS]
        found: dict[int, LocalAnswer] = {}
        limit = self._forwarder.settings.max_message
        todo = iter(enumerate(ids.values))

        async def work() -> None:
            for number, value in todo:
                answer = await localcall.make(
                    call.method,
                    frame,
                    self._dispatch,
                    headers=[*shared, (ids.binary, metadata.encode_bin(value))],
                    deadline=call.deadline,
                    peer=call.peer,
                    encoding=call.encoding,
                )
                if answer.frame is not None and not answer.code:
                    found[number] = answer
                    size = sum(len(one.frame or b"") for one in found.values())
                    count(size)
                    if size > limit:
                        raise too_large(f"the reply of {len(ids.values)} models together", limit)
                elif not _is_missing(answer):
                    raise _OneFailed(answer)
                elif needed:
                    text = f"{answer.text}: {value[:200].decode(errors='replace')} (mm-required: all)"
                    raise MeshError(Reason.UNKNOWN_MODEL, text)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._forwarder.settings.multi_parallelism, len(ids.values))):
                    group.create_task(work())
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        if not found:
            raise MeshError(Reason.UNKNOWN_MODEL, "none of the requested models were found")
        return [found[number] for number in sorted(found)]

    def _answer(self, call: Call, found: list[LocalAnswer]) -> None:
        """Answers with the merge of the replies. Raises MeshError if they are too large together, or cannot be
        decompressed."""
        headers = _merged(answer.headers for answer in found)
        trailers = _merged(answer.trailers for answer in found)
        if len(found) == 1:
            frame = found[0].frame or b""
            if found[0].encoding:
                headers.append((replies.ENCODING, found[0].encoding))
        else:
            limit = self._forwarder.settings.max_message
            message = b"".join(framing.unpack(one.frame or b"", one.encoding, limit=limit) for one in found)
            if len(message) > limit:
                raise too_large(f"the reply of {len(found)} models together", limit)
            frame = framing.pack(message)
        call.reply(frame, headers, trailers)


@contextlib.contextmanager
def cancelled_with(call: Call) -> Iterator[None]:
    """Cancels the running task if the caller goes away during the block."""
    task = asyncio.current_task()
    assert task is not None

    def gone() -> None:
        task.cancel()

    call.on_cancel(gone)
    try:
        yield
    finally:
        call.on_cancel(None)


def _is_missing(answer: LocalAnswer) -> bool:
    """Returns whether the answer is the mesh's own error that no model, or no alias, has that id."""
    error = answers.our_own(answer)
    return error is not None and error.reason is Reason.UNKNOWN_MODEL


def _merged(parts: Iterable[list[Header]]) -> list[Header]:
    """Returns the headers of several replies, without duplicates, as far as they fit into one reply."""
    merged = dict.fromkeys(header for part in parts for header in part if header[0] != replies.ENCODING)
    room = _MAX_METADATA
    kept = []
    for name, value in merged:
        room -= len(name) + len(value) + 32  # as HTTP/2 counts them
        if room < 0:
            break
        kept.append((name, value))
    return kept
