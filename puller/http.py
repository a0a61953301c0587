"""`http:` and `https:` URLs: one URL, one file.

What the predecessor got wrong is refused here: an answer other than 200 is an error and not a model, a body shorter
than announced is noticed, a redirect is followed only to where the URL itself might have pointed. The addresses
allowed are those of `addresses`, checked on each socket before it connects, so neither redirects nor name servers
lead elsewhere. Proxies of the environment are not used: behind one, nothing could be said about addresses.

Compression is declined, since the announced length is that of the file. Credentials in the URL (`user:password@`) are
sent to the URL's own origin only; neither they nor the query appear in errors.
"""

import asyncio
import base64
import errno
import os
import re
import socket
import ssl
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import aiohttp
from yarl import URL

from puller import addresses
from puller.disk import write_error
from puller.errors import PullError, PullErrorKind
from puller.provider import Target
from puller.source import Location, redact

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MAX_REDIRECTS = 5
_SMALL = 2**20  # bytes; up to this, a body is written at once on the event loop: the disk is the pod's own
_BATCH = 4 * 2**20  # bytes collected for one hop to a thread
_WRITERS = 4


@dataclass(frozen=True, slots=True)
class HttpPolicy:
    """What the operator allows. Times in seconds."""

    allow_private: bool = False  # loopback and private networks
    allow_link_local: bool = False
    ca: bytes | None = None  # PEM, trusted besides the system's
    connect_timeout: float = 10.0
    read_timeout: float = 30.0  # between two pieces
    total_timeout: float = 900.0
    connections: int = 32

    def refusal(self, host: str) -> str | None:
        """Why an address may not be connected to; None if it may."""
        return addresses.refusal(host, allow_private=self.allow_private, allow_link_local=self.allow_link_local)


class _AddressRefused(OSError):
    """A socket that must not be made."""


