import asyncio
import contextlib
import json
import os
import signal
import socket

import aiohttp
import grpc
import pytest

from mesh.envoy import config, minder
from mesh.telemetry import metrics
from tests.support.waiting import until

METHOD = "/some.Service/Method"


@pytest.fixture
async def edge(workers, run_dir):
    """A function that starts an Envoy in front of fake workers."""
    made = []

    async def make(**changes):
        settings = {
            "host": "127.0.0.1",
            "port": 0,
            "admin_socket": str(run_dir / f"a{len(made)}"),
            "grpc_sockets": (workers.path("g0"), workers.path("g1")),
            "inference_sockets": (workers.path("i0"),),
            "rest_sockets": (workers.path("r0"),),
        } | changes
        edge = minder.Minder(config.EnvoySettings(**settings), run_dir=run_dir, name=f"envoy{len(made)}")
        made.append(edge)
        await edge.start()
        return edge

    for name in ("g0", "g1", "i0", "r0"):
        await workers.listen(name)
    yield make
    for one in made:
        await one.stop(0)


def session(edge):
    return aiohttp.ClientSession(f"http://127.0.0.1:{edge.port}")


def head_of(text):
    """Returns the lines of a request's head as a worker received it."""
    return text.decode().rstrip().split("\r\n")


async def test_rest_arrives_as_it_was_sent(edge):
    """Envoy adds no header and rewrites no path, even if an id contains %2F, // or dots. It removes only headers that
    are meant for Envoy itself."""
    edge = await edge()
    path = "/v2/models/a%2Fb//../%2e/infer?x=%20"
    async with aiohttp.ClientSession() as http:
        from yarl import URL

        headers = {
            "x-request-id": "mine",
            "x-envoy-max-retries": "7",
            "mm-model-id": "m",
            "x_under": "1",
            "content-type": "text/json",
        }
        url = URL(f"http://127.0.0.1:{edge.port}{path}", encoded=True)
        async with http.post(url, data=b"abc", headers=headers, skip_auto_headers=["User-Agent"]) as answer:
            first, *lines = head_of(await answer.read())
            assert answer.headers["server"] == "worker"
            assert not [name for name in answer.headers if name.lower().startswith("x-")]
    assert first == f"POST {path} HTTP/1.1"
    names = {line.partition(":")[0] for line in lines}
    expected = {"host", "x-request-id", "mm-model-id", "x_under", "content-type", "content-length"}
    assert names - {"accept", "accept-encoding"} == expected  # the two are the test client's


@pytest.mark.parametrize(
    ("method", "path", "socket"),
    [
        ("POST", "/v2/models/m/infer", "i0"),
        ("POST", "/v2/models/m/versions/1/infer?a=b", "i0"),
        ("GET", "/v2/models/m/ready", "r0"),
        ("GET", "/v2/models/m", "r0"),
        ("POST", "/mesh/v1/models:import", "r0"),
        ("POST", "/v2%2Fmodels/m/infer", "r0"),
        ("GET", "/v2", "r0"),
    ],
)
async def test_what_is_posted_to_models_goes_to_the_sockets_for_inference(edge, workers, method, path, socket):
    """Inference over REST goes to separate sockets. Pages, management and the rest of V2 go to the others."""
    edge = await edge()
    async with aiohttp.ClientSession() as http:
        from yarl import URL

        url = URL(f"http://127.0.0.1:{edge.port}{path}", encoded=True)
        async with http.request(method, url, data=b"abc") as answer:
            assert answer.status == 200
    assert workers.calls[-1][0] == socket


async def test_grpc_arrives_as_http1_with_its_metadata_and_answers_in_trailers(edge, workers):
    edge = await edge()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{edge.port}") as channel:
        call = channel.unary_unary(METHOD)(b"message", timeout=9, metadata=(("mm-model-id", "m"), ("x-bin-bin", b"\0")))
        head = head_of(await call)
        assert dict(await call.trailing_metadata()) == {"x-trailer": "yes"}
    assert head[0] == f"POST {METHOD} HTTP/1.1"
    names = {line.partition(":")[0] for line in head[1:]}
    assert {"grpc-timeout", "mm-model-id", "x-bin-bin", "te", "content-type"} <= names
    assert not [name for name in names if name.startswith(("x-envoy", "x-forwarded", "x-request"))]
    name, _, body = workers.calls[-1]
    assert name in ("g0", "g1")
    assert body == b"\0\0\0\0\x07message"


async def test_a_dead_worker_costs_no_call(edge, workers):
    edge = await edge()
    await workers.stop("g0")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{edge.port}") as channel:
        await asyncio.gather(*(channel.unary_unary(METHOD)(b"") for _ in range(20)))
    assert {name for name, *_ in workers.calls} == {"g1"}


