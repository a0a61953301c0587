"""V2 calls through a translating egress, to a stand-in for TorchServe over real gRPC."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from mesh.pb import inference_pb2 as v2
from mesh.pb import torchserve_inference_pb2 as inference
from mesh.runtime.relay.adapters.torchserve import V2OverPredictions
from mesh.runtime.relay.grpcegress import GrpcEgress
from mesh.runtime.relay.link import Link
from mesh.runtime.relay.table import Journal, Table
from mesh.runtime.relay.translating import TranslatingEgress
from mesh.runtime.sharedmemory.board import Board
from mesh.statuses import Code, MeshError, Reason
from mesh.wire import framing
from mesh.wire.reply import Reply
from tests.support.faketorchserve import FakeTorchServe

LIMIT = 1 << 20
INFER = b"/inference.GRPCInferenceService/ModelInfer"
NATIVE = b"/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions"


def request(name: str = "m") -> bytes:
    """Returns the frame of a request with raw contents."""
    message = v2.ModelInferRequest(model_name=name, id="7")
    message.inputs.add(name="x", datatype="FP32", shape=[2])
    message.raw_input_contents.append(np.array([1.5, float("nan")], "<f4").tobytes())
    return framing.pack(message.SerializeToString())


@pytest_asyncio.fixture
async def server(tmp_path: Path) -> AsyncIterator[FakeTorchServe]:
    """Runs a stand-in for TorchServe that has the model `m`."""
    (tmp_path / "models").mkdir()
    async with FakeTorchServe(tmp_path / "models") as server:
        server.loaded["m"] = {}
        yield server


@pytest_asyncio.fixture
async def egress(server: FakeTorchServe, tmp_path: Path) -> AsyncIterator[TranslatingEgress]:
    """Runs an egress to the server."""
    board = Board.create(tmp_path / "board", 8, incarnation="i")
    link = Link(server.address, Table(board, Journal(None)), hang_timeout=5.0, max_message=LIMIT)
    carrier = GrpcEgress(link, max_message=LIMIT)
    yield TranslatingEgress(carrier, V2OverPredictions(), max_message=LIMIT)
    await link.close()


async def answer(egress: TranslatingEgress, method: bytes, frame: bytes) -> tuple[Any, Reply]:
    """Calls a method. Returns the only message of the answer, and the answer's end."""
    await egress.up()
    outgoing = egress.send(method, [], frame, timeout=5.0, encoding=b"")
    answered = await outgoing.first()
    if isinstance(answered, Reply):
        return answered.frame, answered
    message = await answered.read()
    assert message is None or await answered.read() is None
    return message, await answered.result()


async def test_a_call_keeps_its_raw_contents(egress: TranslatingEgress) -> None:
    frame, reply = await answer(egress, INFER, request())
    assert reply.code == Code.OK
    response = v2.ModelInferResponse.FromString(framing.unpack(frame, limit=LIMIT))
    assert (response.model_name, response.id) == ("m", "7")
    assert np.frombuffer(response.raw_output_contents[0], "<f4")[0] == 1.5


async def test_a_streamed_request_of_one_message_is_translated(egress: TranslatingEgress) -> None:
    """A request whose message arrives later is translated when it is written."""
    outgoing = egress.open(INFER, [], timeout=5.0, encoding=b"")
    await outgoing.write(request())
    outgoing.end()
    answered = await outgoing.first()
    assert not isinstance(answered, Reply)
    frame = await answered.read()
    assert frame is not None
    assert v2.ModelInferResponse.FromString(framing.unpack(frame, limit=LIMIT)).id == "7"


async def test_the_servers_own_calls_pass_as_they_are(egress: TranslatingEgress, server: FakeTorchServe) -> None:
    """A client of TorchServe gets TorchServe's answer."""
    server.answers = b"\x03 any bytes"
    frame, _ = await answer(
        egress, NATIVE, framing.pack(inference.PredictionsRequest(model_name="m").SerializeToString())
    )
    assert inference.PredictionResponse.FromString(framing.unpack(frame, limit=LIMIT)).prediction == server.answers


@pytest.mark.parametrize(
    ("answers", "reason", "text"),
    [
        (b"\x03bad shape", Reason.BAD_REQUEST, "bad shape"),
        (b"\x0donly V2", Reason.INTERNAL, "only V2"),
        (b"\x0conly V2", Reason.UNSUPPORTED, "only V2"),
        (b"\x0d", Reason.INTERNAL, "TorchServe's answer is empty"),
    ],
)
async def test_an_error_of_the_handler_reaches_the_caller(
    egress: TranslatingEgress, server: FakeTorchServe, answers: bytes, reason: Reason, text: str
) -> None:
    """The code and the text of a handler's error reach the caller, although TorchServe would replace both."""
    server.answers = answers
    with pytest.raises(MeshError, match=text) as error:
        await answer(egress, INFER, request())
    assert error.value.reason is reason


async def test_a_process_that_dies_counts_as_a_lost_server(egress: TranslatingEgress, server: FakeTorchServe) -> None:
    """After the death of a model's process, the router may ask another copy. The next call is answered."""
    server.died = True
    with pytest.raises(MeshError, match="process in TorchServe ended") as error:
        await answer(egress, INFER, request())
    assert error.value.reason is Reason.LOST
    assert (await answer(egress, INFER, request()))[1].code == Code.OK


async def test_an_unknown_model_keeps_the_servers_status(egress: TranslatingEgress) -> None:
    """The relay recognises an unknown model by TorchServe's status and text, so both must stay as they are."""
    _, reply = await answer(egress, INFER, request("other"))
    assert reply.code == Code.INTERNAL
    assert reply.text.startswith("Model not found: other")
