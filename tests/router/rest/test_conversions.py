"""Conversion of large JSON in a process beside the worker. The result is the worker's own, and a failure affects one
call."""

import asyncio
import collections
import fcntl
import gc
import json
import os
import resource
import signal
import socket

import numpy as np
import pytest

from mesh.pb import inference_pb2 as pb
from mesh.statuses import Code, MeshError, Reason
from mesh.wire import framing
from router.rest import conversions, documents, inference, jsontext, papers
from tests.support.localmesh import freeze, thaw
from tests.support.waiting import until

INFER = "/v2/models/m/infer"
MESSAGE = 4 << 20


@pytest.fixture
async def converter():
    made = conversions.Conversions(max_message=MESSAGE, timeout=30)
    yield made
    await made.close()


def body_of(*inputs, blobs=b"", **more):
    """Returns a body and the length of its JSON part, or None as the length if there are no blobs."""
    head = json.dumps({"inputs": inputs, **more}).encode()
    return head + blobs, len(head) if blobs else None


def tensor(name, datatype, shape, **more):
    return {"name": name, "datatype": datatype, "shape": shape, **more}


STRINGS = b"\2\0\0\0ab\0\0\0\0" * 10_000
BODIES = [
    body_of(tensor("x", "FP32", [3], data=[1, 2.5, -3e-9]), id="7", parameters={"a": 1}),
    body_of(tensor("x", "INT64", [2], data=[1e18, 9007199254740993]), outputs=[{"name": "y"}]),
    body_of(tensor("x", "BYTES", [2], data=["ä", "\ud83d\ude00"])),
    body_of(tensor("x", "BYTES", [20_000], parameters={"binary_data_size": len(STRINGS)}), blobs=STRINGS),
    body_of(tensor("x", "FP64", [50_000], data=list(np.arange(50_000) / 7)), parameters={"binary_data_output": True}),
    body_of(tensor("x", "INT8", [1], data=[300])),
    body_of(tensor("x", "INT8", [2], data=[3])),
    body_of(tensor("x", "INT8", [1], data=[3], parameters={"shared_memory_region": "r"})),
    (b"not json", None),
    (b"\xff", None),
    (b"[" * 100_000, None),
    (b"{}", 9),
]


@pytest.mark.parametrize("place", range(len(BODIES)))
async def test_it_converts_as_the_worker_does(converter, place):
    """The process converts as the worker does: messages, requested outputs, and errors with their reasons and texts."""
    body, header_length = BODIES[place]
    pieces = [body[:7], body[7:100], body[100:]]
    try:
        message, form = documents.decode_request("m/ü", "2", body, header_length)
    except MeshError as expected:
        with pytest.raises(MeshError) as caught:
            await converter.to_message("m/ü", "2", pieces, header_length)
        assert (caught.value.reason, caught.value.text) == (expected.reason, expected.text)
    else:
        frame, found = await converter.to_message("m/ü", "2", pieces, header_length)
        assert pb.ModelInferRequest.FromString(framing.unpack(frame, limit=MESSAGE)) == message
        assert found == form
    assert converter.starts == 1


@pytest.mark.parametrize("binary", [False, True])
async def test_replies_become_bodies_as_in_the_worker(converter, binary):
    response = pb.ModelInferResponse(model_name="m", id="1")
    response.outputs.add(name="a", datatype="FP32", shape=[100_000])
    response.outputs.add(name="b", datatype="BYTES", shape=[2])
    response.raw_output_contents.extend([np.arange(100_000, dtype="<f4").tobytes(), b"\2\0\0\0ab\0\0\0\0"])
    form = documents.Form(outputs={"a": binary})
    paper, json_length = await converter.to_body(framing.pack(response.SerializeToString()), b"", form)
    assert (bytes(paper.body), json_length) == documents.encode_response(response, form)
    with pytest.raises(MeshError) as caught:
        await converter.to_body(framing.pack(b"\xff\xff"), b"", form)
    assert caught.value.reason is Reason.INTERNAL
    with pytest.raises(MeshError) as caught:
        await converter.to_body(framing.pack(bytes(MESSAGE + 1)), b"", form)
    assert caught.value.reason is Reason.TOO_LARGE


