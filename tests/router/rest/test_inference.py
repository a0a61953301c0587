"""Inference over REST: one suite for every carrier, with and without Envoy in front."""

import asyncio
import gzip
import json
import time
import zlib

import numpy as np
import pytest
from yarl import URL

from mesh.statuses import Code, MeshError, Reason
from mesh.wire import framing, metadata
from router.calls import answers
from tests.support.waiting import until

BODY = {"inputs": [{"name": "x", "shape": [2], "datatype": "INT32", "data": [1, 2]}]}
INFER = "/v2/models/m/infer"


@pytest.fixture(params=["aiohttp", "plain", "envoy"])
def carrier(request):
    return request.param


async def test_inference_in_json(http, worker):
    async with http.post(INFER, json={"id": "7", **BODY}) as answer:
        assert answer.status == 200
        assert await answer.json() == {
            "model_name": "m",
            "model_version": "1",
            "id": "7",
            "outputs": [{"name": "x", "datatype": "INT32", "shape": [2], "data": [1, 2]}],
        }
    assert worker.dispatcher.request().model_name == "m"


async def test_inference_with_binary_tensors_both_ways(http):
    head = {
        "inputs": [{"name": "x", "shape": [2], "datatype": "FP16", "parameters": {"binary_data_size": 4}}],
        "outputs": [{"name": "x", "parameters": {"binary_data": True}}],
    }
    encoded = json.dumps(head).encode()
    headers = {"inference-header-content-length": str(len(encoded)), "Content-Type": "application/octet-stream"}
    async with http.post(INFER, data=encoded + b"\1\2\3\4", headers=headers) as answer:
        assert answer.status == 200
        length = int(answer.headers["Inference-Header-Content-Length"])
        body = await answer.read()
    assert json.loads(body[:length])["outputs"][0]["parameters"] == {"binary_data_size": 4}
    assert body[length:] == b"\1\2\3\4"


async def test_a_body_of_nothing_but_the_one_input(http, worker):
    tensor = worker.dispatcher.metadata.inputs.add(name="x", datatype="FP32", shape=[-1, 2])
    raw = np.array([[1, 2], [3, 4]], "<f4").tobytes()
    async with http.post(INFER, data=raw, headers={"Inference-Header-Content-Length": "0"}) as answer:
        length = int(answer.headers["Inference-Header-Content-Length"])
        body = await answer.read()
    assert json.loads(body[:length])["outputs"][0]["shape"] == [2, 2]
    assert body[length:] == raw
    assert list(tensor.shape) == [-1, 2]


@pytest.mark.parametrize(("name", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
async def test_compressed_bodies(http, name, compress):
    body = compress(json.dumps(BODY).encode())
    async with http.post(INFER, data=body, headers={"Content-Encoding": name}) as answer:
        assert (answer.status, (await answer.json())["outputs"][0]["data"]) == (200, [1, 2])


@pytest.mark.parametrize(
    ("name", "body", "status"),
    [
        ("gzip", gzip.compress(b" " * 50_000_000, 9), 413),  # 48 kB on the wire
        ("deflate", zlib.compress(b" " * 50_000_000), 413),
        ("gzip", b"not gzip", 400),
        ("gzip", gzip.compress(b"{}", mtime=0)[:-4], 400),
        ("gzip", gzip.compress(b"{}", mtime=0) + b"more", 400),
        ("br", b"", 400),
    ],
)
async def test_compressed_bodies_that_are_refused(http, name, body, status):
    async with http.post(INFER, data=body, headers={"Content-Encoding": name}) as answer:
        assert answer.status == status
        assert (await answer.json())["reason"] == ("TOO_LARGE" if status == 413 else "BAD_REQUEST")


@pytest.mark.parametrize("cut", [1, 10, -1])
async def test_a_body_of_several_gzip_members(http, cut):
    body = json.dumps(BODY).encode()
    packed = gzip.compress(body[:cut]) + gzip.compress(b"") + gzip.compress(body[cut:])
    async with http.post(INFER, data=packed, headers={"Content-Encoding": "gzip"}) as answer:
        assert (answer.status, (await answer.json())["outputs"][0]["data"]) == (200, [1, 2])


NUMBERS = json.dumps({"inputs": [{"name": "x", "shape": [200_000], "datatype": "INT64", "data": [1] * 200_000}]})


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b" " * ((1 << 20) + 1), id="the body itself"),
        pytest.param(NUMBERS.encode(), id="its message"),  # 600 kB of JSON, 1.6 MB of tensor
    ],
)
async def test_a_body_above_the_limit_is_413(http, worker, body):
    assert worker.settings.max_message == 1 << 20
    async with http.post(INFER, data=body) as answer:
        told = await answer.json()
    assert (answer.status, told["reason"]) == (413, "TOO_LARGE")
    assert told["details"] == {"limit_bytes": "1048576", "option": "--max-message"}
    assert "--max-message" in told["error"]
    assert worker.dispatcher.calls == []


