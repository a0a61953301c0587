"""Replies of model servers, passed on to the caller without the mesh's own headers, at once or message by message."""

from mesh.statuses import MeshError, Reason
from mesh.telemetry import logs
from mesh.wire import framing
from mesh.wire import headers as names
from mesh.wire.call import Call, Header
from mesh.wire.client import ReplyStream
from router.calls import routes
from router.state.pods import Pod

log = logs.get(__name__)

ENCODING = b"grpc-encoding"
"""The header that names the compression of frames."""


def returned(received: list[Header], pod: Pod) -> tuple[list[Header], bytes | None]:
    """Returns the headers for the client, and the header that says why the pod has run nothing (NOT_HERE or
    VERIFY_FIRST), if there is one. Also records the pod's load."""
    returns = routes.returns
    kept = []
    refusal = None
    for header in received:
        name = header[0]
        if returns[name]:
            kept.append(header)
        elif name == names.LOAD:
            try:
                pod.load = int(header[1])
            except ValueError:
                log.warning("a pod's load cannot be read", pod=pod.name, value=header[1][:50])
        elif name in (names.NOT_HERE, names.VERIFY_FIRST):
            refusal = name
    return kept, refusal


async def pump(call: Call, stream: ReplyStream, headers: list[Header]) -> tuple[int, int]:
    """Passes a reply on message by message; returns its code and the bytes of its messages. Raises Lost,
    CallCancelled."""
    size = 0
    call.start(headers)
    while (frame := await stream.read()) is not None:
        size += len(frame) - framing.PREFIX
        await call.write(frame)
    reply = await stream.result()
    returns = routes.returns
    call.finish(reply.code, reply.text, [header for header in reply.trailers if returns[header[0]]])
    return reply.code, size


def broken(why: str) -> MeshError:
    """Returns the error for a call whose reply breaks off."""
    return MeshError(Reason.LOST, f"the model server was lost in the middle of its reply: {why}")
