import asyncio
import contextlib
import shutil
import tempfile
from pathlib import Path

import grpc
import pytest

from mesh.envoy import config, minder
from mesh.wire import server
from router.edge import grpc as edges

OPTIONS = (("grpc.max_receive_message_length", 64 << 20), ("grpc.use_local_subchannel_pool", 1))


@contextlib.asynccontextmanager
async def behind_envoy(handler, max_message):
    run_dir = Path(tempfile.mkdtemp(prefix="me", dir="/tmp"))
    served = server.Server(handler, max_message=max_message)
    settings = config.EnvoySettings(
        host="127.0.0.1",
        port=0,
        admin_socket=f"{run_dir}/admin",
        grpc_sockets=(f"{run_dir}/grpc0",),
        inference_sockets=(f"{run_dir}/infer0",),
        rest_sockets=(f"{run_dir}/rest0",),
    )
    envoy = minder.Minder(settings, run_dir=run_dir)
    try:
        await served.listen_unix(settings.grpc_sockets[0])
        yield await envoy.start()
    finally:
        await envoy.stop(0)
        await served.close(0)
        await asyncio.to_thread(shutil.rmtree, run_dir)


@contextlib.asynccontextmanager
async def behind_grpc(handler, max_message):
    edge = edges.GrpcEdge(handler, max_message=max_message)
    try:
        yield await edge.listen("127.0.0.1", 0)
    finally:
        await edge.close(0)


@pytest.fixture(params=["envoy", "grpc"])
async def connect(request):
    """Yields a function that serves a handler behind an edge, and returns a channel to it. Each test runs with both
    edges, which must behave alike."""
    transport = {"envoy": behind_envoy, "grpc": behind_grpc}[request.param]
    async with contextlib.AsyncExitStack() as stack:

        async def connect(handler, *, max_message=16 << 20, **options):
            port = await stack.enter_async_context(transport(handler, max_message))
            channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS, **options)
            return await stack.enter_async_context(channel)

        yield connect
