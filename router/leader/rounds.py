"""The leader's rounds. In each round, every few seconds, the leader observes the mesh, has `placement` make a plan, and
begins to carry out the plan.

If no other load is more urgent, the most recently used models are loaded into free memory (`warming`). Meanwhile,
draining pods are emptied (`handover`). Another leader can take over at any moment.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

from mesh.etcd import Etcd, EtcdError
from mesh.pb import agent_pb2
from mesh.process.tasks import turned
from mesh.schema.keys import Keys
from mesh.schema.records import ModelRecord
from mesh.telemetry import logs
from placement import choice, copies
from placement.actions import ActionKind, Plan
from placement.constraints import NONE
from placement.copies import UNLIMITED, CopyLimits, ScaledModel
from placement.debits import Debits
from placement.footprint import Footprint
from placement.pod import Candidate as Candidate
from router.leader import handover
from router.leader.carrying import Carrying
from router.leader.handover import Handover
from router.leader.moving import Loads
from router.leader.observing import Observation, Observer
from router.leader.orders import Orders
from router.leader.recency import Recency
from router.leader.reloading import Reloading
from router.leader.transitions import Records, Transitions
from router.leader.warming import Warming
from router.loads.agents import Agent
from router.state.dynamic import Current
from router.state.pods import Copy
from router.state.registry import Registration, Registry
from router.state.view import View
from router.vmodels.store import VModelStore

log = logs.get(__name__)

INTERVAL = 2.0
"""Seconds between two rounds."""

SOON = 0.3
"""Seconds between two rounds while plans are being carried out, so that routers can learn of new copies in between."""

REMEMBER = 60.0
"""Seconds between two writes of the list of the most recently used models."""

_LAST_WORDS = 1.0  # seconds for recording the last uses before leadership ends
_AGAIN = 5.0  # seconds before a retry when etcd did not answer
_LOST = 600.0  # seconds for which a model lost with its pod is remembered
_OLD_MS = 600_000  # the assumed age of a copy that its agent does not report


class Rounds:
    """The rounds of one router while it leads. `settings` returns the settings that change while the mesh runs;
    `failure_expiry` is in seconds."""

    def __init__(
        self,
        *,
        view: View,
        agents: Agent,
        registry: Registry,
        etcd: Etcd,
        keys: Keys,
        settings: Callable[[], Current],
        records: Records,
        store: VModelStore,
        failure_expiry: float = 900.0,
    ) -> None:
        self._view = view
        self._settings = settings
        self._debits = Debits()
        self._observer = Observer(view=view, agents=agents, etcd=etcd, keys=keys)
        orders = Orders(view=view, agents=agents, limits=lambda: settings().limits, debits=self._debits)
        self.carrying = Carrying(view=view, registry=registry, orders=orders)
        self.reloading = Reloading(
            view=view,
            orders=orders,
            registry=registry,
            etcd=etcd,
            keys=keys,
            choose=self._choose,
            idle_ms=lambda model_id: self._idle.get(model_id),
            on_done=self.carrying.wake,
        )
        self.transitions = Transitions(
            records=records,
            loads=Loads(
                view=view,
                orders=orders,
                choose=self._choose,
                idle_ms=lambda model_id: self._idle.get(model_id),
                maximum=lambda registration: self._maximum(registration.record),
            ),
            registry=registry,
            store=store,
        )
        self._recency = Recency(etcd, keys)
        self._known = False  # whether an earlier leader's list of last uses was read
        self._warming = Warming(
            view=view,
            observer=self._observer,
            recency=self._recency,
            carrying=self.carrying,
            failure_expiry=failure_expiry,
        )
        self._loop = asyncio.get_running_loop()
        self._holders: dict[str, set[str]] = {}  # by model: the pods that had it at the last round
        self._types: dict[str, str] = {}  # of the same models
        self._idle: dict[str, int] = {}  # ms, of the models in the latest reports
        self._lost: dict[str, tuple[float, int, str]] = {}  # models lost with a pod: when, idle time then, and type
        self._handover = Handover(
            view=view,
            observer=self._observer,
            carrying=self.carrying,
            candidates=self._candidates,
            settings=settings,
            idle=lambda: self._idle,
        )
        self._unmet: dict[str, str] = {}
        self._news = asyncio.Event()  # a planned action has ended

    async def lead(self) -> None:
        """Makes plans and carries them out, reloads models and moves vmodels, until cancelled."""
        self._known = False  # another leader may have led meanwhile, and knows more uses
        try:
            async with asyncio.TaskGroup() as beside:  # if one of them fails, leading fails
                beside.create_task(self._remember_uses(), name="remember uses")
                beside.create_task(self.reloading.run(), name="reloads")
                beside.create_task(self.transitions.run(), name="moves of vmodels")
                await self._plan()
        finally:
            await self._handover.close()
            await self.reloading.close()  # the next leader continues
            await self.transitions.close()  # likewise
            with contextlib.suppress(EtcdError, TimeoutError):
                async with asyncio.timeout(_LAST_WORDS):
                    await self._note_uses()  # for the next leader, or for the mesh after a restart

    async def _plan(self) -> None:
        while True:
            self._handover.begin()
            turned()
            try:
                await self.round()
            except EtcdError as error:
                log.info("planning is postponed: etcd is unavailable", why=error.detail)
            await self._pause()

    async def _pause(self) -> None:
        """Waits between two rounds. The wait is shorter if a pod begins to drain or a planned action has ended."""
        began = self._loop.time()
        self._news.clear()
        while self._loop.time() < began + INTERVAL:
            if self._handover.due():
                return
            if self._news.is_set() and self._loop.time() > began + SOON:
                return
            await asyncio.sleep(handover.LOOK)

    async def round(self) -> Plan:
        """Observes and plans once, then begins to carry out the plan. Raises EtcdError."""
        seen = await self._observer.observe()
        self._remember(seen)
        settings = self._settings()
        pods = self._candidates()
        models = list(self._models(seen, settings))
        # In a thread: 20,000 models take a quarter of a second, and this process also serves the feed.
        avoided = self.carrying.avoided()
        plan = await asyncio.to_thread(copies.plan, models, pods, constraints=settings.constraints, avoided=avoided)
        if not plan.put_off and not any(action.kind is ActionKind.LOAD for action in plan.actions):
            more = await self._warming.plan(pods, settings, wanted=lambda model: model in self._lost)
            plan = replace(plan, actions=(*plan.actions, *more.actions))
        self._tell(plan)
        for task in self.carrying.begin(plan.actions):
            # The former pod of a moved copy unloads it, and a new copy may change the next plan.
            task.add_done_callback(lambda _: self._news.set())
        self._pin(seen, settings)
        return plan

    async def _remember_uses(self) -> None:
        """Reads an earlier leader's list of recently used models, and keeps it up to date."""
        while True:
            try:
                if not self._known:
                    await self._recency.load()
                    self._known = True
                await self._note_uses()
            except EtcdError as error:
                log.info("last uses are not noted: etcd is unavailable", why=error.detail)
                await asyncio.sleep(_AGAIN)
                continue
            await asyncio.sleep(REMEMBER)

    async def _note_uses(self) -> None:
        if self._known:  # else the earlier list would be lost
            async for idle in self._observer.all_idle():
                self._recency.note(idle)  # at once, not after all pods: that would make these uses seem later
            await self._recency.save()

    async def close(self) -> None:
        """Ends the handovers, reloads and moves under way, and the requests to agents."""
        await self._handover.close()
        await self.reloading.close()
        await self.transitions.close()
        await self.carrying.close()

    # --- input of plans ---

    def _candidates(self) -> list[Candidate]:
        now = self._loop.time()
        return self._debits.apply(self._view.candidates(now, ""), int(now * 1000))

    def _choose(
        self, registration: Registration, size: Footprint, excluded: Mapping[str, str], idle_ms: int
    ) -> choice.Choice:
        """Chooses a pod for a copy of a reloaded model whose own pods have no room, or of a vmodel's target."""
        holders = {copy.pod.name for copy in self._view.known(registration.model_id)}
        constraints, pods = self._settings().constraints, self._candidates()
        model_type = registration.record.type
        labels = {pod.labels for pod in pods}
        return choice.choose(
            registration.model_id,
            size,
            pods,
            excluded={**self.carrying.avoided(), **excluded},
            idle_ms=idle_ms,
            model_type=model_type,
            constraint=constraints.of(model_type),
            preferences=constraints.preferences(model_type, labels) if constraints is not NONE else None,
            zones=[pod.zone for pod in pods if pod.name in holders],
        )

    def _maximum(self, record: ModelRecord) -> int | None:
        """Returns the largest number of copies that a model may have, or None for no limit."""
        return self._settings().limits.of(record.type, record.limits).maximum

    def _remember(self, seen: Observation) -> None:
        """Remembers the models that were lost with a pod, and the idle times that agents have reported."""
        now = self._loop.time()
        holders = {model: {copy.pod.name for copy in self._view.known(model)} for model in self._view.models()}
        for model, before in self._holders.items():
            # A withdrawn copy is not lost; a copy is lost if its pod has disappeared.
            if model not in holders and any(name not in self._view.pods for name in before):
                self._lost[model] = (now, self._idle.get(model, _OLD_MS), self._types.get(model, ""))
        for model in [m for m, (at, _, _) in self._lost.items() if now - at > _LOST or m in holders]:
            del self._lost[model]
        self._holders = holders
        self._types = {model: _type_of(self._view.known(model)) for model in holders}
        idle: dict[str, int] = {}
        for (model, _), state in seen.copies.items():
            idle[model] = min(idle.get(model, state.idle_ms), state.idle_ms)
        self._idle = idle

    def _models(self, seen: Observation, settings: Current) -> Iterator[ScaledModel]:
        """Yields the models that a plan may affect: those in agents' reports, those lost with a pod, those with several
        copies or with limits of their own, and all if there are constraints."""
        mentioned = {model for model, _ in seen.copies}
        loading = self.carrying.loading()
        for model_id in dict.fromkeys((*self._view.models(), *seen.wanted, *self._lost)):
            known = tuple(self._view.known(model_id))
            registration = seen.wanted.get(model_id)
            record = registration.record if registration is not None else None
            if not (
                model_id in mentioned
                or len(known) > 1
                or record is not None
                or model_id in self._lost
                or settings.constraints is not NONE
            ):
                continue
            if record is not None and record.quarantined:
                continue
            lost = self._lost.get(model_id)
            if record is not None:
                model_type = record.type
            else:
                model_type = _type_of(known) or (lost[2] if lost is not None else "")
            limits = settings.limits.of(model_type, record.limits if record is not None else UNLIMITED)
            standing = [self._copy(copy, seen.copies.get((model_id, copy.pod.name))) for copy in known]
            names = {copy.pod for copy in standing}
            standing += [copies.ReportedCopy(pod, False) for m, pod in loading if m == model_id and pod not in names]
            idle = self._idle.get(model_id, min((c.record.age_ms for c in known), default=_OLD_MS))
            yield ScaledModel(
                model_id,
                _footprint(known, record),
                tuple(standing),
                model_type,
                lost[1] if lost is not None else idle,
                limits,
                lost is not None,
                self.carrying.resting(model_id),
            )

    @staticmethod
    def _copy(copy: Copy, state: agent_pb2.CopyState | None) -> copies.ReportedCopy:
        if state is None:
            return copies.ReportedCopy(copy.pod.name, copy.loaded, age_ms=_OLD_MS)
        return copies.ReportedCopy(
            copy.pod.name,
            copy.loaded,
            rate=state.rate,
            peak_rate=state.peak_rate,
            in_flight=state.in_flight,
            queue_ms=state.queue_ms,
            age_ms=state.age_ms,
        )

    # --- results ---

    def _tell(self, plan: Plan) -> None:
        for action in plan.actions:
            if (action.model_id, action.pod) not in self.carrying.under_way():
                log.info("planned", what=action.kind.value, model=action.model_id, pod=action.pod, why=action.why)
        unmet = {one.model_id: one.why for one in plan.unmet}
        for model_id, why in unmet.items():
            if model_id not in self._unmet:
                log.info("a wanted copy cannot be loaded", model=model_id, why=why)
        self._unmet = unmet

    def _pin(self, seen: Observation, settings: Current) -> None:
        """Tells agents to pin or unpin copies whose pinning differs from the limits."""
        by_type = settings.limits.default.pinned or any(limits.pinned for limits in settings.limits.types.values())
        pinned = {names for names, state in seen.copies.items() if state.pinned}
        models: Iterable[str] = self._view.models() if by_type else {*seen.wanted, *(model for model, _ in pinned)}
        for model_id in list(models):
            registration = seen.wanted.get(model_id)
            own: CopyLimits = registration.record.limits if registration is not None else UNLIMITED
            for copy in self._view.known(model_id):
                if not copy.callable:
                    continue
                names = (model_id, copy.pod.name)
                wanted = bool(settings.limits.of(copy.record.type, own).pinned)
                if wanted != (names in pinned) and (names in seen.copies or wanted):
                    self.carrying.pin(*names, pinned=wanted)


def _type_of(known: Iterable[Copy]) -> str:
    """Returns the type of a model from the records of its copies, or "" if no record has it."""
    return next((copy.record.type for copy in known if copy.record.type), "")


def _footprint(known: Iterable[Copy], record: ModelRecord | None) -> Footprint:
    """Returns the footprint that was measured for one of the copies, or in an earlier load. It is empty if none was
    measured."""
    for copy in known:
        if copy.record.host_bytes:
            return Footprint(copy.record.host_bytes, copy.record.device_bytes)
    return Footprint(record.host_bytes, record.device_bytes) if record is not None else Footprint()