async def reply_of(converter, value, size):
    """Converts a reply with one output of `size` equal numbers. Returns the paper with the body, and the expected
    body."""
    response = pb.ModelInferResponse(model_name="m")
    response.outputs.add(name="a", datatype="INT32", shape=[size])
    response.raw_output_contents.append(np.full(size, value, "<i4").tobytes())
    paper, _ = await converter.to_body(framing.pack(response.SerializeToString()), b"", documents.ALL_JSON)
    return paper, documents.encode_response(response, documents.ALL_JSON)[0]


async def test_a_worker_with_thousands_of_connections_converts_bodies(converter, monkeypatch):
    """The descriptor between a worker and its converter may have a number above 1023, which `select` refuses."""
    pair = socket.socketpair

    def high(*args):
        ours, theirs = pair(*args)
        with theirs:
            return ours, socket.socket(fileno=fcntl.fcntl(theirs.fileno(), fcntl.F_DUPFD_CLOEXEC, 1100))

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    monkeypatch.setattr(socket, "socketpair", high)
    try:
        for value in range(3):  # before each but the first, the converter waits for the descriptor
            paper, expected = await reply_of(converter, value, 10)
            assert bytes(paper.body) == expected
            paper.close()
        assert converter.starts == 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


async def test_a_reply_that_is_still_sent_is_not_changed_by_the_next(converter):
    """Replies that are still being sent from memory do not change while other bodies and replies are converted."""
    sending = [await reply_of(converter, number, 100_000 - number) for number in range(4)]
    for number in range(3):
        paper, expected = await reply_of(converter, 7, 10 + number)
        assert bytes(paper.body) == expected, "a short reply, in memory of a long one"
        paper.close()
        await converter.to_message("m", "", [LARGE], None)
    assert all(bytes(paper.body) == expected for paper, expected in sending)
    for paper, _ in sending:
        paper.close()
    assert len(converter._files.sizes) == papers.FILES
    assert converter.starts == 1


async def test_memory_of_conversions_is_freed_when_none_follows(monkeypatch):
    monkeypatch.setattr(papers, "IDLE", 0.01)
    made = conversions.Conversions(max_message=MESSAGE, timeout=30)
    descriptors = len(os.listdir("/proc/self/fd"))
    late, _ = await reply_of(made, 1, 100_000)
    await made.to_message("m", "", [LARGE], None)
    await until(lambda: not made._files.sizes, why="the files are freed")
    late.close()
    assert made._files.sizes == [], "a file that is returned after that is not kept"
    await made.close()
    assert len(os.listdir("/proc/self/fd")) <= descriptors  # fewer if something of an earlier test was closed


LARGE, _ = body_of(tensor("x", "INT32", [50_000], data=[7] * 50_000))


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSEGV])
async def test_if_it_dies_that_call_fails_alone(converter, end):
    await converter.to_message("m", "", [LARGE], None)
    pid = converter.pid
    used = {file.number for file in converter._files._files}
    freeze(pid)
    first = asyncio.create_task(converter.to_message("m", "", [LARGE], None))
    second = asyncio.create_task(converter.to_message("m", "", [LARGE], None))
    await asyncio.sleep(0)
    os.kill(pid, end)
    thaw(pid)
    with pytest.raises(MeshError) as caught:
        await first
    assert caught.value.reason is Reason.INTERNAL
    assert end.name in caught.value.text
    frame, _ = await second
    assert len(frame) > 200_000
    assert all(file.number not in used for file in converter._files._files), "it may have written to those"
    assert (converter.starts, converter.pid != pid) == (2, True)


async def test_one_that_hangs_is_replaced():
    made = conversions.Conversions(max_message=MESSAGE, timeout=0.2)
    made._timeout = 30
    await made.to_message("m", "", [LARGE], None)
    freeze(made.pid)
    made._timeout = 0.2
    with pytest.raises(MeshError) as caught:
        await made.to_message("m", "", [LARGE], None)
    assert "took more than" in caught.value.text
    made._timeout = 30
    await made.to_message("m", "", [LARGE], None)
    assert made.starts == 2
    await made.close()


