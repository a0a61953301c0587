"""Large tensors through the complete chain, over gRPC and binary REST, compared with a plain server.

Each call sends one FP32 tensor and gets it back, so bytes move both ways. The callers are the clients that users have,
grpcio and http.client, each with its own connection and one call at a time (`client`).

Memory is the sum of each process's own peak during the load, minus what all of them took before the first large call.
So it includes memory that they keep afterwards, and peaks that did not coincide.
"""

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

import grpc
import numpy as np

from mesh.process import free_port
from tests.bench import bodies
from tests.bench.client import Order, Outcome, call
from tests.bench.processes import Meter, family, peak_bytes, reset_peak, resident_bytes
from tests.bench.results import Comparison, Results, Row
from tests.support import models
from tests.support.localmesh import Client, LocalMesh, Program
from tests.support.waiting import until

SECONDS = 0.7  # length of a round
CALLERS = (1, 8)
GRPC, REST, PLAIN = "Mesh, gRPC", "Mesh, REST", "plain grpc.aio"

SIZES = {"100 KB": 25_000, "4 MB": 1_000_000}
"""Numbers of elements of 4 bytes."""

_GOALS = {1: ">= 0.9", 8: ">= 1"}
"""Goals for the ratio of the rates of 4 MB, by number of callers."""


class Memory:
    """The memory that calls in flight take in a group of processes."""

    def __init__(self, pids: Sequence[int]) -> None:
        """Notes what the processes take now, before any large call."""
        self._pids = tuple(pids)
        self._idle = sum(map(resident_bytes, self._pids))

    def begin(self) -> None:
        """Resets the peaks."""
        for pid in self._pids:
            reset_peak(pid)

    def taken(self) -> int:
        """Returns the sum of the processes' peaks since `begin`, without what they took before any large call."""
        return sum(map(peak_bytes, self._pids)) - self._idle


async def run(mesh: LocalMesh, folder: Path, results: Results, rounds: int) -> None:
    """Measures the doors in turn, in several rounds."""
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
    ours = [pid for one in (*mesh.routers, *mesh.pods) for pid in family(one.pid)]
    memory = Memory(ours)
    comparison = Comparison("large", "Large tensors, sent and returned", [GRPC, REST, PLAIN], PLAIN)
    for label, elements in SIZES.items():
        tensor = np.arange(elements, dtype=np.float32)
        doors = {
            PLAIN: bodies.grpc(f"127.0.0.1:{port}", "identity", tensor, tensor.nbytes),
            GRPC: bodies.grpc(mesh.grpc_address(), "identity", tensor, tensor.nbytes),
            REST: bodies.rest(mesh.rest_url().partition("//")[2], "identity", tensor, tensor.nbytes, binary=True),
        }
        for callers in CALLERS:
            found: dict[str, list[Outcome]] = {which: [] for which in doors}
            cost: dict[str, list[float]] = {which: [] for which in doors}
            taken: dict[str, list[float]] = {which: [] for which in doors}
            for number in range(rounds + 1):
                for which, one in doors.items():
                    memory.begin()
                    meter = Meter.begin({which: [plain.pid] if which == PLAIN else ours})
                    done = await asyncio.to_thread(call, Order(one, SECONDS, callers=callers))
                    if number:  # the first round only warms up
                        found[which].append(done)
                        # The first call of each caller is not counted, but its CPU is.
                        cost[which].append(meter.spent()[which] / (done.calls + callers) * 1e6)
                        taken[which].append(memory.taken() / tensor.nbytes / callers)
            what = f"{label}, {callers} {'caller' if callers == 1 else 'callers'}"
            rates = {which: [done.rate for done in loads] for which, loads in found.items()}
            middles = {which: [done.percentiles[0] * 1e3 for done in loads] for which, loads in found.items()}
            goal = _GOALS[callers] if label == "4 MB" else ""
            comparison.rows += [
                Row(what, "calls/s", rates, more_is_better=True, reach=goal),
                Row(f"{what}, p50", "ms", middles),
                Row(f"{what}, CPU of a call", "us", cost),
            ]
            if tensor.nbytes > 1 << 20:
                del taken[PLAIN]
                comparison.rows.append(Row(f"{what}, memory per call in flight", "messages", taken, judged=False))
    comparison.notes = [
        "The model returns its input unchanged.",
        f"{rounds} rounds of {SECONDS} s alternate between the systems. The calls are sent by grpcio, or over REST, "
        "with binary tensors, by http.client.",
        "Memory per call in flight is the additional memory of all processes of the mesh, in multiples of the "
        "message's size. The goal is 2.5.",
    ]
    results.add(comparison)
    plain.kill9()
