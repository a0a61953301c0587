"""GPU pods and CPU pods in one mesh, with a fake device: accounting, evictions, and the placement of models that may
not fit.

tests/gpu tests a real device.
"""

import grpc
import numpy as np
import pytest

from mesh.statuses import Reason
from tests.support.localmesh import Client
from tests.support.waiting import until

ONE = np.ones((1, 1), np.float32)
GPU = {"pod-1": ["--device", "cuda", "--device-capacity", "100MiB"]}
CONSTRAINTS = {"net": {"preferred": ["gpu"]}, "strict": {"required": ["gpu"]}}
MIB = 1 << 20


async def test_a_device_fills_and_empties_and_falls_back_to_the_cpu(a_mesh):
    """A device's memory is accounted separately from the host's. A full device evicts for models that need it, and
    leaves the others to CPU pods."""
    async with a_mesh(pods=2, fake=True, capacity="200MiB", edge="grpc", options_of=GPU) as mesh:
        assert (await mesh.rest("PUT", "/mesh/v1/settings/type_constraints", CONSTRAINTS)).status == 200
        client = Client(mesh.channel())

        async def call(model_id: str, timeout: float = 30) -> float:
            (answer,) = await client.infer(model_id, timeout=timeout, x=ONE)
            return float(answer[0, 0])

        async def holders() -> dict[str, list[str]]:
            return {pod: await holders_of(mesh, pod) for pod in ("pod-1", "pod-2")}

        async def register(model_id: str, type: str, value: int, device: str) -> None:
            await mesh.register_fake(model_id, type=type, value=value, size="1MiB", device=device)

        for number, name in enumerate(("a", "b", "c")):
            await register(name, "net", number, "40MiB")
            if number < 2:  # the router may not have received the constraints yet
                await until(lambda name=name: _would_go(mesh, name, "pod-1"), why=f"{name} would go to pod-1")
            assert await call(name) == number
            # The router must know the pods' new figures before it chooses again.
            await until(lambda number=number: _used(mesh, number), why=f"{number + 1} copies published")
        assert await holders() == {"pod-1": ["a", "b"], "pod-2": ["c"]}
        on_gpu, on_cpu = (await mesh.rest("GET", "/mesh/v1/pods")).json["pods"]
        assert (on_gpu["device_capacity"], on_gpu["device_used"], on_gpu["used"]) == (100 * MIB, 80 * MIB, 2 * MIB)
        assert (on_cpu["device_capacity"], on_cpu["used"]) == (0, 41 * MIB)
        assert (set(on_gpu["labels"]), set(on_cpu["labels"])) == ({"gpu"}, {"cpu"})

        # A strict model may go nowhere else, so the device evicts its least recently used copy, though host memory is
        # free.
        await register("d", "strict", 7, "40MiB")
        assert await call("d") == 7
        assert await holders() == {"pod-1": ["b", "d"], "pod-2": ["c"]}

        # A model that no device can hold, and a model that fills a device.
        await register("large", "strict", 8, "101MiB")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call("large")
        assert refused.value.code().value[0] == Reason.NOWHERE.code
        assert "101 MiB of device memory" in refused.value.details()
        assert await holders() == {"pod-1": ["b", "d"], "pod-2": ["c"]}
        await register("all of it", "strict", 9, "100MiB")
        assert await call("all of it") == 9
        assert await holders() == {"pod-1": ["all of it"], "pod-2": ["c"]}

        # Without its pod, a model that only prefers a GPU is served by a CPU. One that requires it waits a while for a
        # pod to come back; `explain` says what the other pod lacks.
        await mesh.pods[0].stop()
        await until(lambda: _pods(mesh, 1), why="the pod has gone")
        assert await call("b") == 1
        assert (await holders_of(mesh, "pod-2")) == ["b", "c"]
        with pytest.raises(grpc.aio.AioRpcError) as late:
            await call("d", timeout=1)
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        told = (await mesh.rest("GET", "/mesh/v1/models/d/explain")).json
        assert "lacks the label gpu" in str(told)


async def holders_of(mesh, pod: str) -> list[str]:
    copies = (await mesh.rest("GET", f"/mesh/v1/pods/{pod}")).json["copies"]
    return sorted(copy["model_id"] for copy in copies if copy["state"] == "loaded")


async def _would_go(mesh, model_id: str, pod: str) -> bool:
    told = (await mesh.rest("GET", f"/mesh/v1/models/{model_id}/explain")).json
    return told["ranking"][0]["pod"] == pod and "prefer" in str(told["ranking"][0])


async def _used(mesh, number: int) -> bool:
    """Returns whether the pods have published all copies of the models up to that number, with their sizes."""
    on_gpu, on_cpu = (await mesh.rest("GET", "/mesh/v1/pods")).json["pods"]
    held = on_gpu["device_used"] == min(number + 1, 2) * 40 * MIB and on_cpu["copies"] == (number == 2)
    return held and not on_gpu["loading"] and not on_cpu["loading"]


async def _pods(mesh, count: int) -> bool:
    return len((await mesh.rest("GET", "/mesh/v1/pods")).json["pods"]) == count


async def test_more_is_asked_of_a_device_than_it_has(a_mesh):
    """A pod whose device capacity exceeds its device's memory does not start, and reports both sizes."""
    mesh = a_mesh(pods=1, fake=True, options_of={"pod-1": ["--device", "cuda", "--device-capacity", "2TiB"]})
    (pod,) = mesh.pods
    pod.start()
    try:
        await until(lambda: pod.process.poll() is not None, why="the pod's process ends")
        assert "2.0 TiB requested for models, but of the device's 1.0 TiB, models can use only 973 GiB" in pod.tail()
    finally:
        await pod.stop()
