"""Models on a real GPU: they are loaded, called, counted and evicted there. Answers are compared with numpy's.

Memory is measured twice: by the pod and by the driver (NVML).
"""

import asyncio
import os

import numpy as np
import pytest
import pytest_asyncio

from tests.support import models
from tests.support.localmesh import Client, LocalMesh
from tests.support.waiting import until

pytestmark = [pytest.mark.gpu, pytest.mark.asyncio(loop_scope="module")]

MIB = 1 << 20
SMALL, LARGE = 1024, 8192
"""Widths: 4 MiB and 256 MiB of weights."""

CAPACITY = 900 * MIB
"""Room for three of the large models, whatever a session takes besides its weights."""

SLACK = 64 * MIB
"""Bytes that the driver may count besides: it allocates pages of 2 MiB, and libraries keep some for themselves."""

SESSION = 20 * MIB
"""Bytes that a session may take on the device besides its weights."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(nvml, tmp_path_factory, etcd_server):
    """A mesh of two pods; only pod-1 has the GPU. The type `net` prefers the GPU, `strict` requires it, and `plain` may
    not use it."""
    options = {"pod-1": ["--device", "cuda", "--device-capacity", str(CAPACITY)], "pod-2": ["--device", "cpu"]}
    constraints = {"net": {"preferred": ["gpu"]}, "strict": {"required": ["gpu"]}, "plain": {"required": ["cpu"]}}
    async with LocalMesh(
        tmp_path_factory.mktemp("gpu"),
        etcd_server,
        pods=2,
        capacity="4GiB",
        edge="grpc",
        options_of=options,
        runtime_options=["--load-concurrency", "2"],
    ) as made:
        assert (await made.rest("PUT", "/mesh/v1/settings/type_constraints", constraints)).status == 200
        # With the first calls of each thread, the driver and its libraries take memory. It counts for no model.
        await _register(made, "first", 0, SMALL)
        client = Client(made.channel())
        await asyncio.gather(*(_right(client, "first", 0, SMALL) for _ in range(100)))
        await _unregister(made)
        yield made


class Device:
    """The device's memory in use beyond the empty pod's. `sessions` is the largest number of sessions that a test has
    at once."""

    def __init__(self, used) -> None:
        self._used, self._before, self.sessions = used, used(), 6

    def __call__(self) -> int:
        return self._used() - self._before

    def given_back(self) -> bool:
        """Returns whether all memory is given back, except what CUDA keeps for later sessions."""
        return self() < SLACK + self.sessions * SESSION


@pytest_asyncio.fixture(loop_scope="module")
async def device(mesh, nvml):
    """The device, whose memory must all be given back after the test."""
    made = Device(nvml.used)
    yield made
    await _unregister(mesh)
    await until(made.given_back, timeout=30, why=lambda: f"{made()} bytes are kept")


async def _unregister(mesh: LocalMesh) -> None:
    listed = (await mesh.rest("GET", "/mesh/v1/models?limit=1000")).json["models"]
    await asyncio.gather(*(mesh.rest("DELETE", f"/mesh/v1/models/{model['id']}") for model in listed))
    await until(lambda: _empty(mesh), timeout=30, why="the pods are empty")


async def _pods(mesh: LocalMesh) -> list[dict]:
    return (await mesh.rest("GET", "/mesh/v1/pods")).json["pods"]


async def _empty(mesh: LocalMesh) -> bool:
    return not any(pod["copies"] or pod["loading"] for pod in await _pods(mesh))


async def _held(mesh: LocalMesh, pod: str) -> dict[str, dict]:
    """Returns a pod's loaded copies by model."""
    copies = (await mesh.rest("GET", f"/mesh/v1/pods/{pod}")).json["copies"]
    return {copy["model_id"]: copy for copy in copies if copy["state"] == "loaded"}


async def _register(mesh: LocalMesh, model_id: str, seed: int, width: int, type: str = "strict") -> None:
    await mesh.register(model_id, models.dense(seed, width), type=type)


async def _right(client: Client, model_id: str, seed: int, width: int, rows: int = 3) -> None:
    """Calls a model and compares its answer with numpy's, to the precision of FP32."""
    x = np.random.default_rng(seed + 1).standard_normal((rows, width), np.float32)
    (answer,) = await client.infer(model_id, x=x)
    expected = x.astype(np.float64) @ models.dense_weights(seed, width).astype(np.float64)
    np.testing.assert_allclose(answer, expected, rtol=2e-4, atol=2e-5)


