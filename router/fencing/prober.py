"""Probes of suspect pods, to find out whether they still exist.

If a pod's lease has ended, the pod may be dead, or etcd may have stalled. Calls find out which, but the copy of a model
without calls would stay in the view forever. The prober therefore asks the agent of each suspect pod every few seconds.
If the agent does not answer, or belongs to another incarnation, the pod and its copies are removed from the view.
"""

import asyncio

from mesh.process.tasks import Tasks
from mesh.telemetry import logs
from router.loads.agents import Agent, Unreachable
from router.state.pods import Pod
from router.state.view import View

log = logs.get(__name__)

TIMEOUT = 5.0
"""Seconds to wait for an answer. The wait is long, because the cause of etcd's stall may have slowed the agent too, and
removing a live pod costs loads."""

INTERVAL = 2.0
"""Seconds between two questions to the same pod."""


class Prober:
    """The prober of one worker."""

    def __init__(self, view: View, agents: Agent) -> None:
        self._view = view
        self._agents = agents
        self._tasks = Tasks()
        self._probing: set[str] = set()

    def look(self) -> None:
        """Starts a probe of each suspect pod that is not being probed already. Call this about once a second."""
        for pod in self._view.pods.values():
            if pod.suspect and pod.name not in self._probing:
                self._probing.add(pod.name)
                self._tasks.start(self._probe(pod), f"probe {pod.name}")

    async def _probe(self, pod: Pod) -> None:
        loop = asyncio.get_running_loop()
        try:
            if pod.record is None:
                return
            # Asks about one of its copies, because a full description would be long.
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
            log.info("a suspect pod counts as gone", pod=pod.name, why=why)
            self._view.failed(pod, loop.time())

    async def close(self) -> None:
        """Ends all probes."""
        await self._tasks.close()
