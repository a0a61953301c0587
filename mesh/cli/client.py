"""A small client of the mesh's REST interface. Its errors tell the user what to do.

Every request has a timeout. Answers are plain dictionaries, and commands show only the fields that are present. The
commands therefore also work with a mesh that is one version older or newer.
"""

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote, urlsplit

from mesh.cli.exits import MeshRefusal, MeshUnreachable
from mesh.cli.trust import SYSTEM, Trust

if TYPE_CHECKING:  # it takes a quarter of a second to import, and `mesh --help` should not
    import aiohttp

DEFAULT_ENDPOINT = "http://127.0.0.1:8033"

CONNECT_SECONDS = 5.0
"""Time limit for connecting, in seconds: shorter than that of a call, so that an address which drops packets is noticed
early."""

PAGE = 1000
"""Number of models that `models()` requests at once: enough to make up for the round trip, and few enough for one
answer."""


def normalize(endpoint: str) -> str:
    """Returns the endpoint as a URL without a trailing slash. Raises ValueError, with a text for the user."""
    url = (endpoint if "://" in endpoint else f"http://{endpoint}").rstrip("/")
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # a port that is not a number
        fine = False
    if not fine:
        shown = "the text given" if "@" in endpoint else repr(endpoint)  # which may contain a password
        raise ValueError(f"{shown} is not an endpoint: write a URL such as {DEFAULT_ENDPOINT}")
    return url


def model_path(model_id: str, rest: str = "") -> str:
    """Returns the path of a model's resource; ids are percent-encoded, slashes included."""
    return f"/mesh/v1/models/{quote(model_id, safe='')}{rest}"


_HEADERS = {"x-mesh-request": "cli"}  # management calls need it: a web page cannot send it across origins by itself

_LENGTH = "Inference-Header-Content-Length"


