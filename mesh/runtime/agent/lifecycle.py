"""The agent of a runtime pod from its start to its end; `assembly` makes its parts.

At the start, the model server and the control port come up before the pod is published, so that routers can use the pod
as soon as they see it. At the end, the pod leaves the mesh (`leaving`), then its model server ends, and its presence is
deleted last.
"""

import dataclasses
import time

from mesh.etcd import EtcdError
from mesh.options.values import format_address, parse_address
from mesh.process.ending import Ending
from mesh.process.tasks import Tasks
from mesh.runtime import duties
from mesh.runtime.agent.assembly import Pod
from mesh.runtime.agent.serverstart import StartError
from mesh.runtime.agent.settings import RuntimeSettings
from mesh.runtime.presence.place import NameTaken
from mesh.schema import owner
from mesh.schema.records import LEAVING, READY
from mesh.telemetry import logs

log = logs.get(__name__)

_SERVER_GRACE = 8.0  # seconds for the model server to end: its own grace is 5


class Agent:
    """One runtime pod. Call `start`, optionally `drain`, then `close`."""

    def __init__(self, settings: RuntimeSettings) -> None:
        """Makes the parts of the pod. Raises OSError, ValueError."""
        self.ending = Ending()
        self._tasks = Tasks(self.ending.because)
        self._pod = Pod(settings, cannot_go_on=self.ending.because)

    async def start(self) -> None:
        """Starts the pod. Returns once routers can use it. Raises StartError."""
        began = time.monotonic()
        pod, standing, patience = self._pod, self._pod.standing, self._pod.patience
        if pod.identity is not None:
            self._tasks.run(duties.CERTIFICATES, pod.identity.run)
        try:
            pod.puller.sweep()
            probe = await pod.probes.start()
        except (OSError, ValueError) as error:
            raise StartError(str(error)) from error
        try:
            await patience.until_done(lambda: owner.claim(pod.etcd, pod.keys, pod.settings.install_id))
            await patience.until_done(pod.presence.wait_for_name)  # before anything that takes seconds
        except (owner.OwnedByAnother, NameTaken) as error:
            raise StartError(str(error)) from error
        except EtcdError as error:
            raise StartError(error.detail) from error
        await pod.earlier.accuse(pod.etcd, pod.keys, pod.history)  # before anything is loaded again
        data, device = await pod.server_start.start()
        label = "gpu" if device == "cuda" else "cpu"
        standing.labels = tuple(dict.fromkeys((*standing.labels, label)))
        try:
            control = await pod.control.start(pod.settings.control)
        except OSError as error:
            raise StartError(str(error)) from error
        standing.addresses = self._addresses(data, control, probe)
        standing.phase = READY
        try:
            await pod.presence.start(patience)
        except (NameTaken, EtcdError) as error:
            raise StartError(str(error)) from error
        standing.known = True
        pod.fence.look()  # started at once, as a published pod may be called
        self._begin_duties()
        log.info(
            "pod ready",
            pod=standing.name,
            incarnation=pod.incarnation,
            data=standing.addresses[0],
            control=standing.addresses[1],
            probe=standing.addresses[2],
            s=round(time.monotonic() - began, 2),
        )

    def _addresses(self, data: str, control: str, probe: int) -> tuple[str, str, str]:
        """Returns the addresses of the data, control and probe ports as routers and others can reach them."""
        settings = self._pod.settings
        return (
            format_address(settings.reachable(settings.data), parse_address(data)[1]),
            format_address(settings.reachable(settings.control), parse_address(control)[1]),
            format_address(settings.reachable(settings.probe), probe),
        )

    def _begin_duties(self) -> None:
        pod = self._pod
        interval = pod.settings.check_interval
        check = dataclasses.replace(duties.HOUSEKEEPING, turns=duties.HOUSEKEEPING.turns + 2 * interval)
        for duty, work in (
            (duties.FENCE, pod.fence.run),
            (duties.MEMORY, pod.cache.memory.run),
            (duties.DEVICE_MEMORY, pod.cache.device_memory.run),
            (duties.LOSSES, pod.cache.losses.run),
            (duties.RELIEF, pod.relief.run),
            (duties.LAST_LOOKS, pod.last_looks.run),
            (check, pod.housekeeping.run),
            (duties.RATE, pod.standing.rate.run),
            (duties.ACTIVITY, pod.activity.run),
            (duties.OPTIMISING, pod.optimising.run),
            (duties.LONG_PULLS, pod.files.watch),
        ):
            self._tasks.run(duty, work)

    async def drain(self) -> None:
        """Leaves the mesh in order, in about `drain_timeout` seconds at most."""
        self._pod.standing.phase = LEAVING
        self._pod.run_dir.disown()  # a pod killed for taking too long to leave was not killed by a model
        await self._pod.leaving.leave(self._pod.settings.drain_timeout)

    async def close(self, *, grace: float = _SERVER_GRACE) -> None:
        """Ends all parts, and deletes the pod's keys if etcd answers. `grace` is the time that the model server gets to
        end, in seconds."""
        pod = self._pod
        pod.standing.phase = LEAVING
        await pod.leaving.fall_silent(grace)
        await self._tasks.close()
        await pod.cache.loads.settle(0.0)
        pod.server_start.stop_listening()
        await pod.server.stop(grace)
        if pod.foreign is not None:
            await pod.foreign.stop(grace)
        await pod.presence.close(revoke=True)
        await pod.control.close(0.2)
        await pod.cache.unloads.close()
        await pod.history.close()
        await pod.files.close()
        await pod.probes.close()
        await pod.etcd.close()
        pod.last_looks.close()
        pod.run_dir.close()
        log.info("pod left", pod=pod.standing.name)
