"""Replies of model servers, passed to the caller in one piece or message by message, without the mesh's own headers."""

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
    """Returns the headers for the client. Also returns the header by which a pod refuses a call (NOT_HERE or
    VERIFY_FIRST), if the reply has it. Records the pod's load."""
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
    """Passes on a reply message by message. Returns its code and the total bytes of its messages, without framing.
    Raises Lost if the connection to the pod breaks, CallCancelled if the caller goes away."""
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
    """Returns the error for a call whose reply broke off, for the reason `why`."""
    text = f"the connection to the pod was lost in the middle of the reply: {why}"
    return MeshError(
        Reason.LOST, f"{text}. The model has begun to answer: send the call again only if it may run twice"
    )
