"""A mesh under attack: callers of a hot model during the attack, and a watch on the memory of the mesh's processes.

    async with Siege(mesh, growth=200 * MIB) as siege:
        ...the attack...

At the end the siege checks that there were enough hot calls over gRPC and over REST, and that none failed. No process
may have grown beyond the limit in any sample, and each must shrink to a second limit. All pods must be ready, and only
models that the test names may be quarantined.
"""

import asyncio
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp
import grpc
import numpy as np

from tests.support.localmesh import Client, LocalMesh, children, command
from tests.support.waiting import until

MIB = 1 << 20
HOT = "hot"
HOT_VALUE = 7.0

_PAUSE = 0.03  # seconds between two calls of one caller
_LOOK = 0.1  # seconds between two samples of memory
_TIMEOUT = 10.0  # seconds that a call of the hot model may take


class Siege:
    """The watch during an attack. Each process may grow by `growth` bytes during the attack, and keep `left` bytes of
    that afterwards."""

    def __init__(
        self,
        mesh: LocalMesh,
        *,
        growth: int = 256 * MIB,
        left: int = 192 * MIB,
        blamed: Iterable[str] = (),
        timeout: float = _TIMEOUT,
        retry: bool = False,
        least: int = 20,
    ) -> None:
        """Prepares a siege. `blamed` are models that may be quarantined. A call of the hot model may take `timeout`
        seconds. With `retry`, calls that fail with UNAVAILABLE or get no complete answer in time are not failures,
        because clients retry them while a process is replaced. `least` is the smallest number of answers that each
        caller must get."""
        self.mesh = mesh
        self.growth = growth
        self.left = left
        self.blamed = frozenset(blamed)
        self.timeout = timeout
        self.retry = retry
        self.least = least
        self.failures: list[str] = []
        self.retries = 0
        self.answered = {"gRPC": 0, "REST": 0}
        self.slowest = 0.0  # seconds of the slowest hot call
        self.peaks: dict[str, int] = {}  # largest growth by process, in bytes
        self._base: dict[int, int] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        await self._settle()
        self._base = {pid: resident(pid) for pid in processes(self.mesh)}
        self._tasks = [
            asyncio.create_task(self._call_grpc()),
            asyncio.create_task(self._call_rest()),
            asyncio.create_task(self._watch()),
        ]
        await self.more(3)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                await self._judge()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def more(self, count: int = 5) -> None:
        """Waits until both callers have got `count` more answers, or a call has failed."""
        goal = {kind: answered + count for kind, answered in self.answered.items()}
        await until(
            lambda: self.failures or all(self.answered[kind] >= least for kind, least in goal.items()),
            timeout=90,
            why="the hot model goes on answering",
        )

    async def _judge(self) -> None:
        await self.more(max(5, self.least - min(self.answered.values())))
        assert not self.failures, f"{len(self.failures)} hot calls failed, first: {self.failures[0]}"
        above = {name: growth // MIB for name, growth in self.peaks.items() if growth > self.growth}
        assert not above, f"grown by more than {self.growth // MIB} MiB: {above}"
        await until(
            lambda: not self._grown(), timeout=60, interval=0.2, why=lambda: f"memory comes back: {self._grown()}"
        )
        models = (await self.mesh.rest("GET", "/mesh/v1/models?limit=1000")).json["models"]
        guilty = {model["id"] for model in models if model.get("quarantined")} - self.blamed
        assert not guilty, f"quarantined without a fault: {sorted(guilty)}"
        pods = (await self.mesh.rest("GET", "/mesh/v1/pods")).json["pods"]
        assert {pod["state"] for pod in pods} == {"ready"}

    async def _call_grpc(self) -> None:
        async with grpc.aio.insecure_channel(self.mesh.grpc_address()) as channel:
            client = Client(channel)
            while True:
                began = time.monotonic()
                try:
                    (answer,) = await client.infer(HOT, x=np.ones((1, 1), np.float32), timeout=self.timeout)
                    self._note("gRPC", began, float(answer.ravel()[0]))
                except grpc.aio.AioRpcError as error:
                    await self._failed("gRPC", f"{error.code().name}: {error.details()}", error.code().name, began)
                await asyncio.sleep(_PAUSE)

    async def _call_rest(self) -> None:
        body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [1.0]}]}
        url = f"{self.mesh.rest_url()}/v2/models/{HOT}/infer"
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(self.timeout)) as session:
            while True:
                began = time.monotonic()
                try:
                    async with session.post(url, json=body) as reply:
                        answer = await reply.json()
                        if reply.status == 200:
                            self._note("REST", began, answer["outputs"][0]["data"][0])
                        else:
                            kind = "UNAVAILABLE" if reply.status == 503 else str(reply.status)
                            await self._failed("REST", f"{reply.status}: {answer}", kind, began)
                except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                    kind = "UNAVAILABLE" if isinstance(error, aiohttp.ClientConnectionError) else ""
                    await self._failed("REST", repr(error), kind, began)
                await asyncio.sleep(_PAUSE)

    def _note(self, kind: str, began: float, value: float) -> None:
        self.slowest = max(self.slowest, time.monotonic() - began)
        if value == HOT_VALUE:
            self.answered[kind] += 1
        else:
            self.failures.append(f"{kind} answered {value}")

    async def _failed(self, kind: str, text: str, code: str, began: float) -> None:
        took = time.monotonic() - began
        if self.retry and (code in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "") or "TimeoutError" in text):
            self.retries += 1
        else:
            self.failures.append(f"{kind} after {took:.2f} s: {text}")

    async def _watch(self) -> None:
        while True:
            for pid in processes(self.mesh):
                grown = resident(pid) - self._base.setdefault(pid, 128 * MIB)
                name = _name(pid)
                self.peaks[name] = max(self.peaks.get(name, 0), grown)
            await asyncio.sleep(_LOOK)

    def _grown(self) -> dict[str, int]:
        """Returns the growth, in MiB, of each process that holds more memory than it may keep."""
        grown = {_name(pid): resident(pid) - self._base.get(pid, 128 * MIB) for pid in processes(self.mesh)}
        return {name: growth // MIB for name, growth in grown.items() if growth > self.left}

    async def _settle(self) -> None:
        client = Client(self.mesh.channel())

        async def answers() -> bool:
            try:
                return bool(await client.infer(HOT, x=np.ones((1, 1), np.float32), timeout=5))
            except grpc.aio.AioRpcError:
                return False

        await until(answers, timeout=60, interval=0.2, why="the hot model answers")


def processes(mesh: LocalMesh) -> list[int]:
    """Returns the ids of all processes of the mesh except etcd: routers, workers, Envoy, agents, model servers."""
    found = []
    for program in (*mesh.routers, *mesh.pods):
        if program.process is not None and program.process.poll() is None:
            waiting = [program.pid]
            while waiting:
                pid = waiting.pop()
                found.append(pid)
                waiting += children(pid)
    return found


def resident(pid: int) -> int:
    """Returns the private memory of a process, in bytes, or 0 if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def _name(pid: int) -> str:
    words = command(pid).split()
    kinds = {
        "router.process.worker": "worker",
        "router": "router",
        "mesh.runtime.server": "server",
        "mesh.runtime": "agent",
    }
    for word, kind in kinds.items():
        if word in words:
            return f"{kind} {pid}"
    return f"{Path(words[0]).name if words else 'gone'} {pid}"
