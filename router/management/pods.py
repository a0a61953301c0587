"""The pods and routers of the mesh, and the lives of pods that are cut off from etcd."""

from dataclasses import dataclass

from mesh.etcd import Etcd
from mesh.schema.keys import Keys
from mesh.schema.lives import Life, RouterRecord
from mesh.statuses import MeshError, Reason
from mesh.telemetry import logs
from router.fencing.tombstones import Tombstones
from router.loads.agents import Agent, Unreachable
from router.management import descriptions
from router.management.descriptions import PodDescription, PodInfo
from router.state.view import View

log = logs.get(__name__)

_DESCRIBE = 5.0  # seconds


@dataclass(frozen=True, slots=True)
class OpenLife:
    """The open life of a pod that is cut off: for how many seconds it has been open, and for how many more
    registrations may wait for it (None: no limit)."""

    pod: str
    incarnation: str
    data: str  # its addresses
    control: str
    open_s: int
    left_s: int | None


@dataclass(frozen=True, slots=True)
class RouterInfo:
    """A router as recorded in etcd."""

    router: str
    address: str
    probe: str
    workers: int
    protocol: tuple[int, ...]  # lowest and highest of the agents' protocol


class Pods:
    """The pods in one worker's view. `reregister_after` is the time for which registrations wait for a pod that is cut
    off, in seconds (None: no limit)."""

    def __init__(
        self,
        *,
        etcd: Etcd,
        keys: Keys,
        view: View,
        agents: Agent,
        tombstones: Tombstones,
        reregister_after: float | None,
    ) -> None:
        self._etcd = etcd
        self._keys = keys
        self._view = view
        self._agents = agents
        self._tombstones = tombstones
        self._reregister_after = reregister_after

    def published(self) -> list[PodInfo]:
        """Returns the pods in this router's view."""
        return list(descriptions.published(self._view))

    def open_lives(self) -> list[OpenLife]:
        """Returns the lives of pods that are cut off from etcd, in this router's view."""
        found = []
        for pod, incarnation in sorted(self._view.open_lives()):
            try:
                life = Life.decode(self._view.lives.standing[pod, incarnation])
            except ValueError as error:
                log.warning("a pod's life cannot be read", pod=pod, incarnation=incarnation, error=str(error))
                continue
            after = self._reregister_after
            left = None if after is None else max(0, int(after - life.open_seconds))
            found.append(OpenLife(pod, incarnation, life.data_address, life.control_address, life.open_seconds, left))
        return found

    async def forget(self, name: str) -> list[str]:
        """Closes the open lives of a pod, so that registrations no longer wait for the pod. Returns the incarnations.
        Raises MeshError if the pod has no open life: PRECONDITION if it is published, UNKNOWN_MODEL otherwise. Raises
        REGISTRY_AWAY."""
        forgotten = await self._tombstones.forget(name)
        if not forgotten:
            if self._view.published(name) is not None:
                text = (
                    f"pod {name} is not cut off from etcd, so there is nothing to forget: stop it to remove its copies"
                )
                raise MeshError(Reason.PRECONDITION, text)
            raise MeshError(Reason.UNKNOWN_MODEL, f"no pod {name} is cut off from etcd: `mesh pods` lists the pods")
        return forgotten

    async def routers(self) -> list[RouterInfo]:
        """Returns the routers of the mesh as recorded in etcd. Raises REGISTRY_AWAY."""
        found = []
        async for kv in self._etcd.scan(self._keys.routers):
            try:
                name, record = self._keys.router_of(kv.key), RouterRecord.decode(kv.value)
            except ValueError as error:
                log.warning("a router's record cannot be read", key=kv.key, error=str(error))
                continue
            found.append(RouterInfo(name, record.address, record.probe_address, record.workers, tuple(record.protocol)))
        return found

    async def describe(self, name: str) -> PodDescription:
        """Returns an agent's present description of its pod. Raises MeshError: UNKNOWN_MODEL if this router knows no
        such pod, UNAVAILABLE if the agent does not answer."""
        pod = self._view.pods.get(name)
        if pod is None:
            raise MeshError(Reason.UNKNOWN_MODEL, f"there is no pod {name}: `mesh pods` lists the pods")
        try:
            reply = await self._agents.describe(pod, timeout=_DESCRIBE)
        except Unreachable as error:
            raise MeshError(Reason.UNAVAILABLE, error.text) from error
        return descriptions.described(reply)

    async def questions(self, name: str) -> tuple[str, ...]:
        """Returns a pod's latest requests for room as lines of JSON (`placement.replay`). Raises the same errors as
        `describe`."""
        pod = self._view.pods.get(name)
        if pod is None:
            raise MeshError(Reason.UNKNOWN_MODEL, f"there is no pod {name}: `mesh pods` lists the pods")
        try:
            return tuple((await self._agents.questions(pod, timeout=_DESCRIBE)).decisions)
        except Unreachable as error:
            raise MeshError(Reason.UNAVAILABLE, error.text) from error
