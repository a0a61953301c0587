"""Fixtures that make complete meshes for the system tests, on the session's etcd or on an etcd that the test may
break."""

import pytest

from mesh.options.values import parse_bytes
from tests.support.localmesh import LocalMesh


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options of `make test-vmodels`, `make test-compatibility` and `make test-streams`."""
    group = parser.getgroup("vmodels")
    group.addoption("--vmodel-calls", type=int, default=150, help="Number of random calls of the vmodel API.")
    group.addoption("--vmodel-moves", type=int, default=24, help="Number of moves of a vmodel under constant traffic.")
    group.addoption("--vmodel-seed", type=int, help="Seed of the random calls; random by default.")
    group = parser.getgroup("streams")
    group.addoption("--streams", type=int, default=100, help="Number of streams that are open at once.")
    group.addoption(
        "--stream-bytes", type=parse_bytes, default=64 << 20, help="Number of bytes of a large message or a flood."
    )
    parser.addoption("--every-way", action="store_true", help="Run each edge with each kind of foreign server.")


@pytest.fixture
def a_mesh(tmp_path, etcd_server):
    """A function that makes a mesh of real processes on the session's etcd: `async with a_mesh(pods=2) as mesh`."""

    def make(**options) -> LocalMesh:
        return LocalMesh(tmp_path, etcd_server, **options)

    return make


@pytest.fixture
def a_mesh_of_its_own(tmp_path, own_etcd):
    """A function that makes a mesh of real processes with an etcd that the test may kill and freeze."""

    def make(**options) -> LocalMesh:
        return LocalMesh(tmp_path, own_etcd, **options)

    return make


@pytest.fixture(params=["envoy", pytest.param("grpc", marks=pytest.mark.long)])
def edge(request):
    """The edge of the routers: Envoy, then grpc.aio, because clients must see no difference."""
    return request.param
