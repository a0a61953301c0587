"""One mesh behind each edge for all tests of the folder, with a few models.

The model `seven` always answers 7. `a/slash` and `texts` send back their input. Models with `optional` in their names
have inputs that may be omitted.
"""

from dataclasses import dataclass

import pytest
import pytest_asyncio

from tests.support import models
from tests.support.localmesh import LocalMesh


@dataclass(frozen=True)
class Doors:
    """A mesh, the kind of its edge, and the addresses, as host:port, by which clients reach it."""

    mesh: LocalMesh
    edge: str
    grpc: str
    rest: str


@pytest_asyncio.fixture(
    scope="package", loop_scope="package", params=["envoy", pytest.param("grpc", marks=pytest.mark.long)]
)
async def doors(request, tmp_path_factory, etcd_server):
    folder = tmp_path_factory.mktemp(request.param)
    async with LocalMesh(folder, etcd_server, pods=1, edge=request.param, log_level="info") as mesh:
        await mesh.register("seven", models.constant(7.0), load=True)
        await mesh.register("a/slash", models.identity("FP32", (None,)), load=True)
        for datatype in ("FP16", "BF16"):
            await mesh.register(datatype.lower(), models.identity(datatype, (None,)))
        await mesh.register("my/stats", models.constant(1.0))
        await mesh.register("texts", models.identity("BYTES", (None,)))
        await mesh.register("optional", models.with_default())
        await mesh.register("optional-tensor", models.with_optional())
        await mesh.register("all-optional", models.with_defaults())
        await mesh.register("no-inputs", models.without_inputs())
        yield Doors(mesh, request.param, mesh.grpc_address(), mesh.rest_url().removeprefix("http://"))