@pytest.mark.parametrize("name", ["Inference-Header-Content-Length", "X-Request-Timeout", "grpc-timeout"])
async def test_a_header_with_two_different_values_is_refused(http, carrier, name):
    """A header with two different values is refused, because using one of them would silently ignore the other."""
    joined = carrier == "envoy" and name == "grpc-timeout"  # Envoy joins the values to an invalid timeout
    body = json.dumps(BODY).encode()
    values = {"Inference-Header-Content-Length": len(body), "X-Request-Timeout": 9, "grpc-timeout": "9S"}
    same, other = str(values[name]), "10S" if name == "grpc-timeout" else "10"
    async with http.post(INFER, data=body, headers=[(name, same), (name, other)]) as answer:
        assert answer.status == 400
        assert ("timeout" if joined else name.lower()) in (await answer.json())["error"].lower()
    async with http.post(INFER, data=body, headers=[(name, same), (name, same)]) as answer:
        assert answer.status == (400 if joined else 200)


LONG = "n" * 60_000


@pytest.mark.parametrize(
    ("path", "body"),
    [
        pytest.param(INFER, {"inputs": [{"name": "x", "shape": [1], "datatype": LONG, "data": [1]}]}, id="datatype"),
        pytest.param(INFER, {"inputs": [{"name": LONG, "shape": [1], "datatype": "INT8"}]}, id="name"),
        pytest.param(INFER, {"inputs": [{"name": "x", "shape": [LONG], "datatype": "INT8", "data": [1]}]}, id="shape"),
        pytest.param(INFER, {"inputs": [{"name": "x", "shape": [1], "datatype": "INT8", "data": [LONG]}]}, id="value"),
        pytest.param(INFER, {"inputs": [], "parameters": {LONG: []}}, id="parameter"),
        pytest.param(INFER, {LONG: 1}, id="field"),
        pytest.param(f"/v2/models/m/{LONG}/x", {}, id="path"),
        pytest.param(f"/v2/{LONG}", {}, id="unknown path"),
        pytest.param(f"/v2/models/{LONG}/infer", BODY, id="model"),
    ],
)
async def test_errors_repeat_little_of_what_was_sent(http, worker, path, body):
    worker.dispatcher.error = MeshError(Reason.UNKNOWN_MODEL, f"model {LONG} is not registered")
    async with http.post(path, json=body) as answer:
        assert 400 <= answer.status < 500
        assert len(await answer.read()) < 6000


async def test_large_bodies_are_taken_apart_beside_the_event_loop(http):
    values = list(range(50_000))
    body = {"inputs": [{"name": "x", "shape": [50_000], "datatype": "INT32", "data": values}]}
    async with http.post(INFER, json=body) as answer:
        assert (await answer.json())["outputs"][0]["data"] == values


