"""The leader's work for pods that are cut off: it closes lives that have ended, and removes tombstones that are no
longer needed.

A life without presence is open: its model server may or may not still answer. The leader records two facts about an
open life: the revision at which the presence ended, by which etcd's history shows which copies the pod had; and the
time for which the life has been open. This is an age and not a date, so the next leader can continue the count with
any clock. A life is closed

- by its agent, once its model server has ended;
- when another incarnation of the pod is published, and the old one has had time to notice this;
- when nothing listens on its data port (connections are refused), or a published pod listens there;
- by hand (`mesh pods forget`);
- after `--reregister-after`, with a warning. From then on, a pod that is still cut off may answer callers who are cut
  off with it, even for models that have been registered again.
"""

import asyncio
import socket
from dataclasses import dataclass, replace

from mesh.etcd import Etcd, EtcdError, modified, put_op
from mesh.options.values import parse_address
from mesh.process.tasks import turned
from mesh.schema.keys import Keys
from mesh.schema.lives import Life
from mesh.telemetry import logs
from router.fencing.tombstones import Open, Tombstones
from router.state.view import View

log = logs.get(__name__)

LOOK = 0.5
"""Seconds between two checks of all lives."""

NOTE = 10
"""Seconds between two writes of a life's age to etcd."""

REPLACED = 10
"""Seconds after which another incarnation of the same name ends a life. The old pod may still be alive, if its agent
only seemed dead to the new one. But its agent checks every few seconds that the presence under the pod's name is its
own, and stops answering if it is not."""

_SHARE = 4  # the pause after a check, in multiples of its duration: with thousands of tombstones, a check takes seconds
_PAUSE_MAX = 10.0  # seconds
_AT_ONCE = 64  # concurrent connection attempts: a zone may be lost, and this process needs descriptors too
_CONNECT = 1.0  # seconds


@dataclass(frozen=True, slots=True)
class ClosingStatistics:
    """Numbers of lives and tombstones, as one router counts them."""

    open: int
    tombstones: int
    expired: int  # lives closed so far because they had been open for too long


class Closing:
    """The checks of lives and tombstones by one router while it leads."""

    def __init__(
        self,
        view: View,
        etcd: Etcd,
        keys: Keys,
        tombstones: Tombstones,
        *,
        reregister_after: float | None,
    ) -> None:
        """Makes a leader's checks. `reregister_after` is in seconds. If it is None, a life stays open until it is known
        to have ended."""
        self._view = view
        self._etcd = etcd
        self._keys = keys
        self._tombstones = tombstones
        self._after = reregister_after
        self._since: dict[tuple[str, str], tuple[float, int]] = {}  # when first seen open, and its age then
        self._expired = 0
        self._trying = asyncio.Semaphore(_AT_ONCE)

    async def lead(self) -> None:
        """Checks lives and tombstones repeatedly, until cancelled."""
        self._since.clear()
        loop = asyncio.get_running_loop()
        while True:
            turned()
            began = loop.time()
            try:
                await self.look()
            except EtcdError as error:
                log.debug("lives are checked later: etcd is unavailable", why=error.detail)
            await asyncio.sleep(min(max(LOOK, _SHARE * (loop.time() - began)), _PAUSE_MAX))

    async def look(self) -> None:
        """Checks each open life and each tombstone once. Raises EtcdError."""
        if self._view.open_lives():
            lives = await self._tombstones.open_lives()
            seen = {(life.pod, life.incarnation) for life in lives}
            self._since = {life: since for life, since in self._since.items() if life in seen}
            await asyncio.gather(*(self._judge(life) for life in lives))
        else:
            self._since.clear()
        await self._tombstones.sweep(self._view.lives.tombstones)

    def statistics(self) -> ClosingStatistics:
        """Returns the numbers of open lives and tombstones that this router sees."""
        return ClosingStatistics(len(self._view.open_lives()), len(self._view.lives.tombstones), self._expired)

    async def _judge(self, life: Open) -> None:
        if self._view.revision < life.revision:
            return  # this router was stopped or is short of CPU, so its view of pods is older than the life
        now, who = asyncio.get_running_loop().time(), (life.pod, life.incarnation)
        first, age = self._since.setdefault(who, (now, life.life.open_seconds))
        age = int(age + now - first)
        heir = self._heir(life.life.data_address)
        if heir:
            await self._close(life, f"{heir} listens on its data port now")
            return
        async with self._trying:
            refused = await _refuses(life.life.data_address)
        if refused:
            await self._close(life, "nothing listens on its data port")
            return
        record = self._view.published(life.pod)
        if record is not None and record.incarnation != life.incarnation and age >= REPLACED:
            await self._close(life, "another incarnation has replaced it")
            return
        if self._after is not None and age >= self._after:
            if await self._close(life, f"it was open for {age} s"):
                self._expired += 1
                log.warning(
                    "the wait for a pod that is cut off has ended: if it still runs, it may answer for models "
                    "that are registered again from now on",
                    pod=life.pod,
                    incarnation=life.incarnation,
                    open_s=age,
                )
            return
        ended = life.life.ended_revision or self._view.lives.ended.get(who, 0)
        if age - life.life.open_seconds >= NOTE or ended != life.life.ended_revision:
            await self._note(life, replace(life.life, ended_revision=ended, open_seconds=age))

    def _heir(self, data_address: str) -> str:
        """Returns the name of the published pod with this data address, or "". Two processes cannot share an
        address."""
        for pod in self._view.pods.values():
            if pod.record is not None and not pod.suspect and pod.record.data_address == data_address:
                return pod.name
        return ""

    async def _close(self, life: Open, why: str) -> bool:
        done = await self._tombstones.close(life)
        if done:
            log.info("a pod's life has ended", pod=life.pod, incarnation=life.incarnation, why=why)
        return done

    async def _note(self, life: Open, noted: Life) -> None:
        key = self._keys.life(life.pod, life.incarnation)
        await self._etcd.txn([modified(key, life.revision)], [put_op(key, noted.encode())])


async def _refuses(address: str) -> bool:
    """Returns whether connections to the address are refused, which proves that no process listens on it. A timeout or
    a name that cannot be resolved proves nothing. All addresses of a name must refuse."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(_CONNECT):
            host, port = parse_address(address)
            found = {known[4][:2] for known in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
            return bool(found) and all([await _refused(*place) for place in found])
    except (OSError, ValueError):
        return False


async def _refused(host: str, port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection(host, port)
    except ConnectionRefusedError:
        return True
    writer.close()
    return False
