"""HTTP requests for URLs that other people name: bounded in time, guarded, and with clear errors.

People who may register a model choose the URLs. Before a socket connects, `addresses` therefore decides whether its
address is allowed; neither redirects nor name servers can lead elsewhere. A redirect is only followed to places that
the URL itself might have named, and credentials are only sent to the origin that they are meant for. If the operator
has proxies (`proxies`), they resolve names; addresses that can be resolved here must nevertheless be allowed.

The modules that use the client decide which files are fetched, and in which version: `http` for plain URLs, and
`huggingface`.
"""

import asyncio
import contextlib
import errno
import re
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any

import aiohttp
from yarl import URL

from puller import addresses, floor
from puller.disk import write_error
from puller.errors import Nature, PullError, PullErrorKind
from puller.limits import PullLimits
from puller.proxies import DIRECT, Proxies
from puller.sink import Sink
from puller.source import redact
from puller.threads import Threads

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MAX_REDIRECTS = 5
_SMALL = 2**20  # maximum bytes of a body that is written at once on the event loop, as the disk is local
_BATCH = 2 * 2**20  # bytes collected for one hop to a thread
_WRITERS = 4


@dataclass(frozen=True, slots=True)
class HttpPolicy:
    """The operator's rules for requests. Times are in seconds."""

    allow_private: bool = False  # loopback and private networks
    allow_link_local: bool = False
    ca: bytes | None = None  # PEM, trusted in addition to the system's
    connect_timeout: float = 10.0
    read_timeout: float = 30.0  # between two pieces
    total_timeout: float = 900.0
    proxies: Proxies = DIRECT  # the operator's

    def refusal(self, host: str) -> str | None:
        """Returns why an address may not be connected to, or None if it may."""
        return addresses.refusal(host, allow_private=self.allow_private, allow_link_local=self.allow_link_local)


class _AddressRefused(OSError):
    """The error that a socket was not created because its address is not allowed."""


class OpenAnswer:
    """An answer whose headers have been read, and the connection that it occupies."""

    def __init__(self, response: aiohttp.ClientResponse, limits: PullLimits, store: str) -> None:
        self.response = response
        self._limits: PullLimits | None = limits
        self._store = store

    def release(self) -> None:
        """Ends the answer, at most once. A connection that was read to the end is used again, any other is closed."""
        if self._limits is not None:
            self.response.release()
            self._limits.release(self._store)
            self._limits = None


