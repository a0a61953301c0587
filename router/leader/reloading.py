"""Moving the copies of a reloaded model to its new content, without a failed call.

Reloading raises the generation in the model's record and puts `reloads/<model>`, in one transaction; from then on it is
the leader's, whichever router leads. What is to be done follows from the copies as they are and from that generation,
so another leader goes on where one has died. Both contents answer until the last old copy has gone; then the key goes.

If the new content cannot be loaded the old copies stay, the key says why, and it is tried again later, and at once when
somebody reloads the model again.

Copies of two generations without a key are moved too: a pod was away while the others moved.
"""

import asyncio
import math
import time
from collections.abc import Callable, Mapping

from mesh.etcd import Etcd, EtcdError, delete_op, modified, put_op
from mesh.keys import Keys, after_prefix
from mesh.pb import agent_pb2
from mesh.records import Reload
from mesh.statuses import MeshError, Reason
from mesh.telemetry import logs
from placement import reload
from placement.choice import Choice
from placement.debits import Debits
from placement.footprint import Footprint
from placement.limits import TypeLimits
from router import asking
from router.agents import Agent, Unreachable, load_request
from router.registry import Registration, Registry
from router.tasks import Tasks
from router.view import Pod, View

log = logs.get(__name__)

INTERVAL = 0.5
"""Seconds between two looks for models to be moved, each of which is a read of a range that is empty as a rule."""

MIXED_EVERY = 5.0
"""Seconds between two looks through the view for copies of several generations."""

AT_ONCE = 16
"""Models that are moved at a time."""

REST = 10.0
"""Seconds for which a model rests after its new content could not be loaded; twice as many after each further time."""

REST_MOST = 600.0

_LOOK = 0.1  # seconds between two looks at a model whose copies move
_PATIENCE = 60.0  # seconds that one move waits for pods; the next round goes on
_LOAD_TIMEOUT = 300.0
_UNLOAD_TIMEOUT = 60.0
_NO_ROOM = (Reason.NO_ROOM.name, Reason.NOWHERE.name)

Choose = Callable[[Registration, Footprint, Mapping[str, str], int], Choice]
"""Chooses a pod: registration, size, pods not to use and why, ms since its last use."""


