"""The memory of a server's GPUs, read from metrics in Triton's form that a small server of the test publishes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from mesh.pb import modelruntime_pb2 as pb
from mesh.runtime.relay.adapters import devicemetrics
from mesh.runtime.relay.adapters.devicemetrics import DeviceMemory, OnDevice

READY, STARTING = pb.RuntimeStatusResponse.READY, pb.RuntimeStatusResponse.STARTING

METRICS = """
# HELP nv_gpu_memory_total_bytes GPU total memory, in bytes
# TYPE nv_gpu_memory_total_bytes gauge
nv_gpu_memory_total_bytes{{gpu_uuid="GPU-1"}} 85899345920.000000
nv_gpu_memory_total_bytes{{gpu_uuid="GPU-2"}} 85899345920
# TYPE nv_gpu_memory_used_bytes gauge
nv_gpu_memory_used_bytes{{gpu_uuid="GPU-1"}} {first}
nv_gpu_memory_used_bytes{{gpu_uuid="GPU-2"}} 1e6
nv_inference_request_success{{model="nv_gpu_memory_used_bytes 5",version="1"}} 3
"""


class Server:
    """The metrics of a server, and a control that loads nothing."""

    def __init__(self) -> None:
        self.answer = b""
        self.address = ""
        self.status_is = READY
        self.load_takes = 0
        self.used = 1_000_000
        self.at_once = self.most_at_once = 0
        self.pauses: list[float] = []
        self.former = False
        self.takes_versions = False

    def show(self) -> None:
        """Publishes the present memory, as Triton does at each interval."""
        text = METRICS.format(first=self.used)
        self.answer = f"HTTP/1.1 200 OK\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode()

    async def respond(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(self.answer)
        await writer.drain()
        writer.close()

    async def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        await asyncio.sleep(0)
        self.show()

    async def status(self, *, timeout: float) -> Any:
        return pb.RuntimeStatusResponse(status=self.status_is, maxLoadingConcurrency=4), (("own", "1"),)

    async def load(self, request: pb.LoadModelRequest, *, timeout: float | None) -> Any:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(0)
        self.used += self.load_takes
        self.at_once -= 1
        return pb.LoadModelResponse(), ()

    async def size(self, request: pb.ModelSizeRequest, *, timeout: float | None) -> Any:
        return pb.ModelSizeResponse(sizeInBytes=7), ()


@asynccontextmanager
async def served() -> AsyncIterator[tuple[Server, OnDevice]]:
    """Serves metrics on a port, and yields a control that reads them."""
    server = Server()
    server.show()
    listener = await asyncio.start_server(server.respond, "127.0.0.1", 0)
    server.address = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    async with listener:
        yield server, OnDevice(server, server.address, pause=server.pause)  # type: ignore[arg-type]


def test_metrics_of_all_gpus_are_summed() -> None:
    """Numbers within labels are ignored. Without a GPU, or with a figure that is not a number, there is no result."""
    assert devicemetrics.parse(METRICS.format(first="2000000.0").encode()) == DeviceMemory(2 * 85899345920, 3_000_000)
    assert devicemetrics.parse(b"nv_cpu_utilization 0.5\n") is None
    assert devicemetrics.parse(b"nv_gpu_memory_total_bytes ...\nnv_gpu_memory_used_bytes 5\n") is None


async def test_a_server_that_is_ready_reports_its_gpus() -> None:
    """A server with GPUs allows one load at a time."""
    async with served() as (server, control):
        server.status_is = STARTING
        status, told = await control.status(timeout=1.0)
        assert (status.maxLoadingConcurrency, told) == (4, (("own", "1"),))
        server.status_is = READY
        status, told = await control.status(timeout=1.0)
        assert status.maxLoadingConcurrency == 1
        assert dict(told) == {"own": "1", "mesh-device-total": str(2 * 85899345920), "mesh-device-used": "2000000"}
        answer, told = await control.size(pb.ModelSizeRequest(modelId="m"), timeout=1.0)
        assert (answer.sizeInBytes, dict(told)) == (7, {"mesh-device-used": "2000000"})


async def test_a_model_takes_what_the_gpu_has_grown_by() -> None:
    """The size of a model is the growth of the GPU's memory, read once the server has had time to renew its metrics.
    Without growth, the size of the model's files counts."""
    request = pb.LoadModelRequest(modelId="m", modelKey='{"disk_size_bytes": 4000}')
    async with served() as (server, control):
        server.load_takes = 5_000_000
        _, told = await control.load(request, timeout=1.0)
        assert dict(told) == {
            "mesh-host-bytes": "5000",
            "mesh-device-bytes": "5000000",
            "mesh-device-used": "7000000",
        }
        assert server.pauses[0] > 2.0, "Triton's own interval"
        server.load_takes = 0
        _, told = await control.load(request, timeout=1.0)
        assert dict(told)["mesh-device-bytes"] == "4000"


async def test_loads_on_a_gpu_take_turns() -> None:
    """If two loads ran at once, no growth of the GPU's memory could be attributed to one model."""
    async with served() as (server, control):
        server.load_takes = 1_000_000
        loads = (control.load(pb.LoadModelRequest(modelId=f"m{number}"), timeout=1.0) for number in range(4))
        told = await asyncio.gather(*loads)
        assert [dict(trailers)["mesh-device-bytes"] for _, trailers in told] == ["1000000"] * 4
        assert server.most_at_once == 1


@pytest.mark.parametrize("answer", [b"HTTP/1.1 404 Not Found\r\n\r\n", b"", b"HTTP/1.1 200 OK\r\n\r\nno_gpu 1\n"])
async def test_without_metrics_of_a_gpu_nothing_is_reported(answer: bytes) -> None:
    """A server whose metrics cannot be read, or that has no GPU, is treated like a server without metrics."""
    async with served() as (server, control):
        server.answer = answer
        status, told = await control.status(timeout=1.0)
        assert (status.maxLoadingConcurrency, told) == (4, (("own", "1"),))
        assert await control.load(pb.LoadModelRequest(modelId="m"), timeout=1.0) == (pb.LoadModelResponse(), ())
        assert server.pauses == []
    assert (await control.status(timeout=1.0))[1] == (("own", "1"),), "nothing listens any more"


async def test_an_answer_without_end_is_not_read_to_the_end() -> None:
    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        try:
            while True:
                writer.write(b"x" * 65536)
                await writer.drain()
        except OSError:
            pass

    async with await asyncio.start_server(endless, "127.0.0.1", 0) as listener:
        assert await devicemetrics.read(f"127.0.0.1:{listener.sockets[0].getsockname()[1]}") is None
