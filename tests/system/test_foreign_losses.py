"""Losses in a complete mesh with a foreign model server: of models, of the server, of the relay, of its egress, or of
the agent."""

import asyncio
import os
import signal

import grpc
import pytest

from mesh.pb import modelruntime_pb2 as pb
from mesh.pb import modelruntime_pb2_grpc
from tests.support import exampleruntime
from tests.support.foreign import INJECTED, ForeignMesh, answered, child_of
from tests.support.localmesh import children, command
from tests.support.waiting import until

MORE = pytest.mark.foreign
"""The mark of variants that only `make test-foreign` runs."""


@pytest.fixture
def foreign(tmp_path, etcd_server):
    """A function that makes a mesh of example runtimes: `async with foreign(edge="grpc", way="child-socket") as it`."""

    def make(*options, **more) -> ForeignMesh:
        return ForeignMesh(tmp_path, etcd_server, *options, **more)

    return make


@pytest.mark.parametrize("form", ["plain", pytest.param("triton", marks=MORE), pytest.param("mlserver", marks=MORE)])
async def test_a_model_that_the_server_has_lost_is_loaded_again(foreign, form):
    """A server that has dropped a model answers *not found* in one of three forms. The next call loads the model again,
    and succeeds."""
    async with foreign(*INJECTED, "--not-found", form, way="neighbour-socket") as it:
        await it.register("a", now=True)
        await it.register("b", now=True)
        async with grpc.aio.insecure_channel(it.servers[0].argv[4]) as channel:
            stub = modelruntime_pb2_grpc.ModelRuntimeStub(channel)
            for number in (1, 2):
                await stub.unloadModel(pb.UnloadModelRequest(modelId="a"))
                assert dict((await it.ask("a")).results) == {"a": "hello"}
                assert it.noted("load a") == 1 + number
        assert it.noted("load b") == 1


@pytest.mark.foreign
async def test_a_model_that_is_lost_unseen_is_withdrawn(foreign):
    """A model that its server has dropped is withdrawn from the mesh, even if nobody calls it."""
    async with foreign(way="neighbour-socket") as it:
        await it.register("a", now=True)
        async with grpc.aio.insecure_channel(it.servers[0].argv[4]) as channel:
            await modelruntime_pb2_grpc.ModelRuntimeStub(channel).unloadModel(pb.UnloadModelRequest(modelId="a"))

        async def withdrawn() -> bool:
            return (await it.mesh.status("a"))["status"] == "NOT_LOADED"

        await until(withdrawn, timeout=30, why="the copy is withdrawn")


@pytest.mark.foreign
async def test_a_models_own_not_found_reaches_the_caller(foreign):
    """A model that itself answers NOT_FOUND is loaded once more. After that its answer reaches callers, and no further
    loads follow."""
    async with foreign(way="neighbour-socket") as it:
        await it.register("a", now=True)
        for _ in range(3):
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await it.ask("a", "fail NOT_FOUND no such user")
            assert (failed.value.code(), failed.value.details()) == (grpc.StatusCode.NOT_FOUND, "no such user")
        assert it.noted("load a") == 2


@pytest.mark.parametrize("way", [pytest.param("child-socket", marks=MORE), "neighbour-port"])
async def test_a_killed_server_comes_back_with_its_models(foreign, way):
    """A killed server is empty when it returns, so the next call of each model loads the model again."""
    async with foreign(way=way) as it:
        await it.register("a", now=True)
        await it.register("b", now=True)
        relay = child_of(it.mesh, "mesh.runtime.relay")
        if it.servers:
            it.servers[0].kill9()
            await until(lambda: child_of(it.mesh, "mesh.runtime.relay") not in (0, relay), why="another relay")
            it.servers[0].start()
        else:
            os.kill(child_of(it.mesh, exampleruntime.MODULE), signal.SIGKILL)
        assert dict((await answered(it, "a")).results) == {"a": "hello"}
        assert dict((await answered(it, "b")).results) == {"b": "hello"}
        assert (it.noted("load a"), it.noted("status")) == (2, 2)
        assert "quarantined" not in {key for key, value in (await it.mesh.status("a")).items() if value}


@pytest.mark.foreign
async def test_a_server_that_restarts_at_once_is_noticed(foreign):
    """The agent asks a neighbour for its status again after the neighbour was killed and replaced by an empty one
    within moments."""
    async with foreign(way="neighbour-socket") as it:
        await it.register("a", now=True)
        it.servers[0].kill9()
        it.servers[0].start()
        assert dict((await answered(it, "a")).results) == {"a": "hello"}
        assert it.noted("load a") == it.noted("status") == 2