@pytest.mark.parametrize(
    ("path", "model", "version"),
    [
        ("/v2/models/m/infer", "m", ""),
        ("/v2/models/m/versions/3/infer", "m", "3"),
        ("/v2/models/a%2Fb/infer", "a/b", ""),
        ("/v2/models/a/b/infer", "a/b", ""),  # as tritonclient writes it
        ("/v2/models/a%2Fb/versions/1%2F2/infer", "a/b", "1/2"),
        ("/v2/models/a%252Fb/infer", "a%2Fb", ""),
        ("/v2/models/%C3%A4%20%7Bx%7D%0A/infer", "ä {x}\n", ""),
        ("/v2/models/infer/infer", "infer", ""),
        ("/v2/models/versions/infer", "versions", ""),
        ("/v2/models/a//b/../c/infer", "a//b/../c", ""),
        ("/v2/models/a+b/infer?x=1", "a+b", ""),
    ],
)
async def test_ids_and_versions_in_paths(http, served, worker, path, model, version):
    async with http.post(URL(f"http://127.0.0.1:{served}{path}", encoded=True), json=BODY) as answer:
        assert answer.status == 200, await answer.text()
    request = worker.dispatcher.request()
    assert (request.model_name, request.model_version) == (model, version)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v2/models/%FF/infer", 400),
        ("/v2/models/m", 404),
        ("/v2/models/m/predict", 404),
        ("/v2/models/m/generate", 501),
        ("/v2/models//infer", 400),
    ],
)
async def test_paths_at_which_nothing_is_inferred(http, served, path, status):
    async with http.post(URL(f"http://127.0.0.1:{served}{path}", encoded=True)) as answer:
        body = await answer.json()
        assert answer.status == status
        assert body["reason"] in ("UNKNOWN_METHOD", "BAD_REQUEST", "UNSUPPORTED")
        assert body["error"]


@pytest.mark.parametrize("reason", list(Reason))
async def test_every_failure_of_ours_has_its_status_and_reason(http, worker, reason):
    worker.dispatcher.error = MeshError(reason, "it is so", details={"pod": "p"})
    async with http.post(INFER, json=BODY) as answer:
        assert answer.status == reason.http
        assert await answer.json() == {
            "error": "it is so",
            "reason": reason.name,
            "code": int(reason.code),
            "details": {"pod": "p"},
        }


async def test_how_long_to_wait_is_said_in_header_and_body(http, worker):
    worker.dispatcher.error = MeshError(Reason.NOT_IN_TIME, "loading", retry_after=2.25)
    async with http.post(INFER, json=BODY) as answer:
        assert (answer.status, answer.headers["Retry-After"]) == (503, "3")
        assert (await answer.json())["retry_after"] == 2.25


@pytest.mark.parametrize(
    ("code", "status", "name"),
    [(3, 400, "INVALID_ARGUMENT"), (5, 404, "NOT_FOUND"), (13, 500, "INTERNAL"), (99, 500, "UNKNOWN")],
)
async def test_a_model_servers_error_is_passed_on(http, worker, code, status, name):
    details = ((answers.DETAILS, b"broken"),)
    worker.dispatcher.answer = lambda call: call.fail(code, "unexpected input", trailers=details)
    async with http.post(INFER, json=BODY) as answer:
        assert answer.status == status
        assert await answer.json() == {"error": "unexpected input", "reason": name, "code": code}


async def test_details_of_somebody_else_do_not_change_the_status(http, worker):
    """A model server sends Mesh's error details with a status code that does not match them. The code decides."""

    def answer(call):
        error = MeshError(Reason.NOWHERE, "x")
        call.fail(Code.INTERNAL, "mine", trailers=((answers.DETAILS, metadata.encode_bin(error.grpc_details())),))

    worker.dispatcher.answer = answer
    async with http.post(INFER, json=BODY) as reply:
        assert (reply.status, (await reply.json())["reason"]) == (500, "INTERNAL")


async def test_an_answer_that_is_no_message_is_an_internal_error(http, worker):
    for frame in (framing.pack(b"\xff"), b"\1\0\0\0\0", b"\0"):
        worker.dispatcher.answer = lambda call, frame=frame: call.reply(frame)
        async with http.post(INFER, json=BODY) as answer:
            assert answer.status in (400, 500)
            assert "model server's answer" in (await answer.json())["error"]


