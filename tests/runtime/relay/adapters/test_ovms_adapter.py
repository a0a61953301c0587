"""The adapter for OVMS, against a process that follows OVMS's documentation (no package registry has the real
server)."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio

from mesh import process
from mesh.modelservers import ovms
from mesh.pb import inference_pb2 as v2
from mesh.pb import inference_pb2_grpc
from mesh.pb import modelruntime_pb2 as pb
from mesh.runtime.relay.adapters.ovms import Ovms
from mesh.statuses import MeshError, Reason

XML = "<?xml version='1.0'?><net name='m' version='11'><layers>"
ONNX = "8"  # the stand-in reads a number


class Served:
    """A stand-in for OVMS, its control, and the files that an agent has pulled."""

    def __init__(self, folder: Path, channel: grpc.aio.Channel, rest: int) -> None:
        self.folder = folder
        self.channel = channel
        self.rest = rest
        self.stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        self.control = self.managed()

    def managed(self) -> Ovms:
        """Returns another control of the same server, as the next relay would have."""
        return Ovms(self.channel, self.folder / "server", load_timeout=10.0, rest=f"127.0.0.1:{self.rest}")

    def listed(self) -> list[str]:
        """Returns the names in the configuration file."""
        content = json.loads((self.folder / "server" / "models" / ovms.FILE).read_text())
        return [one["config"]["name"] for one in content["model_config_list"]]

    def write(self, files: dict[str, str]) -> None:
        """Writes files as if an agent had pulled them."""
        for name, content in files.items():
            path = self.folder / "pulled" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)

    async def load(self, path: str, model_id: str = "m", kind: str = "openvino_ir") -> None:
        where = str(self.folder / "pulled" / path)
        await self.control.load(pb.LoadModelRequest(modelId=model_id, modelType=kind, modelPath=where), timeout=20.0)

    async def unload(self, model_id: str = "m") -> None:
        await self.control.unload(pb.UnloadModelRequest(modelId=model_id), timeout=20.0)

    async def times(self, model_id: str = "m") -> float:
        """Calls a model, and returns the number by which it multiplies."""
        request = v2.ModelInferRequest(model_name=self.control.name(model_id))
        request.inputs.add(name="x", datatype="FP32", shape=[1])
        request.raw_input_contents.append(np.array([1], "<f4").tobytes())
        response = await self.stub.ModelInfer(request, timeout=10)
        return float(np.frombuffer(response.raw_output_contents[0], "<f4")[0])

    async def reloads(self) -> int:
        """Returns how often the server has read its configuration file."""
        return int((await self.stub.ServerMetadata(v2.ServerMetadataRequest(), timeout=10)).version)


@pytest_asyncio.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    """Runs a stand-in for OVMS with an empty configuration."""
    ovms.prepare(tmp_path / "server" / "models")
    port, rest = process.free_port("127.0.0.1"), process.free_port("127.0.0.1")
    config = str(tmp_path / "server" / "models" / ovms.FILE)
    argv = [sys.executable, "-P", "-m", "tests.support.fakeovms", "--port", str(port), "--rest_port", str(rest)]
    root = str(Path(__file__).resolve().parents[4])
    server = await process.spawn([*argv, "--config_path", config], name="fakeovms", env={"PYTHONPATH": root})
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            await asyncio.wait_for(channel.channel_ready(), 30)
            yield Served(tmp_path, channel, rest)
    finally:
        server.kill()
        await server.wait(10.0)


@pytest.mark.parametrize(
    ("files", "path", "kind", "factor"),
    [
        ({"d/m.xml": XML, "d/m.bin": "2"}, "d", "openvino_ir", 2.0),
        ({"d/model.xml": XML, "d/model.bin": "3", "d/other.xml": XML}, "d", "mt:openvino_ir:1", 3.0),
        ({"v/1/m.xml": XML, "v/1/m.bin": "4", "v/12/m.xml": XML, "v/12/m.bin": "5"}, "v", "openvino_ir", 5.0),
        ({"any": ONNX}, "any", "onnx", 8.0),
        ({"d/net.onnx": ONNX, "d/weights": "1"}, "d", "onnx", 8.0),
    ],
)
async def test_each_layout_is_served(
    served: Served, files: dict[str, str], path: str, kind: str, factor: float
) -> None:
    """The id is not a plain name, so the server gets a digest of it. After the unload, no file of the model is left."""
    served.write(files)
    await served.load(path, "team/net ä", kind)
    assert await served.times("team/net ä") == factor
    (name,) = served.listed()
    assert len(name) == 32
    await served.control.size(pb.ModelSizeRequest(modelId="team/net ä"), timeout=5.0)
    await served.unload("team/net ä")
    assert not served.listed()
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await served.control.size(pb.ModelSizeRequest(modelId="team/net ä"), timeout=5.0)
    assert error.value.code() is grpc.StatusCode.NOT_FOUND
    assert not [*(served.folder / "server" / "models").glob("*/")]


@pytest.mark.parametrize(
    ("files", "kind", "says"),
    [
        ({"m/a.xml": XML}, "openvino_ir", "the folder lacks a.bin, the weights of a.xml"),
        ({"m": XML}, "openvino_ir", "an OpenVINO model is a folder with an .xml and a .bin file"),
        ({"m/a.txt": ""}, "openvino_ir", "lacks the model's file (model.xml"),
        ({"m/a.xml": XML, "m/a.bin": "1"}, "tensorflow", "types openvino_ir, onnx, not tensorflow"),
        ({"m": "<html>"}, "onnx", "is an HTML page"),
    ],
)
async def test_a_bad_model_is_refused_with_the_reason(
    served: Served, files: dict[str, str], kind: str, says: str
) -> None:
    """For a bad model, the server is not asked, and no file is left."""
    served.write(files)
    before = await served.reloads()
    with pytest.raises(MeshError) as error:
        await served.load("m", kind=kind)
    assert error.value.reason is Reason.BAD_REQUEST
    assert says in error.value.text
    assert await served.reloads() == before
    assert not [*(served.folder / "server" / "models").glob("*/")]


async def test_loads_and_unloads_that_arrive_together_are_one_change(served: Served) -> None:
    """A model that fails does not prevent the other loads of the same change, and is not listed afterwards."""
    served.write(
        {f"{number}/m.{end}": "broken" if number == 3 else str(number) for number in range(6) for end in ("bin",)}
    )
    served.write({f"{number}/m.xml": XML for number in range(6)})
    await served.load("0", "former")
    before = await served.reloads()
    results: list[Any] = await asyncio.gather(
        served.unload("former"),
        *(served.load(str(number), f"m{number}") for number in range(1, 6)),
        return_exceptions=True,
    )
    failed = results[3]
    assert isinstance(failed, MeshError)
    assert failed.reason is Reason.LOAD_FAILED
    assert "broken" in failed.text
    assert str(served.folder) not in failed.text
    assert [one for place, one in enumerate(results) if place != 3] == [None] * 5
    assert await served.reloads() - before == 2, "one for all, and one that drops the failed model"
    assert sorted(served.listed()) == ["m1", "m2", "m4", "m5"]
    assert [await served.times(f"m{number}") for number in (1, 2, 4, 5)] == [1.0, 2.0, 4.0, 5.0]


async def test_new_content_under_the_same_id_is_loaded(served: Served) -> None:
    """The server ignores new files below a path that it knows, so each load uses another path."""
    served.write({"a/m.xml": XML, "a/m.bin": "2", "b/m.xml": XML, "b/m.bin": "7"})
    await served.load("a")
    await asyncio.gather(served.unload(), asyncio.sleep(0))
    await served.load("b")
    assert await served.times() == 7.0


async def test_a_server_is_ready_once_it_has_dropped_all_models(served: Served) -> None:
    """A new relay drops all models of a former relay before the server is ready. A relay that resumes keeps its
    models."""
    served.write({"a/m.xml": XML, "a/m.bin": "2", "b/m.xml": XML, "b/m.bin": "3"})
    await served.load("a")
    following = served.managed()
    following.resume(former=False)
    served.control = following
    await served.load("b", "other")
    assert (await served.times(), await served.times("other")) == (2.0, 3.0)
    status, _ = await served.managed().status(timeout=10.0)
    assert status.status == pb.RuntimeStatusResponse.READY
    assert status.runtimeVersion.startswith("OpenVINO Model Server")
    assert list(status.methodInfos["tensorflow.serving.PredictionService/Predict"].idInjectionPath) == [1, 1]
    assert not served.listed()
    with pytest.raises(grpc.aio.AioRpcError):
        await served.times()


async def test_a_change_that_failed_is_made_up_for(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the server does not answer, an unload fails. The next unload reaches the server even if it makes the same
    change."""
    served.write({"a/m.xml": XML, "a/m.bin": "2"})
    await served.load("a")
    rest = served.control._reloads._rest
    monkeypatch.setattr(rest, "_port", process.free_port("127.0.0.1"))
    with pytest.raises(MeshError, match="does not answer on its REST port"):
        await served.unload()
    monkeypatch.setattr(rest, "_port", served.rest)
    assert await served.times() == 2.0
    await served.unload()
    with pytest.raises(grpc.aio.AioRpcError):
        await served.times()
