"""One mesh behind each edge for the whole folder, with two models: `seven` answers 7, `a/slash` what it is sent."""

from dataclasses import dataclass

import pytest_asyncio

from tests.support import models
from tests.support.localmesh import LocalMesh


@dataclass(frozen=True)
class Doors:
    """Addresses, host:port, by which clients reach a mesh."""

    mesh: LocalMesh
    edge: str
    grpc: str
    rest: str


@pytest_asyncio.fixture(scope="package", loop_scope="package", params=["envoy", "grpc"])
async def doors(request, tmp_path_factory, etcd_server):
    folder = tmp_path_factory.mktemp(request.param)
    async with LocalMesh(folder, etcd_server, pods=1, edge=request.param, log_level="info") as mesh:
        await mesh.register("seven", models.constant(7.0), load=True)
        await mesh.register("a/slash", models.identity("FP32", (None,)), load=True)
        yield Doors(mesh, request.param, mesh.grpc_address(), mesh.rest_url().removeprefix("http://"))
