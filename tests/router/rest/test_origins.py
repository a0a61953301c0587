"""Protection of management over REST against web pages, which could otherwise control a mesh on their reader's
machine."""

import asyncio
import json

import pytest

from router.rest import app, origins

MODEL = {"type": "onnx", "path": "file:///m"}
FORMS = ["text/plain", "text/plain;charset=UTF-8", "application/x-www-form-urlencoded", "multipart/form-data", None]
CHANGES = [
    ("PUT", "models/m"),
    ("POST", "models:import"),
    ("POST", "models/m/load"),
    ("POST", "models/m/release"),
    ("PATCH", "models/m"),
    ("PUT", "settings/type_limits"),
]


async def send(port, method, path, headers, body=b""):
    """Sends a request with these headers, and with the server's own address as `Host` if they contain none. Returns the
    status and the body of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = "".join(f"{name}: {value}\r\n" for name, value in {"Host": f"127.0.0.1:{port}", **headers}.items())
    head = f"{method} /mesh/v1/{path} HTTP/1.1\r\n{lines}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    writer.write(head.encode() + body)
    async with asyncio.timeout(10):
        answer = await reader.read()
    writer.close()
    head, _, content = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), content


@pytest.mark.parametrize(("method", "path"), CHANGES)
@pytest.mark.parametrize("kind", FORMS)
async def test_what_a_form_can_send_changes_nothing(served, worker, method, path, kind):
    headers = {} if kind is None else {"Content-Type": kind}
    status, content = await send(served, method, path, headers, json.dumps({"id": "m", **MODEL}).encode())
    assert (status, json.loads(content)["reason"]) == (415, "UNSUPPORTED_TYPE")
    assert "application/json" in json.loads(content)["error"]
    assert worker.management.models == {}


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "application/json"},
        {"Content-Type": "Application/JSON; charset=utf-8"},
        {"Content-Type": "application/merge-patch+json"},
        {"X-Mesh-Request": "1"},
        {"X-Mesh-Request": "1", "Content-Type": "text/plain"},
    ],
)
async def test_json_or_our_header_is_taken(served, worker, headers):
    status, _ = await send(served, "PUT", "models/m", headers, json.dumps(MODEL).encode())
    assert status == 201
    assert worker.management.models.keys() == {"m"}


async def test_an_import_is_taken_as_lines_of_json(served, worker):
    line = json.dumps({"id": "m", **MODEL}).encode() + b"\n"
    status, _ = await send(served, "POST", "models:import", {"Content-Type": "application/x-ndjson"}, line)
    assert status == 200
    assert worker.management.models.keys() == {"m"}


async def test_a_delete_needs_neither_for_browsers_ask_first(served, worker):
    worker.management.models["m"] = None
    assert (await send(served, "DELETE", "models/m", {}))[0] == 200


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("http://127.0.0.1:{port}", True),
        ("http://127.0.0.1", False),
        ("http://localhost:{port}", False),
        ("https://127.0.0.1:{port}", True),  # behind something that ends TLS
        ("http://evil.example", False),
        ("http://127.0.0.1:{port}.evil.example", False),
        ("null", False),
        ("", False),
        ("http://[", False),
    ],
)
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
async def test_another_origin_is_refused(served, method, origin, allowed):
    headers = {"Origin": origin.format(port=served), "Content-Type": "application/json"}
    status, content = await send(served, method, "models/m", headers, json.dumps(MODEL).encode())
    assert (status != 403) is allowed, content


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost", True),
        ("LOCALHOST:1", True),
        ("a.localhost:8033", True),
        ("127.0.0.2:8033", True),
        ("[::1]:8033", True),
        ("mesh", True),
        ("evil.example", False),
        ("evil.example:8033", False),
        ("127.0.0.1.evil.example", False),
        ("10.0.0.1", False),
        ("", False),
    ],
)
@pytest.mark.parametrize("method", ["GET", "PUT"])
async def test_on_loopback_a_request_has_to_be_for_this_machine(served, method, host, allowed):
    """On loopback, the host must be a loopback address, `localhost`, a name under it, or `mesh`, which Envoy gives to
    requests without a host. Otherwise a page whose host name resolves to 127.0.0.1 would have the mesh's own origin."""
    headers = {"Host": host, "Content-Type": "application/json"}
    status, content = await send(served, method, "models/m", headers, json.dumps(MODEL).encode())
    assert (status != 403) is allowed, content


async def test_where_others_may_call_any_name_will_do(worker):
    object.__setattr__(worker.settings, "listen", "0.0.0.0:8033")
    runner = await app.serve_tcp(worker, "127.0.0.1", 0, grace=1)
    headers = {"Host": "mesh.example", "Content-Type": "application/json"}
    status, _ = await send(runner.addresses[0][1], "PUT", "models/m", headers, json.dumps(MODEL).encode())
    assert status == 201
    await runner.cleanup()


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1:8033", True),
        ("[::1]:8033", True),
        ("localhost:1", True),
        ("0.0.0.0:8033", False),
        ("10.0.0.1:1", False),
    ],
)
def test_what_is_loopback(address, loopback):
    assert origins.is_loopback(address) is loopback


@pytest.mark.parametrize("head", ["HTTP/1.0\r\n", "HTTP/1.0\r\nHost: \r\n"])
async def test_old_clients_that_name_no_host_may_look(served, head):
    """A request of HTTP/1.0 without a host may read: it does not come from a browser, because browsers always send
    one."""
    reader, writer = await asyncio.open_connection("127.0.0.1", served)
    writer.write(f"GET /mesh/v1/models {head}\r\n".encode())
    async with asyncio.timeout(10):
        assert (await reader.readuntil(b"\r\n")).split()[1] == b"200"
    writer.close()


@pytest.mark.parametrize(
    "path",
    [
        "/%6Desh/v1/models:import",
        "/mesh/v%31/models:import",
        "/mesh/v1/%6Dodels:import",
        "/mesh/v1/models:imp%6Frt",
        "/mesh/v1/mod%65ls/m",
        "/mesh/v1/models/m/lo%61d",
        "/%76%32/models?prefix=m",
        "/v2/%6dodels",
        "/v2/health/l%69ve",
    ],
)
async def test_a_path_with_encoded_fixed_parts_is_unknown(served, worker, path):
    """A route is only found by its own spelling, because authorisation reads the path as it was sent."""
    for method in ("GET", "POST", "PUT", "DELETE"):
        reader, writer = await asyncio.open_connection("127.0.0.1", served)
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Mesh-Request: 1\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: 0\r\n\r\n".encode())
        async with asyncio.timeout(10):
            answer = await reader.read()
        writer.close()
        assert int(answer.split()[1]) in (404, 405), f"{method}: {answer!r}"
    assert worker.management.models == {}


async def test_an_encoded_id_is_an_id(served, worker):
    headers = {"Content-Type": "application/json"}
    status, _ = await send(served, "PUT", "models/%6D%2Fn", headers, json.dumps(MODEL).encode())
    assert status == 201
    assert worker.management.models.keys() == {"m/n"}
