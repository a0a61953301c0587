"""Load on a gRPC server: many calls in flight for throughput, one caller at a time for latency.

`h2load` (Debian's nghttp2-client) measures throughput, and takes little CPU from the servers. Without it, `grpc.aio`
clients in a separate process make the calls. They use more CPU than the servers that they measure, so all calls per
second are then too low; the output names the generator. CPU per call is right either way.
"""

import asyncio
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import grpc

from tests.bench.h2load import counted

METHOD = "/inference.GRPCInferenceService/ModelInfer"

Metadata = Sequence[tuple[str, str]]


def generator() -> str:
    """Returns the available load generator."""
    return "h2load" if shutil.which("h2load") else "grpc.aio"


async def throughput(
    address: str,
    message: bytes,
    *,
    calls: int,
    folder: Path,
    connections: int = 8,
    each: int = 8,
    trust: Path | None = None,
    metadata: Metadata = (),
) -> float:
    """Makes calls with `connections` x `each` in flight, and returns the calls per second. Uses TLS if `trust`, a PEM
    file, is given. A first call shows how large a good answer is. Raises RuntimeError if a call fails."""
    body = folder / "body.bin"
    body.write_bytes(b"\0" + len(message).to_bytes(4, "big") + message)
    if generator() == "h2load":
        scheme = "http" if trust is None else "https"
        argv = ["h2load", "-n", str(calls), "-c", str(connections), "-m", str(each), "-d", str(body)]
        argv += ["-H", "content-type: application/grpc", "-H", "te: trailers"]
        argv += [part for name, value in metadata for part in ("-H", f"{name}: {value}")]
        argv += [f"{scheme}://{address}{METHOD}"]
        answer = await _answer(address, message, trust, metadata)
        done = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise RuntimeError(f"h2load ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        made, rate = counted(done.stdout, answer)
        if made != calls:
            raise RuntimeError(f"h2load made {made} calls instead of {calls}: {done.stdout[-2000:]}")
        return rate
    started = time.perf_counter()
    argv = [sys.executable, "-m", "tests.bench.load", address, str(body), str(calls)]
    argv += [str(connections), str(each), str(trust or ""), json.dumps(list(metadata))]
    done = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return calls / (time.perf_counter() - started)


async def _answer(address: str, message: bytes, trust: Path | None, metadata: Metadata) -> int:
    """Makes one call, and returns the bytes of its answer's frame. Raises RuntimeError."""
    async with _channel(address, trust) as channel:
        try:
            return 5 + len(await channel.unary_unary(METHOD)(message, timeout=30, metadata=metadata))
        except grpc.aio.AioRpcError as error:
            raise RuntimeError(f"the first call failed: {error.code().name}: {error.details()}") from error


def _channel(address: str, trust: Path | None) -> grpc.aio.Channel:
    apart = [("grpc.use_local_subchannel_pool", 1)]
    if trust is None:
        return grpc.aio.insecure_channel(address, options=apart)
    return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(trust.read_bytes()), options=apart)


async def latency(address: str, message: bytes, *, calls: int, trust: Path | None = None) -> list[float]:
    """Returns the seconds of each call of one caller, who waits for each answer."""
    async with _channel(address, trust) as channel:
        call = channel.unary_unary(METHOD)
        times = []
        for _ in range(calls):
            started = time.perf_counter()
            await call(message, timeout=30)
            times.append(time.perf_counter() - started)
    return times


def percentile(values: list[float], share: float) -> float:
    """Returns the value below which that share of the values lies. A share of 0.5 gives the median."""
    return statistics.quantiles(values, n=1000, method="inclusive")[min(int(share * 1000), 999) - 1]


async def _client(
    address: str, body: Path, calls: int, connections: int, each: int, trust: Path | None, metadata: Metadata
) -> None:
    message = body.read_bytes()[5:]

    async def connection() -> None:
        async with _channel(address, trust) as channel:
            call = channel.unary_unary(METHOD)

            async def caller() -> None:
                for _ in range(calls // connections // each):
                    await call(message, timeout=30, metadata=metadata)

            await asyncio.gather(*(caller() for _ in range(each)))

    await asyncio.gather(*(connection() for _ in range(connections)))


if __name__ == "__main__":
    import uvloop

    address, body, calls, connections, each, trust, metadata = sys.argv[1:]
    path = Path(trust) if trust else None
    told = [(name, value) for name, value in json.loads(metadata)]
    uvloop.run(_client(address, Path(body), int(calls), int(connections), int(each), path, told))
