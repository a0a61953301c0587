"""A mesh for fault injection: each router and pod reaches etcd through a separate proxy, and any process can be
stopped.

The mesh is a `LocalMesh` with a `Proxy` between each process and an etcd that keeps all of its history. The harness
talks to etcd directly, so it always knows what etcd holds and in which order that was written.
"""

import contextlib
import os
import signal
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from pathlib import Path

import grpc

from mesh.etcd import ChangeKind, Etcd, Event
from mesh.etcd.ranges import after_prefix
from mesh.etcd.watch import Watch
from mesh.schema.keys import Keys
from mesh.schema.records import CopyRecord
from tests.support.etcd import EtcdServer
from tests.support.localmesh import LEASE_TTL, Client, LocalMesh, Program, children, command
from tests.support.proxy import Proxy
from tests.support.waiting import until

RECONNECT = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.use_local_subchannel_pool", 1),
)
"""Options of clients' channels: gRPC waits up to two minutes before it connects again, and routers come back within
seconds."""


class Arena:
    """A mesh with proxies: `async with Arena(folder, pods=2, routers=3) as arena`. `ttl` is the time to live of leases,
    in seconds."""

    def __init__(
        self,
        folder: Path,
        *,
        pods: int = 2,
        routers: int = 3,
        ttl: int = LEASE_TTL,
        edge: str = "envoy",
        capacity: str = "64MiB",
        runtime_options: Collection[str] = (),
        router_options: Collection[str] = (),
        options_of: Mapping[str, Collection[str]] | None = None,
    ) -> None:
        self.ttl = ttl
        self.etcd = EtcdServer(folder / "etcd", extra=["--auto-compaction-retention=0"])
        self._folder = folder
        self._options_of = options_of or {}
        self._pods = [f"pod-{number}" for number in range(1, pods + 1)]
        self._routers = [f"router-{number}" for number in range(1, routers + 1)]
        self._options = {
            "edge": edge,
            "capacity": capacity,
            "runtime_options": ["--lease-ttl", str(ttl), "--drain-timeout", "5", *runtime_options],
            "router_options": ["--workers", "1", "--drain-timeout", "2", *router_options],
        }
        self.roads: dict[str, Proxy] = {}  # proxies to etcd, by the name of the process that uses them
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> "Arena":
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self.etcd)
            for name in (*self._pods, *self._routers):
                self.roads[name] = await stack.enter_async_context(Proxy(self.etcd.port))
            self.truth = await stack.enter_async_context(Etcd(self.etcd.settings))
            self.mesh = LocalMesh(
                self._folder,
                self.etcd,
                pods=len(self._pods),
                routers=len(self._routers),
                log_level="info",
                options_of={
                    name: ("--etcd", road.endpoint, *self._options_of.get(name, ()))
                    for name, road in self.roads.items()
                },
                **self._options,
            )
            self.keys = Keys(self.mesh.base)
            stack.callback(self._say)
            await stack.enter_async_context(self.mesh)
            stack.push_async_callback(self.heal)  # before the mesh is told to end: a stopped process hears nothing
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stack.aclose()

    async def heal(self) -> None:
        """Continues all stopped processes and opens all proxies. Killed processes stay dead."""
        for road in self.roads.values():
            road.delay = 0.0
            road.flow()
        for program in (*self.mesh.pods, *self.mesh.routers):
            if program.process is not None and program.process.poll() is None:
                for pid in (program.pid, *children(program.pid)):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGCONT)
        if self.etcd.running:
            self.etcd.thaw()

    def _say(self) -> None:
        for program in (*self.mesh.routers, *self.mesh.pods):
            print(f"--- {program.name}\n{program.tail(60)}")

    # --- who is there ---

    @property
    def pods(self) -> list[str]:
        return self._pods

    @property
    def routers(self) -> list[str]:
        return self._routers

    def program(self, name: str) -> Program:
        """Returns the process that was started for a pod or router: the agent, or the parent of the workers."""
        (found,) = [program for program in (*self.mesh.pods, *self.mesh.routers) if program.name == name]
        return found

    def alive(self, name: str) -> bool:
        """Returns whether a pod's or router's process exists, even if it is stopped."""
        process = self.program(name).process
        return process is not None and process.poll() is None

    def own(self, name: str) -> list[int]:
        """Returns the process id of an agent or of a router's parent process. Returns an empty list if the process has
        ended, because its id may have been reused."""
        return [self.program(name).pid] if self.alive(name) else []

    def below(self, name: str, word: str) -> list[int]:
        """Returns the process ids of the children of a pod's or router's process whose command line contains `word`,
        such as `router.process.worker`."""
        if not self.alive(name):
            return []
        return [pid for pid in children(self.program(name).pid) if word in command(pid)]

    def servers(self, pod: str) -> list[int]:
        """Returns the process id of a pod's ONNX server, or an empty list while it is being replaced."""
        return self.below(pod, "mesh.runtime.server")

    def workers(self, router: str) -> list[int]:
        """Returns the process ids of a router's workers."""
        return self.below(router, "router.process.worker")

    def envoys(self, router: str) -> list[int]:
        """Returns the process id of a router's Envoy, or an empty list while it is being replaced."""
        return self.below(router, "/envoy")

    def client(self, router: str) -> Client:
        """Makes a client of one router, on a separate connection."""
        return Client(self.channel(router))

    def channel(self, router: str) -> grpc.aio.Channel:
        """Opens a connection to a router, which reconnects after the router was unavailable. The mesh closes it at its
        end."""
        address = self.mesh.grpc_address(self._routers.index(router))
        self.mesh.channels.append(grpc.aio.insecure_channel(address, options=RECONNECT))
        return self.mesh.channels[-1]

    # --- what is done to them ---

    @contextlib.contextmanager
    def stopped(self, *pids: int) -> Iterator[None]:
        """Stops processes (SIGSTOP) for as long as the block lasts."""
        for pid in pids:
            _signal(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                _signal(pid, signal.SIGCONT)

    @contextlib.contextmanager
    def cut_off(self, *names: str, drop: bool = False) -> Iterator[None]:
        """Lets nothing pass between these processes and etcd until the block ends, without closing connections. With
        `drop`, the connections break at the end of the block, and the data that they held up never arrive."""
        for name in names:
            self.roads[name].swallow()
        try:
            yield
        finally:
            for name in names:
                self.roads[name].flow_after_cut() if drop else self.roads[name].flow()

    @contextlib.contextmanager
    def etcd_frozen(self) -> Iterator[None]:
        """Stops etcd (SIGSTOP) for as long as the block lasts."""
        self.etcd.freeze()
        try:
            yield
        finally:
            self.etcd.thaw()

    # --- what stands in etcd ---

    async def present(self, pod: str) -> bool:
        return await self.truth.get(self.keys.pod(pod)) is not None

    async def gone(self, pod: str) -> None:
        """Waits until the pod's lease has ended."""

        async def vanished() -> bool:
            return not await self.present(pod)

        await until(vanished, timeout=self.ttl * 4 + 10, interval=0.05, why=f"the lease of {pod} ends")

    async def holders(self, model: str) -> list[str]:
        """Returns the pods whose copies of a model are loaded according to etcd."""
        start = self.keys.copies(model)
        found = []
        async for kv in self.truth.scan(start):
            with contextlib.suppress(ValueError):
                if CopyRecord.decode(kv.value).state == "loaded":
                    found.append(self.keys.copy_of(kv.key)[1])
        return found

    async def registrations(self, value: Callable[[bytes], int]) -> dict[str, list[int | None]]:
        """Returns the history of each model's registrations, in order: `value` of each new record, and None for each
        removal.

        A rewritten record is the same registration, so it adds nothing.
        """
        found: dict[str, list[int | None]] = defaultdict(list)
        async for event in self._events():
            model = self.keys.model_of(event.kv.key)
            if event.kind is ChangeKind.DELETE:
                found[model].append(None)
            elif event.kv.create_revision == event.kv.mod_revision:
                found[model].append(value(event.kv.value))
        return dict(found)

    async def _events(self) -> AsyncIterator[Event]:
        """Yields all changes of the registry so far. A watch does not say when it has reported everything, so this
        method changes another watched key after the registry, and waits for that change."""
        start = self.keys.registry
        mark = after_prefix(start)
        last = await self.truth.put(mark, b"")
        watch = await Watch.open(self.truth.connection, start, mark + b"\0", 0)
        try:
            while True:
                for delta in await watch.read():
                    for event in delta.events:
                        if event.kv.mod_revision >= last:
                            return
                        if event.kv.key != mark:
                            yield event
        finally:
            watch.cancel()


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # the process was replaced meanwhile
        os.kill(pid, number)
