"""The errors of the SPI, as they arrive at the agent."""

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from mesh.pb import modelruntime_pb2 as pb
from mesh.pb import modelruntime_pb2_grpc
from mesh.runtime.port import spi
from mesh.runtime.servers.spi import Spi, SpiError
from mesh.statuses import Code, MeshError, Reason


class Failing(modelruntime_pb2_grpc.ModelRuntimeServicer):  # type: ignore[misc]
    """A server whose loads fail."""

    error: Exception

    async def loadModel(self, request: pb.LoadModelRequest, context: spi.Context) -> pb.LoadModelResponse:
        async with spi.answered(context):
            raise self.error
        raise AssertionError("not reached")


@pytest_asyncio.fixture
async def failing(tmp_path: Path) -> AsyncIterator[tuple[Failing, Spi]]:
    """Runs such a server. Yields it with a connection to it."""
    servicer = Failing()
    server = await spi.listen(servicer, tmp_path / "socket")
    connection = Spi(tmp_path / "socket")
    yield servicer, connection
    await connection.close()
    await server.stop(None)


@pytest.mark.parametrize("by", ["this process", "the server behind it"])
@pytest.mark.parametrize(
    ("text", "arrives"),
    [
        ("the folder has modèle, 模型", "the folder has modèle, 模型"),
        ("the folder has mod\udce8le", r"the folder has mod\udce8le"),
        ("two\nlines\0", "two\nlines\0"),
        ("x" * 100_000, "x" * 2048),
        ("è" * 100_000, "è" * 1024),
        ("a" + "模" * 100_000, "a" + "模" * 682),
    ],
    ids=["unicode", "other bytes", "control characters", "long", "long and encoded", "cut within a character"],
)
async def test_every_text_arrives_with_its_status(
    failing: tuple[Failing, Spi], by: str, text: str, arrives: str
) -> None:
    servicer, connection = failing
    servicer.error = MeshError(Reason.BAD_REQUEST, text)
    if by == "the server behind it":
        nothing = grpc.aio.Metadata()
        servicer.error = grpc.aio.AioRpcError(grpc.StatusCode.INVALID_ARGUMENT, nothing, nothing, details=text)
    with pytest.raises(SpiError) as error:
        await connection.load("m", "t", "/m", "{}", copy=b"c", slot=None, timeout=20)
    assert (error.value.code, error.value.text) == (Code.INVALID_ARGUMENT, arrives)