async def test_callers_that_leave_keep_nothing_and_harm_nobody(converter):
    await converter.to_message("m", "", [LARGE], None)
    converter._trim()
    gc.collect()
    files = len(os.listdir("/proc/self/fd"))
    freeze(converter.pid)
    callers = [asyncio.create_task(converter.to_message("m", "", [LARGE], None)) for _ in range(5)]
    await asyncio.sleep(0)
    for caller in callers:
        caller.cancel()
    await asyncio.gather(*callers, return_exceptions=True)
    thaw(converter.pid)
    await converter.to_message("m", "", [LARGE], None)
    assert converter.count == 3, "only conversions that had begun, or whose callers stayed, are made"
    assert len(converter._files.sizes) <= papers.FILES
    converter._trim()
    assert len(os.listdir("/proc/self/fd")) <= files  # fewer if something of an earlier test was closed
    assert converter.starts == 1


async def test_json_that_takes_too_much_memory_is_refused_and_the_process_lives(monkeypatch):
    monkeypatch.setattr(conversions, "_MEMORY", 160 << 20)
    monkeypatch.setattr(conversions, "_PER_BYTE", 1)
    made = conversions.Conversions(max_message=MESSAGE)
    with pytest.raises(MeshError) as caught:
        await made.to_message("m", "", [b'{"inputs": [', b"{}," * 4_000_000, b"{}]}"], None)
    assert caught.value.reason is Reason.TOO_LARGE
    await made.to_message("m", "", [LARGE], None)
    assert made.starts == 1
    await made.close()


# --- behind REST ---


async def test_small_bodies_start_no_process(http, worker):
    async with http.post(INFER, json={"inputs": [tensor("x", "INT32", [2], data=[1, 2])]}) as answer:
        assert answer.status == 200
    assert worker.conversions.starts == 0


@pytest.mark.parametrize("which", ["body", "reply"])
async def test_small_calls_go_on_while_a_large_one_is_converted(http, worker, which):
    """Small calls succeed while a large one waits for the converter, which a signal has stopped."""
    values = [1] * 60_000
    if which == "reply":  # a small request gets a large reply
        response = pb.ModelInferResponse(model_name="m")
        response.outputs.add(name="x", datatype="INT32", shape=[60_000])
        response.raw_output_contents.append(np.array(values, "<i4").tobytes())
        large = {"inputs": [tensor("x", "INT32", [1], data=[1])], "id": "large"}
        ordinary = worker.dispatcher.ModelInfer
        worker.dispatcher.ModelInfer = lambda message: response if b"large" in message else ordinary(message)
    else:
        large = {"inputs": [tensor("x", "INT32", [60_000], data=values)]}
    small = {"inputs": [tensor("x", "INT32", [2], data=[1, 2])]}
    async with http.post(INFER, json=large) as answer:
        assert (await answer.json())["outputs"][0]["data"] == values
    freeze(worker.conversions.pid)
    waiting = asyncio.create_task(http.post(INFER, json=large))
    await until(lambda: worker.conversions._turn.locked(), why="the large body is being converted")
    for _ in range(3):
        async with http.post(INFER, json=small) as answer:
            assert (await answer.json())["outputs"][0]["data"] == [1, 2]
    assert not waiting.done()
    thaw(worker.conversions.pid)
    async with await waiting as answer:
        assert (await answer.json())["outputs"][0]["data"] == values


