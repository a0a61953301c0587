"""The replacement of a model server that has lost threads to loads and calls that cannot be ended.

Each lost thread keeps a processor busy and its memory in use for as long as the process lives. A few are tolerated. A
server with more accepts no further loads, gets time to answer its calls, and is replaced. No model is blamed for the
end of the server: a model whose load could not be ended was blamed at that time (`cache.loads.serverside`).
"""

import asyncio
from collections.abc import Callable
from typing import Protocol

from mesh.process.tasks import turned
from mesh.telemetry import logs

log = logs.get(__name__)

MOST = 3
"""Number of lost threads that are tolerated."""

GRACE = 10.0
"""Seconds for the server's calls in flight. The server's own grace is 5 s; calls that remain after that cannot be
ended."""

_LOOK = 1.0  # seconds: as often as the board is written


class Server(Protocol):
    """The part of the model server that `Relief` needs."""

    async def replace(self, why: str, grace: float) -> None:
        """Ends the server in order, so that a new one is started."""


class Relief:
    """The watch over lost threads. Its `run` must run as long as the server. `refusal` is the reason why loads are
    refused until the server is replaced, or "" if they are not."""

    def __init__(self, stuck: Callable[[], int], server: Server, *, look: float = _LOOK) -> None:
        """Makes a watch. `stuck` returns the number of lost threads."""
        self._stuck = stuck
        self._server = server
        self._look = look
        self.refusal = ""
        self.count = 0  # of replacements

    async def run(self) -> None:
        """Watches the count, and replaces the server if necessary, until cancelled."""
        while True:
            await asyncio.sleep(self._look)
            turned()
            stuck = self._stuck()
            if stuck <= MOST:  # after a replacement, once the agent has cleared the board
                self.refusal = ""
                continue
            if self.refusal:
                continue
            why = f"had {stuck} loads and calls that cannot be ended, and was replaced"
            log.error("model server has lost threads, replacing it", stuck=stuck)
            self.refusal = f"the model server has {stuck} loads and calls that cannot be ended, and is being replaced"
            self.count += 1
            await self._server.replace(why, GRACE)
