"""Limits of size and time for bodies over REST."""

import asyncio
import contextlib
import json
import socket

import numpy as np
import pytest

from mesh.pb import inference_pb2 as pb
from mesh.wire import server
from router.settings import RouterSettings
from tests.router.rest.conftest import FakeWorker
from tests.support.waiting import until

INFER = "/v2/models/m/infer"
SMALL = {"inputs": [{"name": "x", "shape": [1], "datatype": "INT32", "data": [1]}]}
SIZE = 900_000


@pytest.fixture(params=["aiohttp", "plain", "envoy"])
def carrier(request):
    return request.param


@pytest.fixture
async def worker():
    worker = FakeWorker(settings=RouterSettings(name="t", max_message=20 << 20))
    yield worker
    await worker.conversions.close()


async def begin(port, head, body=b""):
    """Opens a connection, and sends the head of a request with the given part of its body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"POST {INFER} HTTP/1.1\r\nHost: a\r\n{head}\r\n\r\n".encode() + body)
    return reader, writer


async def status_of(reader):
    async with asyncio.timeout(10):
        head = await reader.readuntil(b"\r\n\r\n")
    return int(head.split()[1]), head.lower()


async def test_a_body_above_the_limit_is_refused_by_its_length(served, worker):
    reader, writer = await begin(served, f"Content-Length: {worker.settings.max_message + 1}")
    status, _ = await status_of(reader)
    assert status == 413
    writer.close()


async def test_a_chunked_body_above_the_limit_is_refused_when_it_is(http, worker):
    async def pieces():
        for _ in range(21):
            yield bytes(1 << 20)

    async with http.post(INFER, data=pieces()) as answer:
        assert (answer.status, (await answer.json())["reason"]) == (413, "TOO_LARGE")


@pytest.mark.parametrize("head", ["Content-Length: {}", "Transfer-Encoding: chunked"])
async def test_a_client_that_writes_all_before_it_reads_hears_why(served, worker, head):
    """A client that writes its complete request before it reads still gets the status 413, because the refused body is
    read to its end and discarded."""
    size = 40 << 20
    body = bytes(size)
    if "chunked" in head:
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (size, body)
    reader, writer = await begin(served, head.format(size))
    for start in range(0, len(body), 1 << 20):
        writer.write(body[start : start + (1 << 20)])
        async with asyncio.timeout(10):
            await writer.drain()
        assert worker.budget.held <= worker.settings.max_message
    status, head = await status_of(reader)
    assert status == 413
    assert b"connection: close" not in head
    writer.close()


async def test_what_finds_no_room_is_refused_before_it_is_read_and_small_calls_go_on(served, http, worker):
    """Two clients send most of a large body and then stop. The next large body finds no room in the budget and is
    refused before the client has sent any of it, while small calls succeed."""
    worker.budget.limit, worker.budget.large = 4 << 20, 2 << 20
    slow = [await begin(served, f"Content-Length: {SIZE}", b" " * (SIZE - 1)) for _ in range(2)]
    await until(lambda: worker.budget.held == 2 * SIZE, why="both bodies are on their way")
    reader, writer = await begin(served, f"Content-Length: {SIZE}")
    status, head = await status_of(reader)
    assert status == 429
    assert b"\r\nretry-after: 1\r\n" in head
    writer.close()
    async with http.post(INFER, json=SMALL) as answer:
        assert answer.status == 200
    for _, writer in slow:
        writer.close()
    await until(lambda: worker.budget.held == 0, why="a client that has gone holds no memory")


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_that_does_not_come_is_ended(served, worker, monkeypatch, chunked):
    monkeypatch.setattr(server, "PATIENCE", 0.1)
    head, body = ("Transfer-Encoding: chunked", b"5\r\nabcde\r\n") if chunked else ("Content-Length: 9", b"abcde")
    reader, writer = await begin(served, head, body)
    status, _ = await status_of(reader)
    assert status == 408
    assert worker.slow == 1
    writer.close()


async def test_a_body_that_drips_is_ended(served, monkeypatch):
    monkeypatch.setattr(server, "PATIENCE", 0.3)
    reader, writer = await begin(served, "Content-Length: 100000", b"a")

    async def drip():
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(b"a")
                await writer.drain()
                await asyncio.sleep(0.02)

    dripping = asyncio.create_task(drip())
    status, _ = await status_of(reader)
    assert status == 408
    dripping.cancel()
    writer.close()


async def test_a_reply_that_nobody_reads_is_given_up(served, http, worker, monkeypatch):
    """The worker gives up a reply that its client does not read. Until then, the reply counts against the budget."""
    values = np.arange(2_000_000, dtype="<i8")
    response = pb.ModelInferResponse(model_name="m")
    response.outputs.add(name="x", datatype="INT64", shape=[len(values)])
    response.raw_output_contents.append(values.tobytes())
    worker.dispatcher.ModelInfer = lambda _: response
    body = json.dumps(SMALL | {"parameters": {"binary_data_output": True}}).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(connection, ("127.0.0.1", served))
    monkeypatch.setattr(server, "PATIENCE", 1.0)
    await loop.sock_sendall(
        connection, b"POST %b HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (INFER.encode(), len(body), body)
    )
    await until(lambda: worker.budget.held > values.nbytes // 2, why="the reply is held, less what is on its way")
    await until(lambda: worker.budget.held == 0, why="the reply is given up")
    assert worker.slow == 1
    connection.close()
    worker.dispatcher.ModelInfer = type(worker.dispatcher).ModelInfer.__get__(worker.dispatcher)
    async with http.post(INFER, json=SMALL) as answer:
        assert answer.status == 200


@pytest.mark.parametrize("binary", [False, True])
async def test_a_large_reply_comes_whole(http, worker, binary):
    values = np.arange(300_000, dtype="<i4")
    response = pb.ModelInferResponse(model_name="m")
    response.outputs.add(name="x", datatype="INT32", shape=[len(values)])
    response.raw_output_contents.append(values.tobytes())
    worker.dispatcher.ModelInfer = lambda _: response
    body = SMALL | {"parameters": {"binary_data_output": binary}}
    async with http.post(INFER, json=body) as answer:
        assert answer.status == 200, await answer.text()
        content = await answer.read()
        length = int(answer.headers.get("Inference-Header-Content-Length", len(content)))
    head = json.loads(content[:length])
    if binary:
        assert content[length:] == values.tobytes()
    else:
        assert head["outputs"][0]["data"] == values.tolist()
