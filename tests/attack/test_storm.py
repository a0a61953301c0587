"""A storm of cold models: 200 are called at once in a mesh with room for 65, while a hot model has traffic."""

import asyncio
import collections

import grpc
import numpy as np
import pytest

from tests.attack.siege import HOT, HOT_VALUE, MIB, Siege
from tests.support.etcd import EtcdServer
from tests.support.localmesh import Client, LocalMesh

pytestmark = [pytest.mark.attack, pytest.mark.timeout(240)]

MODELS = 200
DEADLINE = 60.0  # seconds


async def test_every_cold_call_is_answered_in_time(tmp_path, etcd_server: EtcdServer) -> None:
    """Each cold call waits for its turn and is answered within its deadline. No call is refused because others came
    first."""
    async with LocalMesh(tmp_path, etcd_server, pods=2, capacity="33MiB", log_level="info", fake=True) as mesh:
        await mesh.register_fake(HOT, value=HOT_VALUE, size="1MiB", now=True)
        for number in range(MODELS):
            await mesh.register_fake(f"cold{number}", value=number, size="1MiB", load="0.05s")
        async with Siege(mesh, growth=200 * MIB):
            client = Client(mesh.channel())

            async def call(number: int) -> str:
                try:
                    (answer,) = await client.infer(f"cold{number}", x=np.ones((1, 1), np.float32), timeout=DEADLINE)
                except grpc.aio.AioRpcError as error:
                    return f"{error.code().name}: {error.details()}"
                return "right" if answer.ravel()[0] == number else f"wrong: {answer}"

            ended = collections.Counter(await asyncio.gather(*map(call, range(MODELS))))
        assert ended == {"right": MODELS}
