"""`python -m router.rest.converter FD MEMORY`: converts large JSON bodies to gRPC messages, and replies to JSON.

Python's JSON parsers hold the interpreter lock, so a body of 16 MB would stop all calls of a worker for a second, even
in a thread. A worker starts this process when it gets its first large body, and passes it one body after another
(`router.rest.papers`). `router.rest.conversions` is the worker's side.

The converter's memory is limited, because a few megabytes of JSON can describe gigabytes of Python objects. If the pod
runs out of memory, the kernel kills this process first.
"""

import contextlib
import os
import resource
import select
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from mesh.host import heap
from mesh.pb import inference_pb2 as pb
from mesh.statuses import MeshError, Reason
from mesh.wire import framing
from router.rest import documents, papers
from router.rest.pieces import Body, Contents

_NICE = 5  # calls that are small come first


def convert(head: dict[str, Any], body: memoryview) -> tuple[dict[str, Any], Contents]:
    """Carries out one conversion, and returns the head and the body of the result. Raises MeshError."""
    if head["to"] == "message":
        request, raws, form = documents.decode_parts(
            head["model"], head["version"], Body([body]), head["header_length"]
        )
        return {"form": form.dump()}, documents.frame_parts(request.SerializeToString(), raws)
    try:
        rest, outputs = _split(head, body)
        response = pb.ModelInferResponse.FromString(rest)
    except framing.FrameError as error:
        text = f"the model server's answer: {error.text}"
        raise MeshError(error.reason, text, details=error.details) from error
    except (DecodeError, ValueError) as error:
        raise MeshError(
            Reason.INTERNAL, f"the model server's answer cannot be read ({error}): check the model server"
        ) from error
    parts, json_length = documents.encode_parts(response, documents.Form.load(head["form"]), outputs)
    return {"json_length": json_length}, parts


def _split(head: dict[str, Any], frame: memoryview) -> tuple[bytes, list[memoryview]]:
    """Splits a framed reply into the message without its raw contents, and the raw contents. Raises FrameError,
    ValueError."""
    limit = head["limit"]
    if not framing.is_frame(frame, limit) or framing.is_compressed(frame):
        frame = memoryview(framing.pack(framing.unpack(bytes(frame), head["encoding"].encode("latin-1"), limit=limit)))
    return documents.split(frame)


def serve(connection: socket.socket, memory: int) -> None:
    """Converts bodies as they arrive, until the worker closes its end."""
    requests = papers.Requests(connection)
    arrival = select.poll()  # select() fails above descriptor 1023, and the worker may have given this one its number
    arrival.register(connection, select.POLLIN)
    untrimmed = False
    while True:
        # The next body often follows: what it needs would only be taken from the system again.
        if untrimmed and not arrival.poll(papers.IDLE * 1000):
            requests.trim()
            heap.trim()
            untrimmed = False
        try:
            paper = requests.receive()
            untrimmed = True
            head, body = _converted(paper, memory)
            requests.reply(head, body)
        except papers.Gone:
            return
        del paper, body  # the file of a request is used again once nothing refers to it


def _converted(paper: papers.Paper, memory: int) -> tuple[dict[str, Any], Contents]:
    try:
        return convert(paper.head, paper.body)
    except MeshError as error:
        failed = {
            "reason": error.reason.name,
            "text": error.text[:4000].encode("utf-8", "replace").decode(),
            "retry_after": error.retry_after,
            "details": error.details,
        }
        return {"failed": failed}, []
    except MemoryError:
        text = f"the JSON takes more than {memory} bytes to convert: send large tensors as binary data"
        return {"failed": {"reason": Reason.TOO_LARGE.name, "text": text, "retry_after": None, "details": {}}}, []


def main() -> None:
    """Limits the process's memory, then converts bodies until the worker closes its end."""
    descriptor, memory = int(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the router, which ends its workers
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):
        os.nice(_NICE)
        Path("/proc/self/oom_score_adj").write_text("1000")
    heap.keep()
    connection = socket.socket(fileno=descriptor)
    connection.setblocking(True)
    serve(connection, memory)


if __name__ == "__main__":
    main()