class HttpClient:
    """The connections to one kind of store. `limits` bounds the connections to all stores together."""

    def __init__(self, policy: HttpPolicy, limits: PullLimits) -> None:
        self.policy = policy
        self.limits = limits
        # Created on first use, as they belong to the running loop. One connects directly, one to the operator's
        # proxies.
        self._sessions: dict[bool, aiohttp.ClientSession] = {}
        self._threads = Threads(_WRITERS, "puller-write")  # for large bodies

    async def close(self) -> None:
        """Closes all connections."""
        for session in self._sessions.values():
            await session.close()
        self._sessions.clear()
        self._threads.close(drop=True)

    @contextlib.asynccontextmanager
    async def translated(self, shown: str) -> AsyncIterator[None]:
        """Bounds the time of the block, and turns its errors into PullErrors."""
        try:
            async with asyncio.timeout(self.policy.total_timeout):
                yield
        # `from None`: aiohttp's message may quote the URL's query, and a traceback shows causes.
        except TimeoutError:
            text = f"{shown} was not answered in time: the server did not answer, stopped sending, or needed more than "
            text += f"{self.policy.total_timeout:g} s in all; check the server, and the network between it and the pods"
            raise PullError(PullErrorKind.TIMEOUT, text) from None
        except aiohttp.ClientPayloadError:
            raise PullError(
                PullErrorKind.INTEGRITY,
                f"{shown} was cut off before all of it had arrived; check the server, or a proxy in front of it",
            ) from None
        except aiohttp.ClientError as error:
            raise _client_error(error, shown) from None
        except OSError as error:
            raise write_error(error) or _os_error(error, shown) from None
        except ValueError:  # of a host's name, or of a header
            text = f"{shown} cannot be requested; correct its host, or the headers in its store's settings"
            raise PullError(PullErrorKind.BAD_REQUEST, text) from None

    async def send(
        self,
        url: URL,
        *,
        shown: str,
        headers: Mapping[str, str],
        secret: Mapping[str, str],
        trust: ssl.SSLContext | None = None,
        json: Any = None,
        follow: bool = True,
    ) -> OpenAnswer:
        """Sends a GET, or a POST with JSON. Follows redirects unless `follow` is false, and returns any other answer.

        The headers in `secret` are only sent to the URL's own origin, for which `trust` replaces the policy's trusted
        authorities. Must be called inside `translated`. Raises PullError if there are too many redirects.
        """
        origin = url.origin()
        store = origin.raw_authority
        await self.limits.acquire(store)
        try:
            for _ in range(_MAX_REDIRECTS + 1):
                at_home = url.origin() == origin
                proxy = self.policy.proxies.of_url(url.scheme, url.host or "", url.port)
                if proxy is not None:
                    await self._check(url.host or "")
                # A total limit, because a head that arrives byte by byte never exceeds the limit between bytes.
                async with asyncio.timeout(self.policy.connect_timeout + self.policy.read_timeout):
                    response = await self._opened(proxied=proxy is not None).request(
                        "GET" if json is None else "POST",
                        url,
                        allow_redirects=False,
                        headers={**headers, **(secret if at_home else {})},
                        json=json,
                        proxy=proxy,
                        ssl=trust if trust is not None and at_home else True,
                    )
                if not follow or response.status not in _REDIRECTS:
                    return OpenAnswer(response, self.limits, store)
                response.release()
                url = _follow(url, response, shown)
            raise PullError(
                PullErrorKind.BAD_REQUEST,
                f"{shown} redirects more than {_MAX_REDIRECTS} times; register the URL of the file itself",
            )
        except BaseException:
            self.limits.release(store)
            raise

    async def _check(self, host: str) -> None:
        """Raises _AddressRefused for a host that the proxy must not be asked for. A name that does not resolve here is
        allowed, because it may resolve at the proxy."""
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            return
        refusals = [(address[0], self.policy.refusal(str(address[0]))) for *_, address in found]
        if refusals and all(why for _, why in refusals):
            address, why = refusals[0]
            raise _AddressRefused(errno.EACCES, addresses.told(str(address), str(why)))

    def _opened(self, *, proxied: bool) -> aiohttp.ClientSession:
        if proxied not in self._sessions:
            context = ssl.create_default_context()
            if self.policy.ca is not None:
                context.load_verify_locations(cadata=self.policy.ca.decode())
            guard = None if proxied else _guard(self.policy.refusal)
            self._sessions[proxied] = aiohttp.ClientSession(
                # No limit here, because `limits` has one for all stores.
                connector=aiohttp.TCPConnector(ssl=context, limit=0, socket_factory=guard),
                timeout=aiohttp.ClientTimeout(
                    total=None, sock_connect=self.policy.connect_timeout, sock_read=self.policy.read_timeout
                ),
                headers={"Accept-Encoding": "identity", "User-Agent": "mesh-puller"},
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trust_env=False,
            )
        return self._sessions[proxied]

    async def receive(
        self, response: aiohttp.ClientResponse, sink: Sink, start: int, *, shown: str, stop_at: int | None = None
    ) -> None:
        """Writes the body to the sink, up to the offset `stop_at`; other requests fetch the rest. `start` is the offset
        of the body's first byte."""
        body = self.pieces(response, shown)
        announced = response.content_length
        if announced is not None and announced <= _SMALL and (stop_at is None or start + announced <= stop_at):
            whole = b"".join([piece async for piece in body])
            sink.write(whole, start)
            await self._pace(len(whole))
            return
        at, pending = start, 0
        pieces: list[bytes] = []
        async for piece in body:
            left = len(piece) if stop_at is None else stop_at - at - pending
            pieces.append(piece[:left])
            pending += min(len(piece), left)
            if pending >= _BATCH:
                await self._threads.run(_write, sink, at, pieces)
                await self._pace(pending)
                at, pending, pieces = at + pending, 0, []
            if left <= len(piece) and stop_at is not None:
                break
        await self._threads.run(_write, sink, at, pieces)
        await self._pace(pending)

    def pieces(self, response: aiohttp.ClientResponse, shown: str) -> AsyncIterator[bytes]:
        """Yields the body as it arrives. Raises PullError if it arrives too slowly."""
        return floor.kept(aiter(response.content.iter_any()), shown=shown, window=self.policy.read_timeout)

    async def _pace(self, count: int) -> None:
        if delay := self.limits.take(count):
            await asyncio.sleep(delay)


