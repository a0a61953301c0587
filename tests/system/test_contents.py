"""One content per registration, with real processes: files that are replaced, and reloads while clients call."""

import asyncio

import numpy as np
import pytest

from tests.support import models
from tests.support.localmesh import Client, LocalMesh
from tests.support.waiting import until

ONE = np.ones((1, 1), np.float32)


class Callers:
    """Concurrent callers that call a model again and again until the test ends them, and record each answer and each
    failure."""

    def __init__(self, mesh: LocalMesh, width: int = 4) -> None:
        self.answers: list[float] = []  # answers in the order of their arrival
        self.errors: list[str] = []
        self._client = Client(mesh.channel())
        self._width = width
        self._ended = False

    async def __aenter__(self) -> "Callers":
        self._tasks = [asyncio.ensure_future(self._run()) for _ in range(self._width)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._ended = True
        await asyncio.gather(*self._tasks)

    async def _run(self) -> None:
        while not self._ended:
            try:
                (answer,) = await self._client.infer("m", x=ONE)
                self.answers.append(answer.item())
            except Exception as error:
                self.errors.append(repr(error))
            await asyncio.sleep(0.005)

    async def only(self, value: float) -> None:
        """Waits for some answers, and checks that all of them are the value, except answers to calls that were in
        flight."""
        self.answers.clear()
        await until(lambda: len(self.answers) > 4 * self._width, why=lambda: f"answers; {self.errors[:3]}")
        # One call of each caller may have been answered before.
        assert set(self.answers[self._width :]) == {value}


@pytest.mark.long
async def test_copies_of_one_registration_hold_one_content_until_it_is_reloaded(a_mesh):
    """A file that is replaced after the first load is not used before a reload. The test reloads a model in two pods,
    then with a broken file, then while a pod is killed, and then in the one remaining pod. No call fails, and every
    answer comes from the old or the new content."""
    async with a_mesh(pods=2) as mesh:
        path = mesh.write("m.onnx", models.constant(1.0))
        await mesh.rest("PUT", "/mesh/v1/models/m", {"type": "onnx", "path": str(path)})

        async def reload(value: float) -> None:
            mesh.write("m.onnx", models.constant(value))
            assert (await mesh.rest("POST", "/mesh/v1/models/m/reload")).status == 200

        async def moved(callers: Callers, old: float, new: float, *, generation: int, copies: int) -> None:
            async def there() -> bool:
                told = await mesh.status("m")
                found = [(c["generation"], c["digest"]) for c in told["copies"] if c["status"] == "LOADED"]
                return told["reload"] is None and found == [(generation, told["digest"])] * copies

            await until(there, timeout=40, interval=0.1, why=lambda: mesh.routers[0].tail())
            assert set(callers.answers) <= {old, new}
            await callers.only(new)
            assert callers.errors == []

        async with Callers(mesh) as callers:
            await callers.only(1.0)
            first = (await mesh.status("m"))["digest"]

            # The file is replaced: a further copy is refused, and the error says how to go on.
            mesh.write("m.onnx", models.constant(2.0))
            await mesh.rest("PATCH", "/mesh/v1/models/m", {"min_copies": 2})

            async def refused() -> bool:
                return any("mesh reload" in text and first in text for text in (await mesh.status("m"))["errors"])

            await until(refused, timeout=40, interval=0.1, why=lambda: mesh.routers[0].tail())
            assert [copy["digest"] for copy in (await mesh.status("m"))["copies"]] == [first]
            assert set(callers.answers) == {1.0}
            await reload(2.0)
            await moved(callers, 1.0, 2.0, generation=1, copies=2)
            await reload(3.0)
            await moved(callers, 2.0, 3.0, generation=2, copies=2)

            # The new content cannot be loaded: the old copies continue to serve.
            mesh.write("m.onnx", b"no model")
            await mesh.rest("POST", "/mesh/v1/models/m/reload")

            async def told() -> bool:
                return bool(((await mesh.status("m"))["reload"] or {}).get("why"))

            await until(told, timeout=40, interval=0.1, why=lambda: mesh.routers[0].tail())
            await callers.only(3.0)

            # A pod is killed during a reload; then the remaining pod reloads.
            await reload(4.0)
            mesh.pods[1].kill9()
            await moved(callers, 3.0, 4.0, generation=4, copies=1)
            await reload(5.0)
            await moved(callers, 4.0, 5.0, generation=5, copies=1)
