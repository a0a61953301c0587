"""Replacement of pods under traffic, unnoticed by callers, with models whose loads take a while (`tests.support.twin`).

A copy must be loaded elsewhere before it is evicted. If it is not, a caller has to wait, and the router counts a cold
start, whatever the outcome of the call.
"""

import asyncio
import signal

import numpy as np
import pytest
import pytest_asyncio

from tests.support.localmesh import Client, LocalMesh, Program
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

ONE = np.ones((1, 1), np.float32)
VALUES = {f"m{number}": float(number) for number in range(9)}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory, etcd_server):
    """Three pods, each with room for all models. All models have been called."""
    folder = tmp_path_factory.mktemp("rollout")
    options = ["--drain-timeout", "30", "--load-concurrency", "3"]
    async with LocalMesh(
        folder, etcd_server, pods=3, fake=True, capacity="100MiB", runtime_options=options, log_level="info"
    ) as mesh:
        # One copy each: a hot model would have two, and nothing to hand over.
        await mesh.rest("PUT", "/mesh/v1/settings/type_limits", {"_default": {"max": 1}})
        for name, value in VALUES.items():
            await mesh.register_fake(name, size="10MiB", value=value, load="0.2s")
        client = Client(mesh.channel())
        for _ in range(2):
            await asyncio.gather(*(client.infer(name, x=ONE) for name in VALUES))
        yield mesh


class Traffic:
    """Sequential calls of all models, whose answers are checked. `nobody_noticed` fails if a call failed or had to wait
    for a load."""

    def __init__(self, mesh: LocalMesh) -> None:
        self.rounds = 0
        self.errors: list[str] = []
        self._mesh = mesh
        self._ended = False

    async def __aenter__(self) -> "Traffic":
        self._before = await self._mesh.stats()
        self._task = asyncio.ensure_future(self._run())
        await self.some()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._ended = True
        await self._task

    async def _run(self) -> None:
        client = Client(self._mesh.channel())
        while not self._ended:
            for name, value in VALUES.items():
                try:
                    (answer,) = await client.infer(name, x=ONE)
                    if answer.item() != value:
                        self.errors.append(f"{name}: {answer.item()} instead of {value}")
                except Exception as error:
                    self.errors.append(f"{name}: {error!r}")
                await asyncio.sleep(0.01)  # leaves CPU time to the pods that start
            self.rounds += 1

    async def some(self) -> None:
        """Waits until every model has been called a few more times."""
        end = self.rounds + 3
        await until(lambda: self.rounds >= end, timeout=30, why="traffic goes on")

    async def nobody_noticed(self) -> None:
        after = await self._mesh.stats()
        assert self.errors == []
        assert after["cold_starts"] == self._before["cold_starts"], "a call waited for a load"
        assert after["loads"] == self._before["loads"], "a call had a model loaded"


async def ended(pod: Program) -> None:
    await until(lambda: pod.process.poll() is not None, timeout=40, why=lambda: f"{pod.name} leaves\n{pod.tail()}")
    assert pod.process.returncode == 0, pod.tail()


async def holders(mesh: LocalMesh) -> dict[str, list[str]]:
    listed = (await mesh.rest("GET", "/mesh/v1/models?limit=100")).json["models"]
    return {model["id"]: model["pods"] for model in listed}


@pytest.mark.long
async def test_a_rolling_restart_is_not_noticed(mesh):
    """Callers do not notice a rolling restart, in which each pod ends before its replacement starts."""
    async with Traffic(mesh) as traffic:
        for pod in mesh.pods:
            pod.signal(signal.SIGTERM)
            await ended(pod)
            await traffic.some()
            pod.start()
            await mesh.ready()
            await traffic.some()
        await traffic.nobody_noticed()
    assert all((await holders(mesh)).values())
    for pod in mesh.pods:
        told = (await mesh.rest("GET", f"/mesh/v1/pods/{pod.name}")).json
        assert told["counters"]["evictions"] == 0


async def test_several_pods_that_leave_at_once_are_not_noticed(mesh):
    """Callers do not notice several pods leaving at once: all models move straight to the pod that stays, none of them
    to another leaving pod."""
    async with Traffic(mesh) as traffic:
        for pod in mesh.pods[:2]:
            pod.signal(signal.SIGTERM)
        for pod in mesh.pods[:2]:
            await ended(pod)
        await traffic.some()
        await traffic.nobody_noticed()
    assert await holders(mesh) == {name: ["pod-3"] for name in VALUES}
    counters = (await mesh.rest("GET", "/mesh/v1/pods/pod-3")).json["counters"]
    assert counters["loads"] <= len(VALUES)
