"""Moves of vmodels under constant traffic: no call fails, wherever a vmodel moves.

A vmodel moves through versions as `mesh register --version` makes them. Each version has its own file, and its model is
deleted once it is too old. Some versions are rolled back, some cannot be loaded, and some are replaced before they
serve. Callers call the vmodel all the time through two routers. `make test-vmodels` makes 200 moves, `make test` fewer.
"""

import asyncio
import random
from collections import Counter

import numpy as np
import pytest

from tests.support import twin
from tests.support.localmesh import PAUSE, Client, LocalMesh

CALLERS = 4


class Traffic:
    """Callers that call one vmodel until they are stopped, and record the answers."""

    def __init__(self, mesh: LocalMesh, name: str) -> None:
        self._name = name
        self._clients = [Client(mesh.channel(number % len(mesh.routers))) for number in range(CALLERS)]
        self._done = False
        self.answers: Counter[float] = Counter()
        self.failures: list[str] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Traffic":
        self._tasks = [asyncio.create_task(self._call(client)) for client in self._clients]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._done = True
        await asyncio.gather(*self._tasks)

    async def _call(self, client: Client) -> None:
        one = np.ones((1, 1), np.float32)
        while not self._done:
            try:
                (answer,) = await client.infer(self._name, x=one)
                self.answers[float(answer[0, 0])] += 1
            except Exception as error:
                self.failures.append(str(error))
            await asyncio.sleep(PAUSE)


class Versions:
    """The versions of one alias over REST, numbered from 1. Each version's model answers its number."""

    def __init__(self, mesh: LocalMesh, name: str, rng: random.Random) -> None:
        self._mesh, self._name, self._rng = mesh, name, rng
        self._number = 0
        self._bad: set[int] = set()  # versions that cannot be loaded
        self.active = 0  # the version that serves

    def _model(self, number: int, **words: object) -> dict[str, object]:
        text = twin.name(value=number, **words)
        path = self._mesh.write(f"{self._name}/{number}/{text}", twin.content(text))
        return {"type": "fake", "path": path.as_uri()}

    async def _put(self, **body: object) -> dict[str, object]:
        router = self._rng.randrange(len(self._mesh.routers))
        reply = await self._mesh.rest("PUT", f"/mesh/v1/aliases/{self._name}", body, router=router)
        assert reply.status in (200, 201), reply.body
        return reply.json

    async def release(self, **words: object) -> None:
        """Moves to a new version, and waits until it serves."""
        self._number += 1
        found = await self._put(version=str(self._number), model=self._model(self._number, **words), sync=True, wait=60)
        assert (found["status"], found["version"]) == ("DEFINED", str(self._number)), found
        self.active = self._number

    async def release_slow(self) -> None:
        """Moves to a version whose load takes a while."""
        await self.release(load="0.2s")

    async def release_bad(self) -> None:
        """Tries to move to a version that cannot be loaded, and goes back to the version that served before."""
        self._number += 1
        self._bad.add(self._number)
        found = await self._put(version=str(self._number), model=self._model(self._number, fail="bad"), sync=True)
        assert (found["status"], found["version"]) == ("TRANSITION_FAILED", str(self.active)), found
        assert "bad" in str(found["why"])
        await self.back(to=self.active)

    async def release_two(self) -> None:
        """Starts a move to a version, and moves to the next one before the first serves."""
        self._number += 1
        await self._put(version=str(self._number), model=self._model(self._number, load="0.3s"))
        await self.release()

    async def back(self, to: int = 0) -> None:
        """Rolls back to version `to`, or to the previous one if there is one. If the previous one cannot be loaded,
        returns to the active one."""
        body: dict[str, object] = {"sync": True, "wait": 60} | ({"version": str(to)} if to else {})
        reply = await self._mesh.rest("POST", f"/mesh/v1/aliases/{self._name}/rollback", body)
        if reply.status == 412 and not to:
            assert "has no version before" in reply.json["error"]
        elif reply.json["status"] == "TRANSITION_FAILED" and not to:
            assert int(reply.json["target_version"]) in self._bad
            await self.back(to=self.active)
        else:
            assert (reply.status, reply.json["status"]) == (200, "DEFINED"), reply.body
            self.active = int(reply.json["version"])

    async def move(self) -> None:
        kinds = (self.release, self.release, self.release_slow, self.release_bad, self.release_two, self.back)
        await self._rng.choice(kinds)()


@pytest.mark.timeout(1200)
async def test_no_call_fails_while_a_vmodel_moves(tmp_path, etcd_server, pytestconfig):
    """No call of four callers fails while the vmodel that they call moves many times: releases, rollbacks, versions
    that cannot be loaded, and moves that the next one overtakes."""
    moves = pytestconfig.getoption("--vmodel-moves", 24)
    seed = pytestconfig.getoption("--vmodel-seed", None) or random.randrange(1 << 32)
    options = {"pods": 2, "routers": 2, "fake": True, "log_level": "info"}
    async with LocalMesh(tmp_path, etcd_server, router_options=["--workers", "1"], **options) as mesh:
        versions = Versions(mesh, "fraud", random.Random(seed))
        await versions.release()
        await versions.release()
        async with Traffic(mesh, "fraud") as traffic:
            for number in range(moves):
                await versions.move()
                assert not traffic.failures, f"after {number} moves, {seed=}: {traffic.failures[:3]}"
        assert not traffic.failures, f"{seed=}: {traffic.failures[:3]}"
        found = (await mesh.rest("GET", "/mesh/v1/aliases/fraud")).json
        listed = (await mesh.rest("GET", "/mesh/v1/models?limit=1000")).json["models"]
    assert found["version"] == str(versions.active)
    assert {model["id"] for model in listed} == set(found["versions"].values())
    print(f"{moves} moves, {sum(traffic.answers.values())} calls of {len(traffic.answers)} versions; {seed=}")
