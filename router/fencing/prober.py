"""Asks suspect pods whether they are still there.

A pod whose lease ended may be dead, or only etcd stalled. Calls find out, but a model that nobody calls would stand in
the view for ever. So the agent of each suspect pod is asked every few seconds; one that does not answer, or is another
incarnation, is dropped with its copies.
"""

import asyncio

from mesh.process.tasks import Tasks
from mesh.telemetry import logs
from router.loads.agents import Agent, Unreachable
from router.state.pods import Pod
from router.state.view import View

log = logs.get(__name__)

TIMEOUT = 5.0
"""Seconds. Long: what made etcd stall may have made the agent slow too, and dropping what lives costs loads."""

INTERVAL = 2.0
"""Seconds between two questions to the same pod."""


class Prober:
    """One worker's."""

    def __init__(self, view: View, agents: Agent) -> None:
        self._view = view
        self._agents = agents
        self._tasks = Tasks()
        self._probing: set[str] = set()

    def look(self) -> None:
        """To be called every second or so: asks the suspects that are not being asked already."""
        for pod in self._view.pods.values():
            if pod.suspect and pod.name not in self._probing:
                self._probing.add(pod.name)
                self._tasks.start(self._probe(pod), f"probe {pod.name}")

    async def _probe(self, pod: Pod) -> None:
        loop = asyncio.get_running_loop()
        try:
            if pod.record is None:
                return
            # One of its copies: a whole description would be long.
            model = next(iter(pod.copies), "-")
            reply = await self._agents.describe(pod, model, timeout=TIMEOUT)
            if reply.incarnation == pod.record.incarnation:
                await asyncio.sleep(INTERVAL)
                return
            why = "another incarnation answers"
        except Unreachable as error:
            why = str(error)
        finally:
            self._probing.discard(pod.name)
        if pod.suspect and self._view.pods.get(pod.name) is pod:
            log.info("suspect pod is gone", pod=pod.name, why=why)
            self._view.failed(pod, loop.time())

    async def close(self) -> None:
        """Asks no more."""
        await self._tasks.close()
