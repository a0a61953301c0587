"""The move of a reloaded model's copies to its new content, without a failed call.

A reload increments the generation in the model's record, and writes `reloads/<model>`, in one transaction. The leader
does the rest. Each step follows from the present copies and the generation, so if a leader dies, the next one can
continue. Old and new copies answer until the last old copy is unloaded. Then the key is removed.

If the new content cannot be loaded, the old copies stay, and the key has the reason. The load is retried later, or
immediately when the model is reloaded again.

Copies of two generations are moved even without the key, because a pod may have been away while the others moved.
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
"""Seconds after which a move that waits for pods reports this, and begins again after a back-off. Two lease times."""

INTERVAL = 0.5
"""Seconds between two searches for models to be moved. A search reads a range of keys that is usually empty."""

MIXED_EVERY = 5.0
"""Seconds between two searches of the view for models with copies of several generations."""

AT_ONCE = 16
"""Largest number of models that are moved at the same time."""

REST = 10.0
"""Seconds of back-off for a model whose new content could not be loaded; doubled after each further failure."""

REST_MOST = 600.0
"""Longest back-off of a model, in seconds."""

_LOOK = 0.1  # seconds between two checks of a model that is being moved


class Reloading:
    """The moves of one leader."""

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
        """Begins without moves. `idle_ms` returns the time since a model's last use by the agents' latest reports, or
        None if they did not report it. `on_done` is called with each model whose reload has ended, because its copies
        have moved or because it was unregistered."""
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
        self._looked_at = -math.inf  # when copies of several generations were last looked for

    def moving(self) -> list[str]:
        """Returns the models being moved now."""
        return list(self._moves)

    async def run(self) -> None:
        """Starts the moves that are due, every INTERVAL seconds, until cancelled."""
        while True:
            try:
                await self.round()
            except EtcdError as error:
                log.info("reloads are postponed: etcd is unavailable", why=error.detail)
            await asyncio.sleep(INTERVAL)

    async def round(self) -> None:
        """Starts the moves that are due and whose back-off is over. Raises EtcdError."""
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
        """Returns the models with copies of several generations, each with its latest generation."""
        found = {}
        for model_id in self._view.several():
            known = [copy.record for copy in self._view.known(model_id) if copy.loaded]
            generations = {(record.create_revision, record.generation) for record in known}
            if len(generations) > 1:
                found[model_id] = max(generations)[1]
        return found

    async def close(self) -> None:
        """Stops the moves under way. Agents continue what they were asked to do."""
        await self._tasks.close()

    # --- one model ---

    async def _move(self, model_id: str, generation: int) -> None:
        """Moves the copies of one model. `generation` is the requested generation; the record may have a later one by
        now."""
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
                log.info("a reload is postponed", model=model_id, why=str(error))

    # --- reports ---

    async def _finish(self, model_id: str, generation: int | None) -> None:
        """Removes the reload's key, unless the model was reloaded again meanwhile. `generation` is None if the model is
        no longer registered."""
        key = self._keys.reload(model_id)
        kv = await self._etcd.get(key)
        if kv is None or (generation is not None and _generation(kv.value) > generation):
            return
        if (await self._etcd.txn([modified(key, kv.mod_revision)], [delete_op(key)])).succeeded:
            what = "a model is reloaded" if generation is not None else "a reload has ended: its model is unregistered"
            log.info(what, model=model_id, generation=generation)
            self._on_done(model_id)

    async def _failed(self, registration: Registration, why: str) -> None:
        """Starts a back-off for the model and writes the reason to etcd."""
        model_id, generation = registration.model_id, registration.record.generation
        _, before = self._resting.get((model_id, generation), (0.0, 0.0))
        rest = min(max(REST, 2 * before), REST_MOST)
        self._resting[model_id, generation] = (time.monotonic() + rest, rest)
        log.warning("a model's new content was not loaded; its old copies stay", model=model_id, why=why, rest=rest)
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
