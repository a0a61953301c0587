"""Agents over real gRPC that do not answer: the errors for callers, and the log."""

import grpc
import pytest

from mesh.process import free_port
from mesh.schema.records import PodRecord
from router.loads.agents import Agents, Timeout, Unreachable
from router.state.pods import Pod


def pod(port: int) -> Pod:
    made = Pod("pod-1")
    made.record = PodRecord("i", "127.0.0.1:1", f"127.0.0.1:{port}")
    return made


async def test_an_agent_that_is_not_there():
    """A request to an unreachable agent has certainly not arrived. Callers learn which pod it is, but only the log has
    addresses and gRPC's texts."""
    port = free_port()
    agents = Agents()
    try:
        with pytest.raises(Unreachable) as error:
            await agents.describe(pod(port), timeout=10)
    finally:
        await agents.close()
    assert error.value.refused
    assert error.value.text == "the agent of pod-1 cannot be reached"
    assert str(port) in str(error.value)


class Failing(grpc.GenericRpcHandler):
    """An agent whose answer to every request is an error."""

    def __init__(self, code, details):
        self.code = code
        self.details = details

    def service(self, details):
        async def handle(request, context):
            await context.abort(self.code, self.details)

        return grpc.unary_unary_rpc_method_handler(handle)


async def test_an_agent_that_is_silent():
    """An aborted request may have arrived, so the error is not `refused`. Only the log has gRPC's text."""
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")

    server.add_generic_rpc_handlers((Failing(grpc.StatusCode.INTERNAL, "Stream removed by 10.0.0.7"),))
    agents = Agents()
    try:
        with pytest.raises(Timeout) as late:  # it does not listen yet, but its port is open
            await agents.describe(pod(port), timeout=0.2)
        await server.start()
        with pytest.raises(Unreachable) as error:
            await agents.describe(pod(port), timeout=10)
    finally:
        await agents.close()
        await server.stop(None)
    assert late.value.text == "the agent of pod-1 did not answer within 0.2 s"
    assert not error.value.refused
    assert error.value.text == "the agent of pod-1 does not answer"
    assert "10.0.0.7" in str(error.value)


async def test_an_agent_that_refuses_this_router():
    """The error says that the agent refuses the credentials, not that it is silent."""
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Failing(grpc.StatusCode.UNAUTHENTICATED, "no valid token"),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    agents = Agents()
    try:
        with pytest.raises(Unreachable) as error:
            await agents.describe(pod(port), timeout=10)
    finally:
        await agents.close()
        await server.stop(None)
    assert error.value.text == "the agent of pod-1 does not accept this router's credentials"
    assert "no valid token" in str(error.value)


async def test_a_pod_that_has_published_no_address():
    agents = Agents()
    with pytest.raises(Unreachable) as error:
        await agents.describe(Pod("pod-1"), timeout=1)
    assert error.value.refused
    await agents.close()