async def test_no_worker_is_unavailable_in_the_form_of_each_protocol(edge, workers):
    edge = await edge()
    for name in ("g0", "g1", "i0", "r0"):
        await workers.stop(name)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{edge.port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(METHOD)(b"")
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "{" not in caught.value.details()
    async with session(edge) as http, http.get("/v2") as answer:
        body = await answer.json()
        assert answer.status == 503
        assert (body["reason"], body["code"]) == ("UNAVAILABLE", 14)
        assert "edge" in body["error"]


async def test_headers_too_large_are_refused_in_json(edge):
    edge = await edge(max_headers_kb=8)
    async with session(edge) as http, http.get("/v2", headers={"x": "y" * 9000}) as answer:
        assert answer.status == 431
        assert (await answer.json())["reason"] == "TOO_LARGE"


async def test_a_cancelled_call_closes_the_workers_connection(edge, workers):
    edge = await edge()
    workers.gate.clear()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{edge.port}") as channel:
        call = channel.unary_unary(METHOD)(b"")
        await until(lambda: workers.calls, why="the call arrives")
        call.cancel()
        await until(lambda: workers.lost == 1, why="the worker sees the connection end")


async def test_more_calls_at_once_than_envoys_defaults_allow(edge, workers):
    """Envoy carries more concurrent calls than its default of 1,024 connections to a cluster allows, because HTTP/1.1
    needs one connection for each call."""
    edge = await edge()
    workers.gate.clear()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{edge.port}") as one:
        options = (("grpc.use_local_subchannel_pool", 1),)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{edge.port}", options=options) as other:
            calls = [asyncio.ensure_future(c.unary_unary(METHOD)(b"")) for c in (one, other) for _ in range(600)]
            await until(lambda: len(workers.calls) == 1200, timeout=30, why="all of them are with workers")
            workers.gate.set()
            await asyncio.gather(*calls)


async def test_a_taken_port_is_a_clear_error(edge):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(minder.EnvoyError, match=f"127.0.0.1:{port} is taken"):
            await edge(port=port)


async def test_two_on_one_machine_do_not_meet_but_not_on_one_port(edge):
    one, other = await edge(), await edge()
    assert one.port != other.port
    with pytest.raises(minder.EnvoyError, match="is taken"):
        await edge(port=one.port)
    assert one.statistics().ready
    assert other.statistics().ready


async def test_what_envoy_complains_about_is_the_error(edge):
    tls = config.Tls(certificate="/nowhere/cert.pem", private_key="/nowhere/key.pem")
    with pytest.raises(minder.EnvoyError, match=r"/nowhere/key\.pem"):
        await edge(tls=tls)


async def test_an_unusable_host_and_a_long_path_are_clear_errors(edge, run_dir):
    with pytest.raises(minder.EnvoyError, match=r"no-such-host\.invalid"):
        await edge(host="no-such-host.invalid")
    with pytest.raises(minder.EnvoyError, match="shorter run directory"):
        await edge(admin_socket=str(run_dir / ("x" * 100)))


async def test_no_binary_is_a_clear_error(workers, run_dir):
    settings = config.EnvoySettings(
        host="127.0.0.1",
        port=0,
        admin_socket=str(run_dir / "a"),
        grpc_sockets=("/x",),
        inference_sockets=("/i",),
        rest_sockets=("/y",),
    )
    one = minder.Minder(settings, run_dir=run_dir, binary=str(run_dir / "envoy"))
    with pytest.raises(minder.EnvoyError, match="cannot start"):
        await one.start()
    assert one.statistics().pid is None


async def test_killed_it_comes_back_on_the_same_port(edge):
    edge = await edge()
    before = edge.statistics()
    os.kill(before.pid, signal.SIGKILL)
    await until(lambda: not edge.statistics().ready, why="Envoy's death is noticed")
    assert "SIGKILL" in edge.why_not_ready
    await until(lambda: edge.statistics().ready, why="Envoy runs again")
    after = edge.statistics()
    assert (after.port, after.restarts) == (before.port, 1)
    assert after.pid != before.pid
    assert edge.why_not_ready is None
    async with session(edge) as http, http.get("/") as answer:
        assert answer.status == 200


async def test_stopping_lets_calls_in_flight_end(edge, workers):
    edge = await edge()
    workers.gate.clear()
    async with session(edge) as http:
        call = asyncio.ensure_future(http.get("/slow"))
        await until(lambda: workers.calls, why="the call is in flight")
        stopping = asyncio.ensure_future(edge.stop(30))
        await until(lambda: refuses(edge.port), why="new connections are refused")
        assert not stopping.done()
        workers.gate.set()
        async with await call as answer:
            assert answer.status == 200
        await stopping
    assert edge.statistics().pid is None


async def test_stopping_does_not_wait_longer_than_the_grace(edge, workers):
    edge = await edge()
    workers.gate.clear()
    async with session(edge) as http:
        call = asyncio.ensure_future(http.get("/slow"))
        await until(lambda: workers.calls, why="the call is in flight")
        await edge.stop(0.1)
        with pytest.raises(aiohttp.ClientError):
            await call
    await edge.stop(0.1)


def refuses(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


async def test_its_numbers_can_be_merged_into_metrics(edge):
    edge = await edge()
    async with session(edge) as http, http.get("/") as answer:
        await answer.read()
    snapshot = json.loads(json.dumps(await edge.snapshot()))
    text = metrics.render(metrics.merge([snapshot])).decode()
    assert "mesh_edge_calls_total 1\n" in text
    assert 'process_resident_memory_bytes{process="envoy0"}' in text
    await edge.stop(0)
    assert await edge.snapshot() == {"metrics": []}


async def raw(port, sent):
    """Sends these bytes, and returns one complete HTTP reply."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    try:
        async with asyncio.timeout(10):
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            return head + await reader.readexactly(int(length.split(b":")[1]))
    finally:
        writer.close()


async def test_a_client_that_takes_nothing_is_ended(edge, workers):
    """A client that does not read its replies is disconnected, and other clients are still served."""
    edge = await edge(unread_timeout=1.0, heap=512 << 20)
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        await loop.sock_connect(client, ("127.0.0.1", edge.port))
        # The answer is the request's header: 100 times 50 KB exceed the buffers of the kernel and of Envoy.
        head = b"GET /v2 HTTP/1.1\r\nHost: a\r\nX: %b\r\n\r\n" % (b"x" * 50_000)

        async def ended():
            with contextlib.suppress(BlockingIOError):
                client.send(head)
            return client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0

        async def broken():
            try:
                return await ended()
            except ConnectionError:
                return True

        await until(broken, timeout=30, why="the connection is ended")
    async with session(edge) as http, http.get("/v2") as answer:
        assert answer.status == 200


def frame(kind, flags, stream, payload):
    """Returns an HTTP/2 frame."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


async def test_a_stream_whose_reply_is_not_let_come_is_ended(edge, workers):
    """An HTTP/2 stream is ended if its client reads frames but never enlarges the stream's window."""
    edge = await edge(unread_timeout=1.0)
    literal = b"".join(
        b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value
        for name, value in ((b":method", b"GET"), (b":scheme", b"http"), (b":path", b"/v2"), (b":authority", b"a"))
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    window = (4).to_bytes(2, "big") + (10).to_bytes(4, "big")  # SETTINGS_INITIAL_WINDOW_SIZE: 10 bytes
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, window) + frame(1, 5, 1, literal))
    kinds = []
    async with asyncio.timeout(20):
        while 3 not in kinds:  # RST_STREAM
            head = await reader.readexactly(9)
            await reader.readexactly(int.from_bytes(head[:3], "big"))
            kinds.append(head[3])
            if head[3] == 4 and not head[4]:
                writer.write(frame(4, 1, 0, b""))
    assert 0 in kinds, "a part of the reply has arrived"
    writer.close()


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(b"GET /v2 HTTP/1.0\r\n\r\n", id="as old as can be"),
        pytest.param(b"GET /v2 HTTP/1.0\r\nHost: mesh\r\nConnection: close\r\n\r\n", id="nginx"),
        pytest.param(b"GET /v2 HTTP/1.0\r\nConnection: Keep-Alive\r\nHost: a:1\r\nAccept: */*\r\n\r\n", id="ab -k"),
        pytest.param(b"POST /v2 HTTP/1.0\r\nContent-Length: 3\r\n\r\nabc", id="with a body"),
    ],
)
async def test_http_1_0_is_served(edge, workers, head):
    edge = await edge()
    answer = await raw(edge.port, head)
    assert answer.split(b"\r\n")[0].endswith(b" 200 OK")
    ((_, seen, body),) = workers.calls
    assert seen.startswith(head.split()[0] + b" /v2 HTTP/1.1\r\n")  # the edge speaks HTTP/1.1 to workers
    assert b"\r\nhost: " in seen
    assert body == (b"abc" if b"abc" in head else b"")


@pytest.mark.parametrize("offered", [b"TLS/1.2", b"TLS/1.3, h2c", b"h2c", b"websocket", b"foo/2"])
async def test_an_offer_to_upgrade_is_ignored(edge, workers, offered):
    """An offer to upgrade the connection is ignored, such as the TLS/1.2 that Apache HttpClient sends with each
    request."""
    edge = await edge()
    head = b"POST /v2 HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: %b\r\nContent-Length: 3\r\n\r\n"
    answer = await raw(edge.port, head % offered + b"abc")
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    ((_, seen, body),) = workers.calls
    assert body == b"abc"
    assert b"upgrade" not in seen.lower()