class Reloading:
    """One leader's."""

    def __init__(
        self,
        *,
        view: View,
        agents: Agent,
        registry: Registry,
        etcd: Etcd,
        keys: Keys,
        limits: Callable[[], TypeLimits],
        debits: Debits,
        choose: Choose,
        on_done: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`on_done` is called with each model whose copies have all moved."""
        self._view = view
        self._agents = agents
        self._registry = registry
        self._etcd = etcd
        self._keys = keys
        self._limits = limits
        self._debits = debits
        self._choose = choose
        self._on_done = on_done
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._moves: dict[str, asyncio.Task[None]] = {}
        self._resting: dict[tuple[str, int], tuple[float, float]] = {}  # by model and generation: until when, how long
        self._tasks = Tasks()
        self._looked_at = -math.inf  # when copies of several generations were looked for

    def moving(self) -> list[str]:
        """Returns the models that are being moved now."""
        return list(self._moves)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self.round()
            except EtcdError as error:
                log.info("reloads are put off while etcd is away", why=error.detail)
            await asyncio.sleep(INTERVAL)

    async def round(self) -> None:
        """Begins to move what is to be moved and rests no longer. Raises EtcdError."""
        asked: dict[str, int] = {}
        async for page in self._etcd.pages(self._keys.reloads, after_prefix(self._keys.reloads)):
            for kv in page.kvs:
                asked[self._keys.reload_of(kv.key)] = _generation(kv.value)
        now = time.monotonic()
        mixed: dict[str, int] = {}
        if now - self._looked_at >= MIXED_EVERY:
            self._looked_at, mixed = now, self._mixed()
        for model_id, generation in {**mixed, **asked}.items():
            until, _ = self._resting.get((model_id, generation), (0.0, 0.0))
            if model_id not in self._moves and until <= now:
                task = self._moves[model_id] = self._tasks.spawn(self._move(model_id), f"reload {model_id}")
                task.add_done_callback(lambda _, model_id=model_id: self._moves.pop(model_id, None))  # type: ignore[misc]
        self._resting = {names: rest for names, rest in self._resting.items() if names[0] in asked or rest[0] > now}

    def _mixed(self) -> dict[str, int]:
        """The models with copies of several generations, and the latest."""
        found = {}
        for model_id in self._view.several():
            known = [copy.record for copy in self._view.known(model_id) if copy.loaded]
            generations = {(record.create_revision, record.generation) for record in known}
            if len(generations) > 1:
                found[model_id] = max(generations)[1]
        return found

    async def close(self) -> None:
        """Ends what is under way here; agents go on with what they were asked."""
        await self._tasks.close()

    # --- one model ---

    async def _move(self, model_id: str) -> None:
        no_room: dict[str, str] = {}
        end = time.monotonic() + _PATIENCE
        async with self._turns:
            try:
                while time.monotonic() < end:
                    registration = await self._registry.read(model_id, fresh=True)
                    if registration is None:
                        await self._finish(model_id, None)
                        return
                    todo = reload.step(self._held(registration), registration.record.generation, no_room)
                    if todo.done:
                        await self._finish(model_id, registration.record.generation)
                        return
                    if (why := await self._take(registration, todo, no_room)) is not None:
                        await self._failed(registration, why)
                        return
                    await asyncio.sleep(_LOOK)
            except (EtcdError, MeshError) as error:
                log.info("a reload waits for etcd", model=model_id, why=error.text)

    def _held(self, registration: Registration) -> list[reload.Held]:
        found = []
        for copy in self._view.known(registration.model_id):
            if copy.record.create_revision != registration.created:
                continue  # it is withdrawn anyway
            pod = copy.pod
            reachable = pod.record is not None and not pod.suspect and not pod.leaving
            # What only an agent's answer has told so far, other routers do not know yet.
            loaded = copy.callable and not (copy.answered and copy.record.generation >= registration.record.generation)
            found.append(reload.Held(pod.name, copy.record.generation, loaded, reachable))
        return found

    async def _take(self, registration: Registration, todo: reload.Step, no_room: dict[str, str]) -> str | None:
        """Carries one step out. Returns why the new content cannot be loaded; None: it can, or nobody can tell yet."""
        if todo.elsewhere:
            return await self._load_elsewhere(registration, todo.why)
        loads = [self._load(registration, name, no_room) for name in todo.beside]
        unloads = [self._unload(registration, name, todo.why) for name in todo.unload]
        failures = await asyncio.gather(*loads, *unloads)
        return next((why for why in failures if why is not None), None)

    async def _load(self, registration: Registration, name: str, no_room: dict[str, str]) -> str | None:
        pod = self._view.pods.get(name)
        if pod is None:
            return None
        idle_ms = min((copy.record.age_ms for copy in self._view.known(registration.model_id)), default=0)
        reply = await self._ask(registration, pod, idle_ms, expected=0, reason="its content was reloaded")
        if isinstance(reply, str):
            return reply
        match reply.WhichOneof("outcome"):
            case "loaded" if reply.loaded.generation < registration.record.generation:
                no_room[name] = f"the agent of {name} is of a version that cannot reload a model in place"
            case "refused" if reply.refused.reason in _NO_ROOM:
                no_room[name] = f"{name}: {reply.refused.text}"
            case "refused":
                return f"{name}: {reply.refused.text}"
            case "failed":
                return f"{name}: {reply.failed.text}"
        return None

    async def _load_elsewhere(self, registration: Registration, why: str) -> str | None:
        known = list(self._view.known(registration.model_id))
        record = registration.record
        sizes = (Footprint(copy.record.host_bytes, copy.record.device_bytes) for copy in known)
        size = next((size for size in sizes if size.total_bytes), Footprint(record.host_bytes, record.device_bytes))
        idle_ms = min((copy.record.age_ms for copy in known), default=0)
        holders = {copy.pod.name: "holds a copy already" for copy in known}
        chosen = self._choose(registration, size, holders, idle_ms)
        if chosen.pod is None:
            return f"{why}; and elsewhere: {chosen.why}"
        pod = self._view.pods[chosen.pod]
        reason = f"its content was reloaded: {chosen.why}"
        reply = await self._ask(registration, pod, idle_ms, expected=len(known), reason=reason)
        if isinstance(reply, str):
            return reply
        match reply.WhichOneof("outcome"):
            case "refused":
                return f"{why}; and {chosen.pod}: {reply.refused.text}"
            case "failed":
                return f"{chosen.pod}: {reply.failed.text}"
        return None

    async def _ask(
        self, registration: Registration, pod: Pod, idle_ms: int, *, expected: int, reason: str
    ) -> agent_pb2.LoadReply | str:
        """The agent's answer; why there is none."""
        record = registration.record
        pinned = bool(self._limits().of(record.type, record.limits).pinned)
        request = load_request(
            registration,
            idle_ms=idle_ms,
            reason=reason,
            pinned=pinned,
            expected_copies=expected,
            generation=record.generation,
        )
        try:
            reply = await asking.load(
                pod,
                request,
                agents=self._agents,
                debits=self._debits,
                footprint=Footprint(record.host_bytes, record.device_bytes),
                now_ms=_now_ms,
                timeout=_LOAD_TIMEOUT,
            )
        except Unreachable as error:
            return error.text
        if reply.WhichOneof("outcome") == "loaded":
            told = reply.loaded
            self._view.loaded(
                registration.model_id,
                pod,
                told.incarnation,
                registration.created,
                told.host_bytes,
                told.device_bytes,
                told.generation,
                told.digest,
            )
        return reply

    async def _unload(self, registration: Registration, name: str, why: str) -> str | None:
        pod = self._view.pods.get(name)
        if pod is None:
            return None
        request = agent_pb2.UnloadRequest(
            model_id=registration.model_id,
            create_revision=registration.created,
            reason=f"its content was reloaded: {why}, and here is no room for both",
        )
        try:
            await self._agents.unload(pod, request, timeout=_UNLOAD_TIMEOUT)
        except Unreachable as error:
            return error.text
        return None

    # --- what is told ---

    async def _finish(self, model_id: str, generation: int | None) -> None:
        """Takes the key away, unless the model was reloaded again meanwhile."""
        key = self._keys.reload(model_id)
        kv = await self._etcd.get(key)
        if kv is None or (generation is not None and _generation(kv.value) > generation):
            return
        if (await self._etcd.txn([modified(key, kv.mod_revision)], [delete_op(key)])).succeeded:
            log.info("reloaded", model=model_id, generation=generation)
            self._on_done(model_id)

    async def _failed(self, registration: Registration, why: str) -> None:
        """Leaves the model alone for a while, and writes down why."""
        model_id, generation = registration.model_id, registration.record.generation
        _, before = self._resting.get((model_id, generation), (0.0, 0.0))
        rest = min(max(REST, 2 * before), REST_MOST)
        self._resting[model_id, generation] = (time.monotonic() + rest, rest)
        log.warning("a model's new content was not loaded; its old copies go on", model=model_id, why=why, rest=rest)
        key = self._keys.reload(model_id)
        kv = await self._etcd.get(key)
        if kv is None or _generation(kv.value) != generation:
            return
        told = Reload(generation, why).encode()
        if told != kv.value:
            await self._etcd.txn([modified(key, kv.mod_revision)], [put_op(key, told)])


def _generation(value: bytes) -> int:
    try:
        return Reload.decode(value).generation
    except ValueError as error:
        log.warning("a reload in etcd cannot be read", error=str(error))
        return 0


def _now_ms() -> int:
    return int(time.monotonic() * 1000)
