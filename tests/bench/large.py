"""Large tensors through the whole chain, over gRPC and binary REST, beside a plain server.

Each call sends one FP32 tensor and gets it back, so bytes move both ways. The callers are what users have, grpcio and a
socket, each with a connection of its own and one call at a time. (h2load is no measure here: it needs 40 ms to upload
4 MB, more than any of the servers.) A door is data (`Door`), so that other servers can be measured by the same code.
The calling process, which prints the seconds of each call, is

    python -m tests.bench.large CALLERS SECONDS < DOOR

Memory is the sum of each process's own peak during the load, less what all of them took before the first large call. So
it includes what they keep afterwards, and peaks that did not coincide.
"""

import asyncio
import http.client
import json
import pickle
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
from rich.console import Console
from rich.table import Table

from mesh.process import free_port
from tests.bench.load import METHOD
from tests.bench.processes import Meter, peak_bytes, reset_peak, resident_bytes
from tests.support import models
from tests.support.localmesh import Client, LocalMesh, Program, children, infer_request
from tests.support.waiting import until

ROUNDS = 3
SECONDS = 0.7  # of a round
CALLERS = (1, 8)


SIZES = {"100 KB": 25_000, "4 MB": 1_000_000}
"""Numbers of elements of 4 bytes."""


@dataclass(frozen=True, slots=True)
class Door:
    """A way into a server, and the request that is sent there again and again."""

    address: str  # host:port
    body: bytes  # a message for gRPC, otherwise the body to post
    answer: int  # the least size of the answer, in bytes
    path: str = ""  # the path of REST; empty for gRPC
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def grpc(cls, address: str, model: str, tensor: np.ndarray) -> "Door":
        """Returns the gRPC door of a server."""
        return cls(address, infer_request(model, x=tensor).SerializeToString(), tensor.nbytes)

    @classmethod
    def rest(cls, address: str, model: str, tensor: np.ndarray) -> "Door":
        """Returns the REST door of a server: binary tensors both ways."""
        described = {"name": "x", "shape": tensor.shape, "datatype": "FP32"}
        head = json.dumps(
            {
                "inputs": [{**described, "parameters": {"binary_data_size": tensor.nbytes}}],
                "parameters": {"binary_data_output": True},
            }
        ).encode()
        headers = {"content-type": "application/octet-stream", "inference-header-content-length": f"{len(head)}"}
        return cls(address, head + tensor.tobytes(), tensor.nbytes, f"/v2/models/{model}/infer", headers)


@dataclass(frozen=True, slots=True)
class Load:
    """The outcome of a load on one door."""

    rate: float  # calls a second
    p50: float  # seconds
    calls: int


async def load(door: Door, *, callers: int, seconds: float) -> Load:
    """Calls for so long, each caller one call at a time. Raises RuntimeError if a call fails."""
    argv = [sys.executable, "-m", "tests.bench.large", str(callers), str(seconds)]
    done = await asyncio.to_thread(subprocess.run, argv, input=pickle.dumps(door), capture_output=True, timeout=300)
    if done.returncode:
        raise RuntimeError(done.stderr.decode()[-3000:])
    times = [float(line) for line in done.stdout.split()]
    return Load(callers / statistics.mean(times), statistics.median(times), len(times) + callers)


def _caller(door: Door) -> Callable[[], int]:
    """Connects; returns a function that calls once and returns the answer's size in bytes."""
    if not door.path:
        unbounded = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        infer = grpc.insecure_channel(door.address, options=unbounded).unary_unary(METHOD)
        return lambda: len(infer(door.body, timeout=60))
    connection = http.client.HTTPConnection(door.address, timeout=60)
    answer = bytearray(door.answer + 65536)

    def post() -> int:
        connection.request("POST", door.path, door.body, dict(door.headers))
        with connection.getresponse() as response:
            view = memoryview(answer)
            while count := response.readinto(view):
                view = view[count:]
            return len(answer) - len(view) if response.status == http.HTTPStatus.OK else 0

    return post