@pytest.mark.foreign
@pytest.mark.parametrize("way", ["child-socket", pytest.param("neighbour-port", marks=MORE)])
async def test_a_frozen_server_is_given_up_within_seconds(foreign, way):
    """A server that is stopped (SIGSTOP) is detected although the kernel still accepts its connections. A child is
    replaced. A neighbour is used again once it continues."""
    async with foreign(way=way, runtime_options=["--hang-timeout", "3"]) as it:
        await it.register("a", now=True)
        pid = it.servers[0].pid if it.servers else child_of(it.mesh, exampleruntime.MODULE)
        relay = child_of(it.mesh, "mesh.runtime.relay")
        os.kill(pid, signal.SIGSTOP)
        try:
            await until(
                lambda: child_of(it.mesh, "mesh.runtime.relay") not in (0, relay), timeout=40, why="another relay"
            )
        finally:
            if it.servers:
                os.kill(pid, signal.SIGCONT)
        assert dict((await answered(it, "a")).results) == {"a": "hello"}
        assert it.noted("load a") == 2


@pytest.mark.parametrize(
    "options", [pytest.param((), id="sizes"), pytest.param(("--no-model-size",), id="no-sizes", marks=MORE)]
)
async def test_a_relay_that_is_killed_takes_no_model_with_it(foreign, options):
    """A killed relay is started again and keeps the copies: the server is not asked to load anything."""
    async with foreign(*INJECTED, *options) as it:
        for name in ("a", "b"):
            await it.register(name, now=True)
        for number in range(2):
            relay = child_of(it.mesh, "mesh.runtime.relay")
            os.kill(relay, signal.SIGKILL)
            for name in ("a", "b"):
                assert dict((await answered(it, name)).results) == {name: "hello"}
            await it.register(f"c{number}", now=True)
            assert dict((await it.ask(f"c{number}")).results) == {f"c{number}": "hello"}
        assert it.noted("load a") == it.noted("load b") == it.noted("load c0") == it.noted("status") == 1
        assert it.noted("unload a") == 0


@pytest.mark.foreign
async def test_calls_wait_for_a_relay_that_is_replaced(foreign, edge):
    """The agent keeps the socket of the data port. Calls that begin after a relay was killed wait for the next relay,
    and none of them fails."""
    async with foreign(edge=edge) as it:
        await it.register("a", now=True)
        await it.ask("a")
        relay = child_of(it.mesh, "mesh.runtime.relay")
        os.kill(relay, signal.SIGKILL)
        await until(lambda: "relay died" in it.mesh.pods[0].tail(200), why="the relay and its sockets are gone")
        answers = await asyncio.gather(*(it.ask("a", str(number)) for number in range(20)))
        assert [dict(answer.results) for answer in answers] == [{"a": str(number)} for number in range(20)]
        assert it.noted("load a") == it.noted("status") == 1


@pytest.mark.foreign
async def test_an_egress_that_is_killed_is_replaced(foreign):
    """The relay replaces an Envoy that dies. The relay itself continues, and nothing is loaded again."""
    async with foreign(egress="envoy") as it:
        await it.register("a", now=True)
        await it.ask("a")
        relay = child_of(it.mesh, "mesh.runtime.relay")
        (egress,) = children(relay)
        os.kill(egress, signal.SIGKILL)
        await until(lambda: not command(egress), why="the egress has ended")
        assert dict((await answered(it, "a")).results) == {"a": "hello"}
        assert (child_of(it.mesh, "mesh.runtime.relay"), it.noted("load a")) == (relay, 1)
        assert "the egress died" in it.mesh.pods[0].tail(200)


@pytest.mark.foreign
async def test_a_server_that_speaks_the_spi_under_its_former_name_is_served(foreign):
    """A server that has the SPI only under the name of ModelMesh's deprecated service is used as well, also by the next
    relay. Its pod waits until the server no longer reports STARTING."""
    async with foreign(*INJECTED, "--former", "--starting", "2") as it:
        assert it.noted("status") == 3
        await it.register("a", now=True)
        relay = child_of(it.mesh, "mesh.runtime.relay")
        os.kill(relay, signal.SIGKILL)
        await it.register("b", now=True)
        for name in ("a", "b"):
            assert dict((await answered(it, name)).results) == {name: "hello"}
        assert (it.noted("load a"), it.noted("load b"), it.noted("status")) == (1, 1, 3)


@pytest.mark.foreign
async def test_an_agent_that_is_killed_begins_again(foreign):
    """The foreign server is a neighbour and keeps running. The next agent makes the server drop its models, and loads
    them again when they are called."""
    async with foreign(way="neighbour-socket") as it:
        await it.register("a", now=True)
        it.mesh.pods[0].kill9()
        it.mesh.pods[0].start()
        assert dict((await answered(it, "a")).results) == {"a": "hello"}
        assert (it.noted("load a"), it.noted("status")) == (2, 2)