class HttpProvider:
    """Fetches single files by GET."""

    def __init__(self, policy: HttpPolicy) -> None:
        self._policy = policy
        self._session: aiohttp.ClientSession | None = None  # made on first use: it belongs to the running loop
        self._executor: ThreadPoolExecutor | None = None  # for large bodies

    async def fetch(self, location: Location, target: Target) -> int:
        """Writes the body of the URL to the target file."""
        try:
            async with asyncio.timeout(self._policy.total_timeout):
                return await self._fetch(location, target)
        # `from None`: what aiohttp says may quote the URL's query, and a traceback shows causes.
        except TimeoutError:
            raise PullError(PullErrorKind.TIMEOUT, f"{location.shown} did not answer in time") from None
        except aiohttp.ClientPayloadError:
            raise PullError(PullErrorKind.INTEGRITY, f"{location.shown} ended before all of it had arrived") from None
        except aiohttp.ClientError as error:
            raise _client_error(error, location.shown) from None
        except OSError as error:
            raise write_error(error) or _os_error(error, location.shown) from None

    async def close(self) -> None:
        """Closes its connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = None

    async def _fetch(self, location: Location, target: Target) -> int:
        url = _parse(location.uri)
        headers: dict[str, str] = {}
        if url.user or url.password:
            pair = f"{url.user or ''}:{url.password or ''}".encode()
            headers["Authorization"] = "Basic " + base64.b64encode(pair).decode()
        url = url.with_user(None)
        origin = url.origin()
        for _ in range(_MAX_REDIRECTS + 1):
            async with self._opened().get(
                url, allow_redirects=False, headers=headers if url.origin() == origin else None
            ) as response:
                if response.status not in _REDIRECTS:
                    return await self._save(response, location.shown, target)
                url = _follow(url, response, location.shown)
        raise PullError(PullErrorKind.BAD_REQUEST, f"{location.shown} redirects more than {_MAX_REDIRECTS} times")

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            context = ssl.create_default_context()
            if self._policy.ca is not None:
                context.load_verify_locations(cadata=self._policy.ca.decode())
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    ssl=context, limit=self._policy.connections, socket_factory=_guard(self._policy.refusal)
                ),
                timeout=aiohttp.ClientTimeout(
                    total=None, sock_connect=self._policy.connect_timeout, sock_read=self._policy.read_timeout
                ),
                headers={"Accept-Encoding": "identity", "User-Agent": "mesh-puller"},
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trust_env=False,
            )
        return self._session

    async def _save(self, response: aiohttp.ClientResponse, shown: str, target: Target) -> int:
        if response.status != 200:
            raise _status_error(response.status, shown)
        encoding = response.headers.get("Content-Encoding", "identity").lower()
        if encoding != "identity":
            text = f"{shown} is sent compressed ({encoding}) although that was declined"
            raise PullError(PullErrorKind.BAD_REQUEST, text)
        announced = response.content_length
        if announced is not None:
            target.admit(announced)
        if announced is not None and announced <= _SMALL:
            body = await response.read()
            size = len(body)
            target.path.write_bytes(body)
        else:
            size = await self._stream(response, target)
        if announced is not None and size != announced:
            text = f"{shown} announced {announced} bytes and sent {size}"
            raise PullError(PullErrorKind.INTEGRITY, text)
        return size

    async def _stream(self, response: aiohttp.ClientResponse, target: Target) -> int:
        if self._executor is None:
            self._executor = ThreadPoolExecutor(_WRITERS, thread_name_prefix="puller-write")
        size = 0
        pieces: list[bytes] = []
        pending = 0
        # Unbuffered: each batch is one write.
        with open(target.path, "xb", buffering=0) as file:  # noqa: ASYNC230 - the pod's own disk
            async for piece in response.content.iter_any():
                pieces.append(piece)
                size += len(piece)
                pending += len(piece)
                if pending >= _BATCH:
                    target.admit(size, written=size - pending)
                    await _in_thread(self._executor, _write, file.fileno(), pieces)
                    pieces, pending = [], 0
            target.admit(size, written=size - pending)
            await _in_thread(self._executor, _write, file.fileno(), pieces)
        return size


async def _in_thread(executor: ThreadPoolExecutor, function: Callable[..., None], *arguments: object) -> None:
    """Runs a short function in a thread and, cancelled, still sees it to its end: its file must stay open."""
    work = asyncio.get_running_loop().run_in_executor(executor, function, *arguments)
    cancelled = False
    while not work.done():
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        work.exception()  # what the write said is nobody's business any more
        raise asyncio.CancelledError
    work.result()


def _write(descriptor: int, pieces: list[bytes]) -> None:
    view = memoryview(b"".join(pieces))
    while view:
        view = view[os.write(descriptor, view) :]


def _guard(refusal: Callable[[str], str | None]) -> Callable[[tuple[Any, ...]], socket.socket]:
    """Makes sockets only for allowed addresses: aiohttp calls it with each address that it is about to connect to."""

    def make(info: tuple[Any, ...]) -> socket.socket:
        family, kind, protocol, _, address = info
        why = refusal(address[0])
        if why is not None:
            raise _AddressRefused(errno.EACCES, f"{address[0]} is {why}, which the operator does not allow")
        return socket.socket(family=family, type=kind, proto=protocol)

    return make


def _parse(text: str, base: URL | None = None) -> URL:
    try:
        # Taken as it stands where it can stand in a request line: a signed URL must not be quoted anew.
        url = URL(text, encoded=text.isascii() and " " not in text)
        if base is not None:
            url = base.join(url)
        host = url.host or ""
        valid = url.scheme in ("http", "https") and url.port is not None and bool(host) and not re.search(r"\s", host)
    except ValueError:
        valid = False
    if not valid:
        raise PullError(PullErrorKind.BAD_REQUEST, f"{redact(text)!r} is not a valid http or https URL") from None
    return url


def _follow(url: URL, response: aiohttp.ClientResponse, shown: str) -> URL:
    following = _parse(response.headers.get("Location") or "nowhere:", url).with_user(None)
    if url.scheme == "https" and following.scheme != "https":
        text = f"{shown} redirects from https to {redact(str(following))}, which is not"
        raise PullError(PullErrorKind.FORBIDDEN, text)
    return following


def _status_error(status: int, shown: str) -> PullError:
    match status:
        case HTTPStatus.NOT_FOUND | HTTPStatus.GONE:
            kind, hint = PullErrorKind.NOT_FOUND, "nothing is there"
        case HTTPStatus.UNAUTHORIZED | HTTPStatus.FORBIDDEN | HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
            kind, hint = PullErrorKind.FORBIDDEN, "it wants other credentials, or none suffice"
        case HTTPStatus.REQUEST_TIMEOUT | HTTPStatus.GATEWAY_TIMEOUT:
            kind, hint = PullErrorKind.TIMEOUT, "it took too long"
        case HTTPStatus.TOO_MANY_REQUESTS:
            kind, hint = PullErrorKind.UNREACHABLE, "it has too many requests now"
        case _ if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            kind, hint = PullErrorKind.UNREACHABLE, "it has a failure of its own"
        case _:
            kind, hint = PullErrorKind.BAD_REQUEST, "only 200 brings a model"
    return PullError(kind, f"{shown} answered with HTTP status {status}: {hint}")


def _client_error(error: aiohttp.ClientError, shown: str) -> PullError:
    match error:
        case aiohttp.ClientConnectorDNSError():
            return PullError(PullErrorKind.UNREACHABLE, f"{shown}: the name of its host cannot be resolved")
        case aiohttp.ClientConnectorCertificateError():
            text = f"{shown}: its certificate is not trusted ({error.certificate_error})"
            return PullError(PullErrorKind.UNREACHABLE, text)
        case aiohttp.ClientSSLError():
            return PullError(PullErrorKind.UNREACHABLE, f"{shown}: no TLS connection ({error.os_error})")
        case aiohttp.ClientConnectorError():
            return _os_error(error.os_error, shown)
        case aiohttp.ServerDisconnectedError() | aiohttp.ClientOSError():
            return PullError(PullErrorKind.UNREACHABLE, f"{shown}: the connection was lost")
        case aiohttp.InvalidURL():
            return PullError(PullErrorKind.BAD_REQUEST, f"{shown} is not a valid URL")
        case aiohttp.ClientResponseError():
            return PullError(PullErrorKind.UNREACHABLE, f"{shown} did not answer in proper HTTP")
    return PullError(PullErrorKind.UNREACHABLE, f"{shown} cannot be fetched ({type(error).__name__})")


def _os_error(error: OSError, shown: str) -> PullError:
    # With several addresses, all refused, the connector raises a new error with the errno that they share.
    if isinstance(error, _AddressRefused) or error.errno == errno.EACCES:
        return PullError(PullErrorKind.FORBIDDEN, f"{shown}: {error.strerror}")
    return PullError(PullErrorKind.UNREACHABLE, f"{shown} cannot be connected to: {error.strerror or error}")