class Client:
    """One session with one mesh: `async with Client(endpoint) as client`. `timeout` limits each request, in seconds."""

    def __init__(self, endpoint: str, *, timeout: float = 30.0, trust: Trust = SYSTEM) -> None:
        self.endpoint = normalize(endpoint)
        self._trust = trust
        self._timeout = timeout
        self._session: aiohttp.ClientSession | None = None
        self._headers = _HEADERS | trust.authorization()

    async def __aenter__(self) -> Self:
        import aiohttp

        secure = self._trust.context() if self.endpoint.startswith("https:") else True
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=secure))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str | int] | None = None,
        body: Mapping[str, Any] | Sequence[Any] | None = None,
        timeout: float | None = None,
    ) -> dict[str, Any]:
        """Sends a request and returns the JSON object of the answer. Raises MeshUnreachable or MeshRefusal."""
        data = None if body is None else json.dumps(body).encode()
        async with self._send(method, path, query, data, "application/json", timeout) as response:
            return await self._read(response)

    async def tensors(
        self, path: str, body: Mapping[str, Any], data: bytes, *, timeout: float | None = None
    ) -> tuple[dict[str, Any], bytes]:
        """Posts JSON and any binary data after it, and returns the JSON object and the binary data of the answer."""
        head = json.dumps(body).encode()
        kind, length = ("application/octet-stream", str(len(head))) if data else ("application/json", "")
        async with self._send("POST", path, None, head + data, kind, timeout, length=length) as response:
            if not response.ok or _LENGTH not in response.headers:
                return await self._read(response), b""
            whole = await response.read()
            try:
                at = int(response.headers[_LENGTH])
                return json.loads(whole[:at]), whole[at:]
            except ValueError as error:
                raise self._no_mesh(response) from error

    async def get(self, path: str, **query: str | int) -> dict[str, Any]:
        """Sends a GET request with a query, and returns the JSON object of the answer. Raises as `request` does."""
        return await self.request("GET", path, query=query)

    async def models(self, prefix: str = "", after: str = "") -> AsyncIterator[dict[str, Any]]:
        """Yields every model whose id begins with `prefix` and comes after `after`, page by page."""
        while True:
            page = await self.get("/mesh/v1/models", prefix=prefix, after=after, limit=PAGE)
            for model in page["models"]:
                yield model
            if not page.get("next"):
                return
            after = page["next"]

    async def lines(self, path: str, data: bytes, *, timeout: float | None = None) -> AsyncIterator[dict[str, Any]]:
        """Posts newline-delimited JSON, and yields the lines of the answer as they arrive."""
        async with self._send("POST", path, None, data, "application/x-ndjson", timeout) as response:
            if not response.ok:
                await self._read(response)
            async for line in response.content:
                if line.strip():
                    try:
                        yield json.loads(line)
                    except ValueError as error:
                        raise self._no_mesh(response) from error

    @asynccontextmanager
    async def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, str | int] | None,
        data: bytes | None,
        kind: str,
        timeout: float | None,
        *,
        length: str = "",
    ) -> "AsyncIterator[aiohttp.ClientResponse]":
        """Yields the answer once its headers have arrived. If the connection fails in the block, raises
        MeshUnreachable."""
        import aiohttp
        from yarl import URL

        assert self._session is not None, "use `async with`"
        url = self.endpoint + path
        if query:
            url += "?" + "&".join(f"{name}={quote(str(value), safe='')}" for name, value in query.items())
        seconds = timeout or self._timeout
        try:
            async with self._session.request(
                method,
                URL(url, encoded=True),  # taken literally: a %2F in an id stays one
                data=data,
                headers=self._headers
                | ({"content-type": kind} if data is not None else {})
                | ({_LENGTH: length} if length else {}),
                timeout=aiohttp.ClientTimeout(total=seconds, connect=min(seconds, CONNECT_SECONDS)),
                allow_redirects=False,
            ) as response:
                yield response
        except (aiohttp.ClientError, OSError) as error:  # a timeout is an OSError too
            raise self._unreachable(error, seconds) from error

    async def _read(self, response: "aiohttp.ClientResponse") -> dict[str, Any]:
        try:
            answer = json.loads(await response.read())
        except ValueError as error:
            raise self._no_mesh(response) from error
        if not isinstance(answer, dict):
            raise self._no_mesh(response)
        if response.ok:
            return answer
        if "error" not in answer:
            raise self._no_mesh(response)
        retry_after = answer.get("retry_after")
        raise MeshRefusal(
            str(answer["error"]),
            reason=str(answer.get("reason", "")),
            retry_after=float(retry_after) if isinstance(retry_after, int | float) else None,
        )

    def _unreachable(self, error: Exception, seconds: float) -> MeshUnreachable:
        import aiohttp

        if isinstance(error, TimeoutError):
            return MeshUnreachable(
                f"{self.endpoint} did not answer within {seconds:g} s: "
                "it may be overloaded, or another program may be listening there"
            )
        if isinstance(error, aiohttp.ClientConnectorError) and isinstance(error.os_error, ConnectionRefusedError):
            return MeshUnreachable(
                f"nothing answers at {self.endpoint}: is the mesh up? "
                "Start one with `mesh up`, or set --endpoint or MESH_ENDPOINT to another"
            )
        if isinstance(error, aiohttp.ClientConnectorCertificateError):
            return MeshUnreachable(
                f"{self.endpoint} presents a certificate that is not trusted: "
                f"{getattr(error.certificate_error, 'verify_message', '') or error.certificate_error}. "
                "Set --ca or MESH_CA to its authority"
            )
        if isinstance(error, aiohttp.ClientConnectorError):
            return MeshUnreachable(f"{self.endpoint} cannot be reached: {error.os_error or error}. Check --endpoint")
        return MeshUnreachable(
            f"the connection to {self.endpoint} was lost: {str(error) or 'it was closed'}. Try again"
        )

    def _no_mesh(self, response: "aiohttp.ClientResponse") -> MeshUnreachable:
        return MeshUnreachable(
            f"the server at {self.endpoint} is not the REST interface of a mesh "
            f"(HTTP {response.status} for {response.method} {response.url.raw_path}): check --endpoint"
        )
