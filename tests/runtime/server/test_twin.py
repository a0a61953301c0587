"""The fake model server of the system tests, which looks like the real one and whose models do what their names say."""

import asyncio
import re
import signal

import grpc
import numpy as np
import pytest
import pytest_asyncio

from mesh.pb import modelruntime_pb2
from mesh.runtime.sharedmemory.slot import SlotState
from mesh.statuses import Code
from mesh.wire import headers
from tests.support import models, twin
from tests.support.onnxserver import OnnxServer
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

ONE = np.ones((1, 1), np.float32)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fake(tmp_path_factory):
    async with OnnxServer(tmp_path_factory.mktemp("twin"), "--load-timeout", "20", module=twin.MODULE) as server:
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def real(tmp_path_factory):
    async with OnnxServer(tmp_path_factory.mktemp("real")) as server:
        yield server


def path(server: OnnxServer, model: str, *, pod: str = "pod-1", **words: object):
    """Writes a model for the fake server into the folder where a pod keeps its files, and returns its path."""
    name = twin.name(**words)
    found = server.folder / pod / model / name
    found.parent.mkdir(parents=True, exist_ok=True)
    found.write_bytes(twin.content(name))
    return found


async def error(load) -> tuple[Code, str]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await load
    return Code(raised.value.code().value[0]), raised.value.details()


@pytest.mark.parametrize("kind", ["real", "fake"])
async def test_both_are_the_same_from_outside(kind, real, fake):
    """The fake server behaves like the real one in status, load, size, answer, invalid input, use board, unload and
    *not here*."""
    server = fake if kind == "fake" else real
    model = path(server, "m", value=3) if kind == "fake" else models.constant(3)
    status, about = await server.runtime_status()
    assert status.status == status.READY
    assert {"mesh-data", "mesh-device", "mesh-pid"} <= set(about)
    assert re.fullmatch(r"mesh-onnx [^;]+; [^;]+; device=cpu", status.runtimeVersion)
    sizes = await server.load("m", model, slot=3, revision=7)
    assert sizes["host"] > 0
    use = server.board.read(3)
    assert (use.state, use.revision, use.calls) == (SlotState.LOADED, 7, 0)
    assert await server.value("m", revision=7) == 3
    wrong = await server.infer("m", revision=7)
    assert (wrong.code, "needs input" in wrong.text) == (Code.INVALID_ARGUMENT, True)
    other = await server.infer("m", revision=8)
    assert dict(other.headers)[headers.NOT_HERE] == b"1"
    assert server.board.read(3).calls == 2
    await server.unload("m", revision=7)
    assert server.board.read(3).state is SlotState.FREE
    gone = await server.infer("m", revision=7)
    assert dict(gone.headers)[headers.NOT_HERE] == b"1"
    size = server.spi.modelSize(modelruntime_pb2.ModelSizeRequest(modelId="m"))
    assert (await error(size))[0] is Code.NOT_FOUND


async def test_models_are_as_large_as_they_say(fake):
    """A model in the fake server has the size that its name says, without taking that much memory."""
    before = fake.resident()
    assert await fake.load("large", path(fake, "large", size="8GiB")) == {"host": 8 << 30, "device": 0}
    assert fake.resident() - before < 64 << 20
    await fake.unload("large")


async def test_loads_fail_as_they_say(fake):
    """Loads in the fake server fail as the model's name says: with a text, for lack of memory, for a while, or only in
    some pods."""
    assert await error(fake.load("m", path(fake, "a", fail="no such layer"))) == (Code.INTERNAL, "no such layer")
    assert (await error(fake.load("m", path(fake, "a", fail="memory"))))[0] is Code.RESOURCE_EXHAUSTED
    once = path(fake, "a", fail="not yet", fails=1)
    assert await error(fake.load("m", once)) == (Code.INTERNAL, "not yet")
    await fake.load("m", once)
    await error(fake.load("m", path(fake, "a", fail="not here", at="pod-1+pod-3")))
    await fake.load("m", path(fake, "a", fail="not here", at="pod-1+pod-3", pod="pod-2"))
    await fake.unload("m")


@pytest.mark.parametrize(
    "words", [{"load": "1000s"}, {"gate": "never"}, {"fail": "hang"}], ids=lambda words: next(iter(words))
)
async def test_a_load_that_takes_long_ends_when_it_is_told_to(fake, words):
    load = asyncio.ensure_future(fake.load("slow", path(fake, "slow", **words), slot=5, revision=1))
    await until(lambda: fake.board.read(5).state is SlotState.LOADING)
    await fake.unload("slow", revision=1)
    assert (await error(load))[0] is Code.CANCELLED
    assert fake.board.read(5).state is SlotState.FREE


async def test_a_load_waits_at_its_gate(fake):
    """A load in the fake server waits until a gate file appears next to the pod's folder."""
    gate = fake.folder / "gate"
    load = asyncio.ensure_future(fake.load("m", path(fake, "gated", gate=gate.name), slot=6))
    await until(lambda: fake.board.read(6).state is SlotState.LOADING)
    assert not load.done()
    gate.touch()
    await load
    await fake.unload("m")


async def test_calls_take_long_and_fail_as_they_say(fake):
    """Calls of the fake server are slow or fail as the model's name says. A slow call is on the board and does not
    block others."""
    await fake.load("slow", path(fake, "slow", call="1000s"), slot=7)
    await fake.load("quick", path(fake, "quick", value=2))
    await fake.load("bad", path(fake, "bad", error="try some other time"))
    call = asyncio.ensure_future(fake.infer("slow", x=ONE, timeout=1000))
    await fake.running(7)
    assert await fake.value("quick") == 2
    failed = await fake.infer("bad", x=ONE)
    assert (failed.code, failed.text) == (Code.UNAVAILABLE, "try some other time")
    await fake.unload("slow", timeout=2.1)
    assert (await call).code == Code.UNAVAILABLE


async def test_a_word_that_is_none_is_said(fake):
    """An unknown word in a fake model's name is an error, both when a test makes the name and when the server reads
    it."""
    with pytest.raises(ValueError, match="'sice=3' is no word"):
        twin.name(sice=3)
    bad = fake.folder / "pod-1" / "m" / "sice=3"
    bad.parent.mkdir(parents=True, exist_ok=True)
    bad.touch()
    code, text = await error(fake.load("m", bad))
    assert (code, "'sice=3' is no word" in text) == (Code.INTERNAL, True)


async def test_a_crash_leaves_its_trace_on_the_board(tmp_path):
    """A crash of the fake server ends the process, and the board shows what was at work."""
    async with OnnxServer(tmp_path, module=twin.MODULE) as server:
        await server.load("m", path(server, "m", error="crash"), slot=2, revision=4)
        call = asyncio.ensure_future(server.infer("m", revision=4, x=ONE))
        assert server.process is not None
        assert await server.process.wait() == -signal.SIGABRT
        await asyncio.wait({call})
        use = server.board.read(2)
        assert (use.revision, use.suspect) == (4, True)