async def test_a_compressed_answer_is_read(http, worker):
    message = worker.dispatcher.ModelInfer

    def answer(call):
        plain = message(framing.unpack(call.frame, limit=1 << 20)).SerializeToString()
        packed = gzip.compress(plain)
        call.reply(b"\1" + len(packed).to_bytes(4, "big") + packed, ((b"grpc-encoding", b"gzip"),))

    worker.dispatcher.answer = answer
    async with http.post(INFER, json=BODY) as reply:
        assert (await reply.json())["outputs"][0]["data"] == [1, 2]


async def test_a_dispatcher_that_raises_is_an_internal_error(http, worker):
    worker.dispatcher.answer = lambda call: 1 / 0
    async with http.post(INFER, json=BODY) as answer:
        assert (answer.status, (await answer.json())["reason"]) == (500, "INTERNAL")


async def test_a_reply_in_parts_is_a_reply(http, worker):
    async def answer(call):
        frame = await call.read()
        assert await call.read() is None
        reply = worker.dispatcher.ModelInfer(framing.unpack(frame, limit=1 << 20))
        call.start()
        await call.write(framing.pack(reply.SerializeToString()))
        call.finish()

    tasks = []
    worker.dispatcher.answer = lambda call: tasks.append(asyncio.ensure_future(answer(call)))
    async with http.post(INFER, json=BODY) as reply:
        assert reply.status == 200


async def test_headers_become_metadata(http, worker):
    """A client's headers become metadata, except a proxy's headers and Mesh's internal ones. The authorization is
    included, because the dispatcher checks it."""
    headers = {
        "X-Tenant": "a",
        "mm-balanced": "true",
        "traceparent": "00-1",
        "mesh-copy": "stolen",
        "Authorization": "secret",
        "x-forwarded-for": "1.2.3.4",
        "x-data-bin": "AAE",
    }
    async with http.post(INFER, json=BODY, headers=headers):
        pass
    assert dict(worker.dispatcher.calls[-1].headers) == {
        b"x-tenant": b"a",
        b"mm-balanced": b"true",
        b"traceparent": b"00-1",
        b"authorization": b"secret",
        b"x-data-bin": b"AAE",
    }


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [({}, 300), ({"x-request-timeout": "1.5"}, 1.5), ({"grpc-timeout": "20S"}, 20)],
)
async def test_the_deadline_comes_from_the_header_or_is_the_default(http, worker, headers, seconds):
    async with http.post(INFER, json=BODY, headers=headers):
        pass
    left = worker.dispatcher.calls[-1].deadline - time.monotonic()  # the deadline is by the loop's clock
    assert seconds - 30 < left <= seconds


@pytest.mark.parametrize("text", ["", "soon", "-1", "0", "nan", "inf", "1e12"])
async def test_a_time_out_that_is_none_is_refused(http, text):
    async with http.post(INFER, json=BODY, headers={"x-request-timeout": text}) as answer:
        assert answer.status == 400


@pytest.mark.parametrize("text", ["-1", "1.0", "x", "9" * 20])
async def test_a_header_length_that_is_none_is_refused(http, text):
    async with http.post(INFER, json=BODY, headers={"Inference-Header-Content-Length": text}) as answer:
        assert answer.status == 400


async def test_a_passed_deadline_is_504(http, worker):
    def until_then(call):
        error = MeshError(Reason.DEADLINE, "the deadline has passed")
        asyncio.get_running_loop().call_at(call.deadline, answers.fail, call, error)

    worker.dispatcher.answer = until_then
    async with http.post(INFER, json=BODY, headers={"x-request-timeout": "0.02"}) as answer:
        assert (answer.status, (await answer.json())["code"]) == (504, Code.DEADLINE_EXCEEDED)


async def test_a_client_that_goes_away_cancels_the_call(http, worker):
    cancelled = asyncio.Event()
    worker.dispatcher.answer = lambda call: call.on_cancel(cancelled.set)
    request = asyncio.ensure_future(http.post(INFER, json=BODY))
    await until(lambda: worker.dispatcher.calls, why="the call arrives")
    request.cancel()
    async with asyncio.timeout(10):
        await cancelled.wait()
    assert worker.dispatcher.calls[-1].cancelled
