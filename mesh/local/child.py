"""One part of a local mesh: its command line, its readiness check, and the report of its failure.

If a part ends before it was ready for the first time, its start fails with an error that shows the part's last lines.
After the first start, the supervisor keeps the part running (`mesh.process.supervisor`).
"""

import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from mesh import process
from mesh.local import lines
from mesh.local.settings import UpError
from mesh.process.restarts import RestartPolicy
from mesh.process.supervisor import ChildLife, Program, StartFailed, Supervisor

POLICY = RestartPolicy(first=0.2, longest=15.0)
TAIL = 15
"""Number of a child's last lines that are shown if it fails to start."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a local mesh. `argv` is called at each start, because ports may differ. Times are in seconds."""

    name: str
    argv: Callable[[], Sequence[str]]
    ready: Callable[[], Awaitable[str]]  # returns "" if the part is ready, else what is still missing
    grace: float  # time for the part to end before it is killed
    ask: Callable[[], Awaitable[bool]] | None = None  # returns whether the part answers; None: it sends a heartbeat
    start_timeout: float = 60.0  # until the part is ready for the first time


@dataclass(frozen=True, slots=True)
class ChildStatistics:
    """The process of a part, and how often it was started."""

    name: str
    pid: int | None  # None: not running
    starts: int


class Child:
    """The supervised process of a part. `on_line` gets the part's name and each line of its output."""

    def __init__(
        self,
        part: Part,
        on_line: Callable[[str, str], None],
        *,
        spawn: Callable[..., Awaitable[process.Process]] | None = None,
    ) -> None:
        self.part = part
        self._on_line = on_line
        self._spawn = spawn or process.spawn
        self._supervisor = Supervisor(
            Program(
                part.name,
                self._launch,
                missing=part.ready,
                ask=part.ask,
                policy=POLICY,
                start_timeout=part.start_timeout,
                wait_again=False,  # a pod may wait for etcd without limit
                grace=part.grace,
                explain=self._explain,
            )
        )

    def statistics(self) -> ChildStatistics:
        """Returns the part's process id and number of starts."""
        return ChildStatistics(self.part.name, self._supervisor.pid, self._supervisor.starts)

    async def start(self) -> None:
        """Starts the part, and waits until it is ready. Raises UpError, with the part's last lines, if the start
        fails."""
        try:
            await self._supervisor.start()
        except StartFailed as error:
            raise UpError(str(error)) from error

    async def run(self) -> None:
        """Keeps the part running. This is an essential task of the process."""
        await self._supervisor.run()

    def leave(self) -> None:
        """Notes that the part is about to be stopped, so that its end causes no restart."""
        self._supervisor.leave()

    async def stop(self) -> None:
        """Stops the part, and kills it after its grace period. May be called at any time, more than once."""
        await self._supervisor.stop(self.part.grace)

    def kill(self) -> None:
        """Kills the part immediately."""
        self.leave()
        self._supervisor.kill()

    async def _launch(self, life: ChildLife) -> process.Process:
        name = self.part.name
        return await self._spawn(
            list(self.part.argv()),
            name=name,
            on_line=lambda line: self._on_line(name, line),
            # An agent that was killed blames the models that were at work, unless it was stopped from outside.
            env={**os.environ, process.STOPPED_BEFORE: "1"} if life.innocent else None,
            beats=self.part.ask is None,
        )

    def _explain(self, how: str, tail: tuple[str, ...]) -> str:
        rows: list[str] = []
        for line in tail:
            data = lines.parse(line)
            rows += [line] if data is None else lines.readable(data, name=self.part.name)
        shown = [f"    {row}" for row in rows[-TAIL:]]
        return "\n".join([f"{self.part.name} {how}", *(["its last lines:", *shown] if shown else [])])
