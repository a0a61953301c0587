"""One part of a local mesh: what to run, how one sees that it is ready, and how its failure is told.

Before a part was ready for the first time its death is a failure of the start, told with its last lines. How it is kept
running afterwards is the supervisor's (`mesh.process.supervisor`).
"""

import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from mesh import process
from mesh.local import lines
from mesh.local.settings import UpError
from mesh.process.restarts import Policy
from mesh.process.supervisor import Life, Program, StartFailed, Supervisor

POLICY = Policy(first=0.2, longest=15.0)
TAIL = 15
"""Last lines of a child that failed to start, shown with the failure."""


@dataclass(frozen=True, slots=True)
class Part:
    """What to run. `argv` is asked again for each start, because ports may differ. Times in seconds."""

    name: str
    argv: Callable[[], Sequence[str]]
    ready: Callable[[], Awaitable[str]]  # an empty text, or what is still missing
    grace: float  # to end in, before it is killed
    ask: Callable[[], Awaitable[bool]] | None = None  # whether it answers; None: it has a heartbeat of ours
    start_timeout: float = 60.0  # until it is ready for the first time


@dataclass(frozen=True, slots=True)
class ChildStatistics:
    """How a child is."""

    name: str
    pid: int | None  # None: not running
    starts: int


class Child:
    """Keeps one part running. `on_line` gets its name and every line of its output."""

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
                wait_again=False,  # a pod waits for etcd as long as it must
                grace=part.grace,
                explain=self._explain,
            )
        )

    def statistics(self) -> ChildStatistics:
        """Its process, and how often it was started."""
        return ChildStatistics(self.part.name, self._supervisor.pid, self._supervisor.starts)

    async def start(self) -> None:
        """Starts it and waits until it is ready. Raises UpError with its last lines where that does not come."""
        try:
            await self._supervisor.start()
        except StartFailed as error:
            raise UpError(str(error)) from error

    async def run(self) -> None:
        """Keeps it running; a duty of this process."""
        await self._supervisor.run()

    def leave(self) -> None:
        """Takes into account that its end is wanted from now on, and bounded by its grace."""
        self._supervisor.leave()

    async def stop(self) -> None:
        """Ends it, killing it where it does not within its grace. Safe to call at any time, more than once."""
        await self._supervisor.stop(self.part.grace)

    def kill(self) -> None:
        """Ends it at once."""
        self.leave()
        self._supervisor.kill()

    async def _launch(self, life: Life) -> process.Process:
        name = self.part.name
        return await self._spawn(
            list(self.part.argv()),
            name=name,
            on_line=lambda line: self._on_line(name, line),
            # An agent blames the models that were at work when it was killed. One that was stopped from outside must
            # not.
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
