"""A mesh under troubles, as a run sees it: its pods by kind of server, its models, and its calls.

A foreign server is a child of its pod, or a neighbour that the harness starts and restarts. Each registration of a
model answers a number that no other registration answers. The fleet knows how to find that number in an answer.
"""

import abc
import contextlib
import os
import random
import signal
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from mesh.host import processes
from tests.support.arena import Arena
from tests.support.localmesh import Program

WRONG = -1.0
"""The number that stands for an answer of another model, or to another call."""

CALL_TIMEOUT = 40.0
"""Seconds of a call; longer than it takes to notice that a server hangs."""

MOST_OVER = 96 << 20
"""Bytes by which a server's memory may exceed its capacity: headroom for calls, and growth between two measurements."""

RELAY, ONNX_SERVER = "mesh.runtime.relay", "mesh.runtime.server"
"""Modules of processes below an agent."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The outcome of a call: the number in its answer, or the code and text of its failure."""

    value: float | None
    code: str = "OK"
    text: str = ""


class Fleet(abc.ABC):
    """The mesh, used with `async with fleet`. It has room for a fifth of its models."""

    lies: Collection[str] = ()
    """Kinds of wrong sizes that the foreign servers can be made to state."""

    def __init__(
        self,
        arena: Arena,
        servers: Mapping[str, str],
        neighbours: Mapping[str, Program],
        *,
        models: Sequence[str],
        doubled: Sequence[str],
        capacities: Mapping[str, int],
    ) -> None:
        """Makes the mesh. `servers` maps each pod to a word in the command line of its model server. `neighbours` are
        the servers that are not children of their pods. The models in `doubled` are to have two copies; they are called
        most, and never registered again. `capacities` maps each pod to its capacity in bytes."""
        self.arena = arena
        self.neighbours = neighbours
        self.models = models
        self.doubled = doubled
        self.capacities = capacities
        self.most: dict[str, int] = {}  # memory of foreign servers beyond their base
        self.channel: grpc.aio.Channel
        self._servers = servers
        self._bases: dict[int, int] = {}  # memory of servers without models, by process id

    # --- what a fleet has

    @abc.abstractmethod
    def takers(self, model: str) -> tuple[str, ...]:
        """Returns the pods that can load a model."""

    @abc.abstractmethod
    def type(self, model: str) -> str: ...

    @abc.abstractmethod
    def write(self, model: str, draw: random.Random) -> tuple[int, Path] | None:
        """Writes the file for another registration of a model, and returns the number that this registration answers.
        Returns None if no further content exists for the model."""

    @abc.abstractmethod
    def number_of(self, record: bytes) -> int:
        """Returns the number that the model of this record answers."""

    @abc.abstractmethod
    async def ask(self, model: str, ident: str, draw: random.Random) -> Answer:
        """Calls a model with the request id `ident`, and returns the outcome."""

    @abc.abstractmethod
    async def drop(self, pod: str, models: list[str]) -> None:
        """Makes a foreign server drop models without the mesh's knowledge."""

    def tell(self, lie: str) -> None:
        """Makes the servers state this kind of wrong size for all loads from now on. With "", they behave as usual
        again."""
        raise NotImplementedError

    # --- its life

    async def __aenter__(self) -> "Fleet":
        for program in self.neighbours.values():
            program.start()
        try:
            await self.arena.__aenter__()
            (router,) = self.arena.routers
            self.channel = self.arena.channel(router)
        except BaseException:
            self._end_neighbours()
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        try:
            await self.arena.__aexit__(*error)
        finally:
            self._end_neighbours()
            for program in self.neighbours.values():
                print(f"--- {program.name}\n{program.tail()}")

    def _end_neighbours(self) -> None:
        for program in self.neighbours.values():
            program.kill9()

    # --- processes

    @property
    def kinds(self) -> list[tuple[str, ...]]:
        """The pods by kind of server. No two pods of the same kind are harmed at the same time."""
        found: dict[str, list[str]] = {}
        for pod, word in self._servers.items():
            found.setdefault(word, []).append(pod)
        return [tuple(pods) for pods in found.values()]

    @property
    def foreign(self) -> tuple[str, ...]:
        """The pods with a foreign model server."""
        return tuple(pod for pod, word in self._servers.items() if word != ONNX_SERVER)

    @property
    def onnx(self) -> tuple[str, ...]:
        """The pods with Mesh's own model server."""
        return tuple(pod for pod, word in self._servers.items() if word == ONNX_SERVER)

    def server(self, pod: str) -> int:
        """Returns the process id of a pod's model server, or 0 while it does not run."""
        if pod in self.neighbours:
            process = self.neighbours[pod].process
            found = [process.pid] if process is not None and process.poll() is None else []
        else:
            found = self.arena.below(pod, self._servers[pod])
        return found[0] if found else 0

    def relay(self, pod: str) -> int:
        """Returns the process id of a pod's relay, or 0 while it does not run."""
        found = self.arena.below(pod, RELAY)
        return found[0] if found else 0

    def kill(self, pid: int) -> None:
        """Kills a process if it still runs."""
        for pod, program in self.neighbours.items():
            if pid and pid == self.server(pod):
                program.kill9()
                return
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def listens(self, pod: str, pid: int) -> bool:
        """Returns whether a foreign server has imported its libraries and listens. Until then, `look` does not count
        its memory, which belongs to no model."""
        return True

    def look(self) -> None:
        """Records how much memory the foreign servers take."""
        for pod in self.foreign:
            pid = self.server(pod)
            used = sum(map(processes.private_bytes, processes.tree(pid))) if pid else 0
            if used and self.listens(pod, pid):
                base = self._bases[pid] = min(used, self._bases.get(pid, used))
                self.most[pod] = max(self.most.get(pod, 0), used - base)

    async def figures(self) -> list[dict[str, Any]]:
        return (await self.arena.mesh.rest("GET", "/mesh/v1/pods")).json["pods"]
