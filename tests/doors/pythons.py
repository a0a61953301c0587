"""HTTP clients in Python. Each runs in its own process: `python -m tests.doors.pythons requests 127.0.0.1:8033`."""

import asyncio
import gzip
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

ONE = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [1]}]}).encode()
JSON = {"Content-Type": "application/json"}
LENGTH = "Inference-Header-Content-Length"
MANY = 1 << 20  # floats: 4 MiB

Answer = tuple[int, Mapping[str, str], bytes]
Ask = Callable[[str, str, Mapping[str, str], bytes | None], Answer]


def calls(ask: Ask, base: str) -> None:
    """Makes all calls that every client must be able to make."""

    def expect(
        part: bytes, method: str, path: str, headers: Mapping[str, str] = JSON, body: bytes | None = None
    ) -> None:
        status, _, answer = ask(method, base + path, headers, body)
        assert status == 200, answer
        assert part in answer, answer

    for _ in range(20):
        expect(b'"data":[7.0]', "POST", "/v2/models/seven/infer", JSON, ONE)
    expect(b'"name": "x"', "GET", "/v2/models/seven")
    expect(b"true", "GET", "/v2/models/a%2Fslash/ready")
    expect(b'"seven"', "GET", "/mesh/v1/models")
    expect(b"7.0", "POST", "/v2/models/seven/infer", JSON | {"Content-Encoding": "gzip"}, gzip.compress(ONE))
    tensor = np.arange(MANY, dtype=np.float32).tobytes()
    shown = {"name": "x", "datatype": "FP32", "shape": [MANY], "parameters": {"binary_data_size": len(tensor)}}
    head = json.dumps({"inputs": [shown], "parameters": {"binary_data_output": True}}).encode()
    headers = {"Content-Type": "application/octet-stream", LENGTH: str(len(head))}
    status, found, answer = ask("POST", f"{base}/v2/models/a%2Fslash/infer", headers, head + tensor)
    assert status == 200, answer[:500]
    assert answer[int(found[LENGTH]) :] == tensor
    for method, path, expected in (
        ("POST", "/v2/models/a%2Fslash/generate", 501),
        ("PUT", "/mesh/v1/models/large", 413),
        ("POST", "/v2/models/a%2Fslash/infer", 413),
    ):
        status, _, answer = ask(method, base + path, headers | JSON, bytes(20 << 20))
        assert status in (expected, 413), answer[:500]
    assert b"--max-message" in answer or b"nginx" in answer  # nginx has a limit of the same size


def by_urllib(base: str) -> None:
    """Calls with urllib, which does not reuse connections and sends the whole request before it reads the answer."""
    import urllib.error
    import urllib.request

    def ask(method: str, url: str, headers: Mapping[str, str], body: bytes | None) -> Answer:
        request = urllib.request.Request(url, body, dict(headers), method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()

    calls(ask, base)


def by_requests(base: str) -> None:
    """Calls with a session of requests, which is built on urllib3."""
    import requests

    with requests.Session() as session:

        def ask(method: str, url: str, headers: Mapping[str, str], body: bytes | None) -> Answer:
            answer = session.request(method, url, headers=headers, data=body, timeout=60)
            return answer.status_code, answer.headers, answer.content

        calls(ask, base)


def by_httpx(base: str) -> None:
    """Calls with httpx over HTTP/1.1, its default."""
    import httpx

    with httpx.Client(timeout=60) as client:

        def ask(method: str, url: str, headers: Mapping[str, str], body: bytes | None) -> Answer:
            answer = client.request(method, url, headers=dict(headers), content=body)
            return answer.status_code, answer.headers, answer.content

        calls(ask, base)


def by_aiohttp(base: str) -> None:
    """Calls with aiohttp. The paths are passed as encoded, because its own `URL` would decode %2F."""
    import aiohttp
    import yarl

    async def work() -> None:
        async with aiohttp.ClientSession() as session:
            loop = asyncio.get_running_loop()

            async def one(method: str, url: str, headers: Mapping[str, str], body: bytes | None) -> Answer:
                target = yarl.URL(url, encoded=True)
                async with session.request(method, target, headers=headers, data=body) as answer:
                    return answer.status, answer.headers, await answer.read()

            def ask(*arguments: Any) -> Answer:
                return asyncio.run_coroutine_threadsafe(one(*arguments), loop).result(60)

            await asyncio.to_thread(calls, ask, base)

    asyncio.run(work())


CLIENTS = {"urllib": by_urllib, "requests": by_requests, "httpx": by_httpx, "aiohttp": by_aiohttp}

if __name__ == "__main__":
    CLIENTS[sys.argv[1]](f"http://{sys.argv[2]}")
    print("served")
