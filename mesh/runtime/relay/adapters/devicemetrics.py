"""The memory of a server's GPUs, read from the metrics that the server publishes for Prometheus, as Triton does.

The SPI says nothing about devices, but the relay passes on what a control adds in trailers (`reported`). So this module
wraps the control of a server. A model takes the memory by which the metrics grow during its load. Triton reads its GPUs
at an interval, so each load waits for fresh numbers, and loads take turns.

Triton's metrics count the memory of all processes on a GPU, as far as the driver knows it.
"""

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import grpc

from mesh.options.values import parse_address
from mesh.pb import modelruntime_pb2 as pb
from mesh.runtime.relay import reported
from mesh.runtime.relay.adapters import sizes
from mesh.runtime.relay.control import Control, Trailers
from mesh.telemetry import logs

log = logs.get(__name__)

_TOTAL, _USED = b"nv_gpu_memory_total_bytes", b"nv_gpu_memory_used_bytes"
_LINE = re.compile(rb"^(\w+)(?:\{[^}\n]*\})? +([0-9.eE+-]+)", re.MULTILINE)
_LONGEST = 4 << 20  # bytes of an answer
_TIMEOUT = 3.0  # seconds for an answer
_FRESH = 2.5  # seconds after a load until the metrics include it: Triton reads its GPUs every 2 s


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """The memory of all devices of a server together, in bytes."""

    total: int
    used: int


def parse(text: bytes) -> DeviceMemory | None:
    """Returns the memory that metrics in Prometheus' text format state for all devices together, or None if they name
    no device."""
    sums = {_TOTAL: 0.0, _USED: 0.0}
    for name, value in _LINE.findall(text):
        if name in sums:
            with contextlib.suppress(ValueError):
                sums[name] += float(value)
    return DeviceMemory(int(sums[_TOTAL]), int(sums[_USED])) if sums[_TOTAL] > 0 else None


async def read(address: str) -> DeviceMemory | None:
    """Reads the metrics at an address, `HOST:PORT`. Returns None if they name no device. Raises OSError if they cannot
    be read."""
    host, port = parse_address(address)
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(_TIMEOUT):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(f"GET /metrics HTTP/1.0\r\nHost: {address}\r\n\r\n".encode())
            answer = b""
            while len(answer) < _LONGEST and (part := await reader.read(1 << 16)):
                answer += part
    except TimeoutError as error:
        raise OSError(f"{address} did not send its metrics within {_TIMEOUT:g} s") from error
    finally:
        if writer is not None:
            writer.transport.abort()
    head, _, body = answer.partition(b"\r\n\r\n")
    first = head.partition(b"\r\n")[0]
    if b" 200" not in first:
        what = f"answered {first.decode(errors='replace')!r}" if first else "closed the connection"
        raise OSError(f"{address} {what} instead of sending metrics")
    return parse(body)


def measured(managed: Callable[[grpc.aio.Channel], Control], address: str) -> Callable[[grpc.aio.Channel], Control]:
    """Returns a maker of the same control, which also reports the memory of the server's GPUs. `address` is that of the
    server's metrics, HOST:PORT."""
    return lambda channel: OnDevice(managed(channel), address)


class OnDevice:
    """The control of a server, with the memory of its devices."""

    def __init__(
        self,
        control: Control,
        address: str,
        *,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Wraps the control of a server whose metrics are at `address`, HOST:PORT. `pause` waits for a number of
        seconds."""
        self.former = control.former
        self.takes_versions = control.takes_versions
        self._control = control
        self._address = address
        self._pause = pause
        self._turn = asyncio.Lock()
        self._silent = False  # no memory is reported, and a warning has said why

    def resume(self, *, former: bool) -> None:
        """Continues with a server that reported to a former relay that it is ready."""
        self._control.resume(former=former)
        self.former = self._control.former

    def name(self, model_id: str) -> str:
        """Returns the name by which the server knows a model."""
        return self._control.name(model_id)

    async def status(self, *, timeout: float) -> tuple[pb.RuntimeStatusResponse, Trailers]:
        """Returns the server's status, with the memory of its devices once it is READY."""
        status, told = await self._control.status(timeout=timeout)
        self.former = self._control.former
        if status.status != pb.RuntimeStatusResponse.READY:
            return status, told
        memory = await self._memory()
        if memory is None:
            return status, told
        status.maxLoadingConcurrency = 1
        return status, (*told, (reported.TOTAL, str(memory.total)), (reported.USED, str(memory.used)))

    async def load(
        self, request: pb.LoadModelRequest, *, timeout: float | None
    ) -> tuple[pb.LoadModelResponse, Trailers]:
        """Loads a model, and reports what it takes: on the device the growth of the memory in use, or the size of the
        model's files if nothing has grown; on the host what the files suggest. Adds nothing to the control's answer if
        the metrics could not be read before the load."""
        async with self._turn:
            before = await self._memory()
            answer, told = await self._control.load(request, timeout=timeout)
            if before is None:
                return answer, told
            await self._pause(_FRESH)
            after = await self._memory() or before
        files = sizes.of_files(request.modelKey)
        host, device = int(files * sizes.FACTOR) or sizes.UNKNOWN, max(0, after.used - before.used) or files
        sized = (("mesh-host-bytes", str(host)), ("mesh-device-bytes", str(device)))
        return answer, (*told, *sized, (reported.USED, str(after.used)))

    async def unload(self, request: pb.UnloadModelRequest, *, timeout: float | None) -> None:
        """Unloads a model."""
        await self._control.unload(request, timeout=timeout)

    async def size(
        self, request: pb.ModelSizeRequest, *, timeout: float | None
    ) -> tuple[pb.ModelSizeResponse, Trailers]:
        """Returns the size that the control states, and in the trailers the memory in use on the server's devices."""
        answer, told = await self._control.size(request, timeout=timeout)
        memory = await self._memory()
        return answer, told if memory is None else (*told, (reported.USED, str(memory.used)))

    async def predict(self, request: pb.PredictModelSizeRequest, *, timeout: float) -> pb.PredictModelSizeResponse:
        """Returns the size that the control predicts."""
        return await self._control.predict(request, timeout=timeout)

    async def _memory(self) -> DeviceMemory | None:
        try:
            memory = await read(self._address)
        except (OSError, ValueError) as error:
            memory, why = None, str(error)
        else:
            why = "its metrics name no device"
        if memory is None and not self._silent:
            log.warning("the memory of the model server's devices is unknown: check --server-metrics", because=why)
        self._silent = memory is None
        return memory
