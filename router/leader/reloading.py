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
from collections.abc import Callable

from mesh.etcd import Etcd, EtcdError, delete_op, modified, put_op
from mesh.etcd.ranges import after_prefix
from mesh.process.tasks import Tasks
from mesh.schema.keys import Keys
from mesh.schema.records import Reload
from mesh.statuses import MeshError
from mesh.telemetry import logs
from placement import reload
from router.leader.orders import Orders
from router.leader.reloadsteps import Choose, Move, Steps
from router.state.registry import Registration, Registry
from router.state.view import View

log = logs.get(__name__)

PATIENCE = 20.0
"""Seconds after which a move that waits for pods says so, and begins again after a rest. Two lease times."""

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


class Reloading:
    """One leader's."""

    def __init__(
        self,
        *,
        view: View,
        orders: Orders,
        registry: Registry,
        etcd: Etcd,
        keys: Keys,
        choose: Choose,
        idle_ms: Callable[[str], int | None] = lambda _: None,
        on_done: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`idle_ms` tells the time since a model's last use, as agents told it last, None where they did not mention
        it; `on_done` is called with each model whose copies have all moved."""
        self._view = view
        self._registry = registry
        self._etcd = etcd
        self._keys = keys
        self._steps = Steps(view=view, orders=orders, choose=choose, idle_ms=idle_ms)
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
                try:
                    asked[self._keys.reload_of(kv.key)] = Reload.decode(kv.value).generation
                except ValueError as error:
                    log.warning("a reload in etcd cannot be read", key=kv.key, error=str(error))
        now = time.monotonic()
        mixed: dict[str, int] = {}
        if now - self._looked_at >= MIXED_EVERY:
            self._looked_at, mixed = now, self._mixed()
        for model_id, generation in {**mixed, **asked}.items():
            until, _ = self._resting.get((model_id, generation), (0.0, 0.0))
            if model_id not in self._moves and until <= now:
                task = self._moves[model_id] = self._tasks.start(self._move(model_id, generation), f"reload {model_id}")
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

    async def _move(self, model_id: str, generation: int) -> None:
        """`generation` is what was asked for; the record says what is to be had by now."""
        move = Move()
        async with self._turns:
            try:
                while True:
                    registration = await self._registry.read(model_id, fresh=True)
                    if registration is None:
                        await self._finish(model_id, None)
                        return
                    held, latest = self._steps.held(registration, move), registration.record.generation
                    todo = reload.step(held, latest, move.no_room)
                    if todo.done:
                        await self._finish(model_id, latest)
                        return
                    why = await self._steps.take(registration, todo, move)
                    if why is None and time.monotonic() - move.began > PATIENCE:
                        why = move.waits_for or (None if todo.beside or todo.elsewhere or todo.unload else todo.why)
                    if why is not None:
                        await self._failed(registration, why)
                        return
                    await asyncio.sleep(_LOOK)
            except (EtcdError, MeshError) as error:
                self._resting[model_id, generation] = (time.monotonic() + REST, 0.0)
                log.info("a reload is put off", model=model_id, why=str(error))

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
