"""The inspection of a model: its copies and the reasons for their places, according to etcd, this router and the
agents, and the progress of its loads."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass

from mesh.schema.modelstatus import ModelStatus
from mesh.statuses import MeshError, Reason
from router.loads.agents import Agent, Unreachable
from router.loads.choosing import Choosing
from router.management import descriptions
from router.management.descriptions import LoadProgress, PullProgress
from router.management.explanation import Explanation, explained
from router.management.requests import check_id
from router.management.status import Reporter, StatusInfo
from router.state.pods import Pod
from router.state.view import View

_DESCRIBE = 2.0  # seconds
_PROGRESS = 1.0  # seconds


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a load in one pod. `pull` is set while the model's files are fetched."""

    load: LoadProgress
    pull: PullProgress | None


class Inspector:
    """The inspector of one worker."""

    def __init__(self, *, view: View, choosing: Choosing, agents: Agent, status: Reporter) -> None:
        self._view = view
        self._choosing = choosing
        self._agents = agents
        self._status = status

    async def explain(self, model_id: str, readable: Callable[[str], bool] = lambda _: True) -> Explanation:
        """Returns the pods that have a model, or that would load it, with the reasons. Hides the ids of other models
        that are not `readable`. Raises BAD_REQUEST, UNKNOWN_MODEL, INTERNAL if the record cannot be decoded,
        REGISTRY_AWAY."""
        check_id(model_id)
        seen = await self._status.look(model_id)
        if seen.registration is None:
            raise MeshError(Reason.UNKNOWN_MODEL, f"model {model_id} is not registered")
        record = seen.registration.record
        return explained(
            seen.registration,
            self._status.info(seen.registration, seen),
            lambda excluded: self._choosing.choose(model_id, record, excluded=excluded),
            size=self._choosing.footprint_of(seen.registration.record).total_bytes,
            decisions={
                pod: [descriptions.without(text, lambda one: one == model_id or readable(one)) for text in texts]
                for pod, texts in (await self._decisions(model_id)).items()
            },
        )

    async def _decisions(self, model_id: str) -> dict[str, list[str]]:
        async def ask(name: str) -> tuple[str, list[str]]:
            try:
                reply = await self._agents.describe(self._view.pods[name], model_id, timeout=_DESCRIBE)
            except (Unreachable, KeyError):
                return name, []
            # An agent keeps the reason for a load as long as the copy; decisions are forgotten after a while.
            loads = [
                json.dumps({"what": "load", "models": [model_id], "why": copy.reason, "ago_ms": copy.age_ms})
                for copy in reply.copies
                if copy.reason and copy.state == "loaded"
            ]
            return name, [*loads, *reply.decisions]

        return dict(await asyncio.gather(*(ask(name) for name in list(self._view.pods))))

    async def progress(self, model_id: str, status: StatusInfo) -> dict[str, Progress]:
        """Returns the progress of the model's loads, by pod. Pods that do not answer are left out."""
        found: dict[str, Progress] = {}

        async def ask(pod: Pod) -> None:
            try:
                reply = await self._agents.describe(pod, model_id, timeout=_PROGRESS)
            except Unreachable:
                return
            for copy in reply.copies:
                if (load := descriptions.load(copy)) is not None:
                    found[pod.name] = Progress(load, descriptions.pull(copy))

        loading = {info.pod for info in status.copies if info.status is ModelStatus.LOADING}
        await asyncio.gather(*(ask(pod) for name in loading if (pod := self._view.pods.get(name)) is not None))
        return found