async def test_models_of_two_sizes_are_counted_as_the_driver_counts_them(mesh, device):
    """For two sizes of models, the measured size on the device agrees with the driver: the weights and little more."""
    client = Client(mesh.channel())
    await _register(mesh, "small", 1, SMALL)
    await _register(mesh, "large", 2, LARGE)
    await _right(client, "small", 1, SMALL)
    await _right(client, "large", 2, LARGE)
    held = await _held(mesh, "pod-1")
    sizes = {name: copy["device_bytes"] for name, copy in held.items()}
    print(
        f"device bytes of copies: {sizes}; by the driver: {device()}; host: {[c['host_bytes'] for c in held.values()]}"
    )
    assert set(sizes) == {"small", "large"}
    assert 256 * MIB <= sizes["large"] <= 256 * MIB + SESSION
    assert 4 * MIB <= sizes["small"] <= 4 * MIB + SESSION
    assert abs(device() - sum(sizes.values())) < SLACK
    assert not await _held(mesh, "pod-2")


async def test_a_full_device_evicts_and_its_memory_is_given_back(mesh, device):
    """With six models and memory for three, every answer is right. The pod never counts more than its capacity, and the
    driver little more."""
    client = Client(mesh.channel())
    names = {f"m{seed}": seed for seed in range(6)}
    for name, seed in names.items():
        await _register(mesh, name, seed, LARGE)
    most = 0
    for _ in range(2):
        for name, seed in names.items():
            await _right(client, name, seed, LARGE)
            most = max(most, device())
            (pod,) = [pod for pod in (await _pods(mesh)) if pod["pod"] == "pod-1"]
            assert pod["device_used"] <= CAPACITY
    counters = (await mesh.rest("GET", "/mesh/v1/pods/pod-1")).json["counters"]
    print(f"evictions {counters['evictions']}, most on the device {most / MIB:.0f} MiB of {CAPACITY / MIB:.0f}")
    assert counters["evictions"] >= 9
    assert 512 * MIB < most < CAPACITY + SLACK
    assert len(await _held(mesh, "pod-1")) in (2, 3)


async def test_small_models_share_a_device(mesh, device):
    """Fifty small models share a device and are called at once. Sessions take little memory besides their weights, and
    their memory is reused."""
    client = Client(mesh.channel())
    device.sessions = 50
    for first in (0, 100):
        seeds = range(first, first + 50)
        for seed in seeds:
            await _register(mesh, f"s{seed}", seed, 64)
        await asyncio.gather(*(_right(client, f"s{seed}", seed, 64) for seed in seeds))
        held = await _held(mesh, "pod-1")
        counted, real = sum(copy["device_bytes"] for copy in held.values()), device()
        print(f"{len(held)} small models: {counted / MIB:.1f} MiB counted, {real / MIB:.1f} MiB by the driver")
        assert len(held) == 50
        assert counted <= 50 * SESSION
        assert real < counted + SLACK
        await _unregister(mesh)


async def test_both_kinds_of_pod_give_the_same_answers(mesh, device):
    """One file, registered with two types, gives the same answers on GPU and CPU."""
    client = Client(mesh.channel())
    await _register(mesh, "on-gpu", 5, SMALL, "net")
    await _register(mesh, "on-cpu", 5, SMALL, "plain")
    x = np.random.default_rng(0).standard_normal((4, SMALL), np.float32)
    (gpu,), (cpu,) = await client.infer("on-gpu", x=x), await client.infer("on-cpu", x=x)
    assert set(await _held(mesh, "pod-1")) == {"on-gpu"}
    assert set(await _held(mesh, "pod-2")) == {"on-cpu"}
    np.testing.assert_allclose(gpu, cpu, rtol=2e-4, atol=2e-5)


async def test_a_killed_server_leaves_nothing_on_the_device(mesh, device, nvml):
    """A killed server leaves nothing on the device: the driver reclaims its memory, and the next server answers the
    next call."""
    client = Client(mesh.channel())
    await _register(mesh, "large", 2, LARGE)
    await _right(client, "large", 2, LARGE)
    assert device() >= 256 * MIB
    assert await _lives(mesh, 1)
    os.kill(mesh.server_pid(mesh.pods[0]), 9)
    await until(lambda: device() < 256 * MIB, timeout=30, why="the driver takes the memory back")
    await until(lambda: _lives(mesh, 2), timeout=60, why="there is another server")
    await _right(client, "large", 2, LARGE)


async def _lives(mesh: LocalMesh, count: int) -> bool:
    pod = (await mesh.rest("GET", "/mesh/v1/pods/pod-1")).json
    return pod["counters"]["server_lives"] == count and pod["state"] == "ready"
