"""Makers of whole meshes for the system tests: on the session's etcd, or on one that the test may break."""

import pytest

from tests.support.localmesh import LocalMesh


@pytest.fixture
def a_mesh(tmp_path, etcd_server):
    """Makes a mesh of real processes on the session's etcd: `async with a_mesh(pods=2) as mesh`."""

    def make(**options) -> LocalMesh:
        return LocalMesh(tmp_path, etcd_server, **options)

    return make


@pytest.fixture
def a_mesh_of_its_own(tmp_path, own_etcd):
    """Makes a mesh of real processes with an etcd that the test may kill and freeze."""

    def make(**options) -> LocalMesh:
        return LocalMesh(tmp_path, own_etcd, **options)

    return make


@pytest.fixture(params=["envoy", "grpc"])
def edge(request):
    """Each edge in turn: everything that a client sees is the same behind both."""
    return request.param