def _call(door: Door, callers: int, seconds: float) -> None:
    """Calls in threads, and prints what each call took; the first call of each caller does not count."""
    ready = threading.Barrier(callers)

    def caller() -> list[float]:
        call = _caller(door)
        call()
        ready.wait()
        times: list[float] = []
        began = now = time.perf_counter()
        while now - began < seconds:
            if (size := call()) < door.answer:
                raise RuntimeError(f"an answer of {size} bytes, not {door.answer}")
            times.append(-now + (now := time.perf_counter()))
        return times

    with ThreadPoolExecutor(callers) as pool:
        for done in [pool.submit(caller) for _ in range(callers)]:
            print(*done.result())


class Memory:
    """The memory that calls in flight take in some processes."""

    def __init__(self, pids: Sequence[int]) -> None:
        """Notes what the processes take now, before any large call."""
        self._pids = tuple(pids)
        self._idle = sum(map(resident_bytes, self._pids))

    def begin(self) -> None:
        """Begins a round."""
        for pid in self._pids:
            reset_peak(pid)

    def taken(self) -> int:
        """Returns the bytes taken since the round began, at most."""
        return sum(map(peak_bytes, self._pids)) - self._idle


def family(pid: int) -> list[int]:
    """Returns a process and all processes below it."""
    return [pid, *(each for child in children(pid) for each in family(child))]


async def run(mesh: LocalMesh, folder: Path, console: Console) -> None:
    """Measures the doors in turn, several rounds, and prints medians, of ratios too."""
    content = models.identity(shape=(None,))
    await mesh.register("identity", content, load=True)
    path = folder / "plain.onnx"
    path.write_bytes(content)
    port = free_port()
    plain = Program("plain", [sys.executable, "-m", "tests.bench.plain", str(port), str(path)], folder)
    plain.start()
    small = np.zeros(4, np.float32)

    async def answers() -> bool:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            try:
                await Client(channel).infer("identity", x=small)
                await Client(mesh.channel()).infer("identity", x=small)
            except grpc.aio.AioRpcError:
                return False
        return True

    await until(answers, timeout=30, why="both servers answer")
    ours = [pid for program in (*mesh.routers, *mesh.pods) for pid in family(program.pid)]
    memory = Memory(ours)
    table = Table(title="FP32 tensors there and back, beside a plain grpc.aio server")
    for heading in ("size", "callers", "door", "calls/s", "p50 ms", "rate ratio", "CPU ratio", "memory"):
        table.add_column(heading, justify="left" if heading == "door" else "right")
    for label, elements in SIZES.items():
        tensor = np.arange(elements, dtype=np.float32)
        doors = {
            "plain": Door.grpc(f"127.0.0.1:{port}", "identity", tensor),
            "gRPC": Door.grpc(mesh.grpc_address(), "identity", tensor),
            "REST": Door.rest(mesh.rest_url().partition("//")[2], "identity", tensor),
        }
        for callers in CALLERS:
            found: dict[str, list[Load]] = {which: [] for which in doors}
            cost: dict[str, list[float]] = {which: [] for which in doors}
            taken: dict[str, list[float]] = {which: [] for which in doors}
            for number in range(ROUNDS + 1):
                for which, door in doors.items():
                    memory.begin()
                    meter = Meter.begin({which: [plain.pid] if which == "plain" else ours})
                    done = await load(door, callers=callers, seconds=SECONDS)
                    if number:  # the first round only warms up
                        found[which].append(done)
                        cost[which].append(meter.spent()[which] / done.calls)
                        taken[which].append(memory.taken() / tensor.nbytes / callers)
            for which, loads in found.items():
                rate, p50 = (statistics.median(values) for values in ([d.rate for d in loads], [d.p50 for d in loads]))
                row = [label, f"{callers}", which, f"{rate:,.0f}", f"{p50 * 1e3:.2f}"]
                if which != "plain":
                    rates = [one.rate / other.rate for one, other in zip(loads, found["plain"], strict=True)]
                    costs = [one / other for one, other in zip(cost[which], cost["plain"], strict=True)]
                    row += [f"{statistics.median(rates):.2f}", f"{statistics.median(costs):.2f}"]
                    row.append(f"{statistics.median(taken[which]):.1f}" if tensor.nbytes > 1 << 20 else "")
                table.add_row(*row)
    console.print(table)
    console.print("ratios: to plain; memory: of all processes of the mesh, per call in flight, in tensors of that size")
    plain.kill9()


if __name__ == "__main__":
    _call(pickle.load(sys.stdin.buffer), int(sys.argv[1]), float(sys.argv[2]))