def _write(sink: Sink, offset: int, pieces: list[bytes]) -> None:
    for piece in pieces:
        sink.write(piece, offset)
        offset += len(piece)


def _guard(refusal: Callable[[str], str | None]) -> Callable[[tuple[Any, ...]], socket.socket]:
    """Returns a function that creates sockets for allowed addresses only. aiohttp calls it with each address before it
    connects."""

    def make(info: tuple[Any, ...]) -> socket.socket:
        family, kind, protocol, _, address = info
        why = refusal(address[0])
        if why is not None:
            raise _AddressRefused(errno.EACCES, addresses.told(address[0], why))
        return socket.socket(family=family, type=kind, proto=protocol)

    return make


def parse(text: str, base: URL | None = None) -> URL:
    """Returns a URL that can be requested. The text is taken literally, and may be relative to `base`. Raises
    PullError(BAD_REQUEST) if it is not an http or https URL with a host."""
    try:
        # Used literally if a request line can hold it, because a signed URL must not be quoted again.
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
    to = response.headers.get("Location")
    if not to:
        text = f"{shown} answered with a redirect ({response.status}) without a target; "
        text += 'check its URL, and for a bucket of S3 register s3://bucket/path, with "region" in the storage secret'
        raise PullError(PullErrorKind.BAD_REQUEST, text)
    try:
        following = parse(to, url).with_user(None)
    except PullError:
        text = f"{shown} redirects to {redact(to)!r}, which is not a valid http or https URL; "
        raise PullError(PullErrorKind.BAD_REQUEST, text + "register the URL of the file itself") from None
    if url.scheme == "https" and following.scheme != "https":
        text = f"{shown} redirects from https to {redact(str(following))}, which is not https; register an https URL"
        raise PullError(PullErrorKind.FORBIDDEN, text)
    return following


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Returns the seconds that an answer's Retry-After asks for, as a number or a date. Returns None if there is
    neither."""
    text = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(text)
    try:
        at = parsedate_to_datetime(text)
        # By the server's own clock if it sends the time, since this machine's may differ.
        now = parsedate_to_datetime(headers["Date"]) if "Date" in headers else datetime.now(UTC)
        return max(0.0, (at - now).total_seconds())
    except (TypeError, ValueError, OverflowError):
        return None


def status_error(response: aiohttp.ClientResponse, shown: str) -> PullError:
    """Returns the error for an answer with an unexpected status. The error says what to do."""
    status = response.status
    match status:
        case HTTPStatus.NOT_FOUND | HTTPStatus.GONE:
            kind, hint = PullErrorKind.NOT_FOUND, "nothing is there; check the path of the registration"
        case HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
            kind, hint = PullErrorKind.CREDENTIALS, "a proxy requires credentials; check HTTPS_PROXY and HTTP_PROXY"
        case HTTPStatus.UNAUTHORIZED:
            kind, hint = (
                PullErrorKind.CREDENTIALS,
                ("it requires credentials, or rejects the given ones; check the storage secret"),
            )
        case HTTPStatus.FORBIDDEN:
            kind, hint = (
                PullErrorKind.FORBIDDEN,
                ("access is forbidden; check the permissions, or whether a signed URL has expired"),
            )
        case HTTPStatus.REQUEST_TIMEOUT | HTTPStatus.GATEWAY_TIMEOUT:
            kind, hint = PullErrorKind.TIMEOUT, "the server stopped waiting for the request; try again"
        case HTTPStatus.TOO_MANY_REQUESTS:
            kind, hint = PullErrorKind.BUSY, "it has too many requests now; try again later"
        case _ if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            kind, hint = PullErrorKind.UNREACHABLE, "the server failed; check it, and try again"
        case _:
            kind, hint = PullErrorKind.BAD_REQUEST, "only status 200 is accepted; check the URL"
    after = retry_after(response.headers) if kind.nature is Nature.PASSING else None
    return PullError(kind, f"{shown} answered with HTTP status {status}: {hint}", retry_after=after)


def _client_error(error: aiohttp.ClientError, shown: str) -> PullError:
    match error:
        case aiohttp.ClientHttpProxyError():
            text = f"{shown}: the proxy of the pod's environment refuses to connect to it (HTTP status {error.status})"
            text += "; check the rules of the proxy, and HTTPS_PROXY and HTTP_PROXY"
            refused = error.status == HTTPStatus.PROXY_AUTHENTICATION_REQUIRED
            return PullError(PullErrorKind.CREDENTIALS if refused else PullErrorKind.UNREACHABLE, text)
        case aiohttp.ClientProxyConnectionError():
            return PullError(
                PullErrorKind.UNREACHABLE,
                (f"{shown}: the proxy of the pod's environment cannot be reached; check HTTPS_PROXY and HTTP_PROXY"),
            )
        case aiohttp.ClientConnectorDNSError():
            text = f"{shown}: the name of its host cannot be resolved; check its spelling, and the pods' name server"
            return PullError(PullErrorKind.DNS, text)
        case aiohttp.ClientConnectorCertificateError():
            why = getattr(error.certificate_error, "verify_message", "") or "it cannot be verified"
            text = (
                f"{shown}: the server's certificate is not trusted ({why}); check the certificate, or give a private "
            )
            text += "authority with --storage-ca"
            return PullError(PullErrorKind.TLS, text)
        case aiohttp.ClientSSLError():
            why = (getattr(error.os_error, "reason", "") or "the handshake failed").lower().replace("_", " ")
            text = f"{shown}: no TLS connection ({why}); check that the server speaks TLS on that port"
            return PullError(PullErrorKind.TLS, text)
        case aiohttp.ClientConnectorError():
            return _os_error(error.os_error, shown)
        case aiohttp.InvalidURL():
            return PullError(PullErrorKind.BAD_REQUEST, f"{shown} is not a valid URL; correct it")
        case aiohttp.ClientConnectionError():
            return PullError(
                PullErrorKind.UNREACHABLE,
                (f"{shown}: the connection was lost; check the network between the store and the pods"),
            )
        case aiohttp.ClientResponseError():
            return PullError(
                PullErrorKind.UNREACHABLE, (f"{shown} did not answer with valid HTTP; check the host and port")
            )
    return PullError(PullErrorKind.UNREACHABLE, f"{shown} cannot be fetched; check the server, and the network")


def _os_error(error: OSError, shown: str) -> PullError:
    # With several addresses, all refused, the connector raises a new error with the errno that they share, and a text
    # that joins theirs: the first one is enough.
    if isinstance(error, _AddressRefused) or error.errno == errno.EACCES:
        whole, *each = (error.strerror or "").split(f"[Errno {errno.EACCES}] ")
        return PullError(PullErrorKind.FORBIDDEN, f"{shown}: {each[0].rstrip(', ') if each else whole}")
    text = (
        f"{shown} cannot be connected to: {error.strerror or error}; check that the server is up and reachable "
        "from the pods"
    )
    return PullError(PullErrorKind.UNREACHABLE, text)