@pytest.mark.parametrize("max_message", [64 << 20])
@pytest.mark.parametrize("carrier", ["aiohttp", "plain"])
@pytest.mark.parametrize("which", ["body", "reply"])
async def test_no_turn_of_the_loop_reads_large_json_or_copies_more_than_a_slice(served, worker, monkeypatch, which):
    """The worker neither reads nor writes JSON of more than `inference.SMALL` bytes itself. In each turn of its event
    loop, it copies at most one slice of a body or of a reply into the converter's memory."""
    turn = 0
    copied = collections.Counter()
    write, loop = papers.File._write, asyncio.get_running_loop()

    def tick():
        nonlocal turn, ticking
        turn += 1
        ticking = loop.call_soon(tick)

    def counted(mapping, at, data):
        copied[turn] += len(data)
        write(mapping, at, data)

    def bounded(function, size):
        def checked(*args, **kwargs):
            found = function(*args, **kwargs)
            assert size(args, found) <= inference.SMALL
            return found

        return checked

    monkeypatch.setattr(papers.File, "_write", staticmethod(counted))
    for name in ("load", "load_object"):
        monkeypatch.setattr(jsontext, name, bounded(getattr(jsontext, name), lambda args, _: len(args[0])))
    monkeypatch.setattr(jsontext, "dump", bounded(jsontext.dump, lambda _, found: len(found)))

    size = 1_000_000
    raw = np.linspace(0, 1, size, dtype="<f8").tobytes()
    response = pb.ModelInferResponse(model_name="m")
    response.outputs.add(name="y", datatype="FP64", shape=[size])
    response.raw_output_contents.append(raw)
    if which == "reply":
        worker.dispatcher.ModelInfer = lambda _: response
        body = json.dumps({"inputs": [tensor("x", "INT8", [1], data=[1])]}).encode()
    else:
        worker.dispatcher.ModelInfer = lambda _: pb.ModelInferResponse(model_name="m")
        body = json.dumps({"inputs": [tensor("x", "FP64", [size], data=np.frombuffer(raw).tolist())]}).encode()
    ticking = loop.call_soon(tick)
    reader, writer = await asyncio.open_connection("127.0.0.1", served)
    writer.write(b"POST %b HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % (INFER.encode(), len(body)))
    writer.write(body)
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    answer = await reader.readexactly(int(head.partition(b"content-length: ")[2].split()[0]))
    writer.close()
    ticking.cancel()
    assert b" 200 " in head, answer
    whole = len(raw) if which == "reply" else len(body)
    assert sum(copied.values()) >= whole
    assert max(copied.values()) <= papers.SLICE
    assert len(copied) >= whole // papers.SLICE
    if which == "reply":
        assert len(answer) > 10_000_000
    else:
        assert worker.dispatcher.request().raw_input_contents[0] == raw


async def test_a_conversion_is_waited_for_no_longer_than_the_callers_deadline(http, worker):
    large = {"inputs": [tensor("x", "INT32", [60_000], data=[1] * 60_000)]}
    async with http.post(INFER, json=large) as answer:
        assert answer.status == 200
    freeze(worker.conversions.pid)
    async with http.post(INFER, json=large, headers={"X-Request-Timeout": "0.2"}) as answer:
        assert answer.status == 504
    assert worker.budget.held == 0
    thaw(worker.conversions.pid)


async def test_large_strings_in_binary_are_looked_at_beside_the_worker(http, worker):
    """The converter checks large binary tensors of strings, because Python needs a second for a million empty strings,
    which are 4 MB."""
    blob = bytes(4 * 100_000)
    body, length = body_of(tensor("x", "BYTES", [100_000], parameters={"binary_data_size": len(blob)}), blobs=blob)
    headers = {"Inference-Header-Content-Length": str(length)}
    async with http.post(INFER, data=body, headers=headers) as answer:
        assert (await answer.json())["outputs"][0]["data"] == [""] * 100_000
    assert worker.conversions.count == 2
    assert worker.dispatcher.request().raw_input_contents[0] == blob


async def test_the_fate_of_a_large_call_is_told_as_any_others(http, worker):
    worker.dispatcher.error = MeshError(Reason.UNKNOWN_MODEL, "no such model")
    large = {"inputs": [tensor("x", "INT32", [60_000], data=[1] * 60_000)]}
    async with http.post(INFER, json=large) as answer:
        told = await answer.json()
    assert (answer.status, told["code"]) == (404, Code.NOT_FOUND)
