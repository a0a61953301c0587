"""A guard of a library's own connections: a proxy on loopback that connects for the library.

obstore resolves names and follows redirects without asking. So its clients use this proxy, which makes all of their
connections: it resolves names, and checks each address before a socket connects to it (`addresses`). A client has a
grant, identified by the proxy's user and password. The grant names the endpoint that the operator chose for the client,
which may be at any address, and says whether the client may ask the cloud's metadata service for the pod's identity.
That service is at a link-local address; a request to it that does not ask for an identity is refused, since a store
could redirect there.

HTTPS passes through unchanged (CONNECT). In plain HTTP, the heads of requests are read and passed on, while bodies and
answers pass through unchanged. If the environment names proxies of the operator (`proxies`), connections are made
through them: they then resolve names, and addresses that can be resolved here must nevertheless be allowed.

The proxy runs in a thread with its own event loop, so that stores' bytes and the agent's loop do not wait for each
other. 1 GiB over loopback took 1.7 s of CPU in total instead of 1.6 without it, and the same time (2 shared cores).
"""

import asyncio
import base64
import contextlib
import logging
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from yarl import URL

from puller import addresses
from puller.errors import PullError, PullErrorKind
from puller.proxies import Proxies

log = logging.getLogger(__name__)

_CHUNK = 256 * 2**10  # bytes
_MAX_HEAD = 64 * 2**10  # bytes
_HEAD_WAIT = 300.0  # seconds for the next request of a client, which keeps idle connections for less
_PAUSE = 0.1  # seconds
_TOLD = 60.0  # seconds for which the last failure is kept
_MARK = "\u2042"  # marks the text of this proxy's own answers
_MAX_GRANTS = 4096  # the oldest are dropped: their clients are no longer used
_ASKS_WHO = frozenset(
    {"x-aws-ec2-metadata-token", "x-aws-ec2-metadata-token-ttl-seconds", "metadata-flavor", "metadata"}
)
_SIGNED = frozenset({"x-amz-content-sha256", "x-goog-content-sha256", "x-ms-version"})
"""Headers of requests to stores, which a client keeps when it follows a redirect."""


@dataclass(slots=True)
class Grant:
    """The destinations that one client may reach in addition to those open to all, and the client's last failure."""

    home: frozenset[tuple[str, int]] = frozenset()  # hosts and ports that the operator named
    identity: bool = False  # the client may ask the metadata service
    identity_urls: tuple[str, ...] = ()  # further URLs that the environment names for it
    failed: PullError | None = field(default=None, repr=False)
    failed_at: float = 0.0

    def trouble(self) -> PullError | None:
        """Returns the last failure if it is recent, and forgets it."""
        failed, self.failed = self.failed, None
        return failed if time.monotonic() - self.failed_at < _TOLD else None


class _ConnectionRefused(Exception):
    """The error that a connection was refused, or could not be made."""

    def __init__(self, kind: PullErrorKind, text: str) -> None:
        super().__init__(text)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class _RequestHead:
    method: str
    target: str
    headers: tuple[tuple[str, str], ...]

    def get(self, name: str) -> str:
        return next((value for key, value in self.headers if key.lower() == name), "")

    @property
    def names(self) -> frozenset[str]:
        return frozenset(key.lower() for key, _ in self.headers)


class Tunnel:
    """The proxy. Its methods may be called from any thread."""

    def __init__(
        self,
        refusal: Callable[[str], str | None],
        *,
        connect_timeout: float,
        proxies: Proxies | None = None,
        resolve: Callable[[str, int], Coroutine[Any, Any, list[str]]] | None = None,
    ) -> None:
        """Makes the proxy. `refusal` says why an address may not be connected to; `resolve` returns a host's
        addresses."""
        self._refusal = refusal
        self._timeout = connect_timeout
        self._proxies = proxies or Proxies()
        self._resolve = resolve or _addresses
        self._grants: dict[str, Grant] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self._listener.setblocking(False)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="puller-tunnel", daemon=True)
        self._thread.start()

    def url(self, grant: Grant) -> str:
        """Returns the proxy's URL for a client with that grant."""
        token = secrets.token_urlsafe(24)
        self._grants[token] = grant
        while len(self._grants) > _MAX_GRANTS:
            del self._grants[next(iter(self._grants))]
        return f"http://{token}:x@127.0.0.1:{self._listener.getsockname()[1]}"

    def close(self) -> None:
        """Ends all connections and the proxy's thread. Blocks for up to 5 seconds."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop)
            self._thread.join(5.0)

    def _stop(self) -> None:
        for task in self._tasks:
            task.cancel()

    def _run(self) -> None:
        async def serve() -> None:
            accepting = asyncio.current_task()
            assert accepting is not None
            self._tasks.add(accepting)
            with contextlib.suppress(asyncio.CancelledError):
                while True:
                    try:
                        client, _ = await self._loop.sock_accept(self._listener)
                    except OSError:  # too many files are open; some will be closed
                        await asyncio.sleep(_PAUSE)
                        continue
                    client.setblocking(False)
                    task = self._loop.create_task(self._serve(client))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
            self._tasks.discard(accepting)
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=3.0)

        try:
            self._loop.run_until_complete(serve())
        finally:
            self._listener.close()
            self._loop.close()

    async def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError, TimeoutError, ValueError):
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            reader = _Reader(self._loop, client)
            async with asyncio.timeout(_HEAD_WAIT):
                head = await reader.head()
            grant = self._grant(head) if head is not None else None
            if head is None:
                return
            try:
                if grant is None:
                    # A redirected request over plain HTTP arrives without its client's grant, and gets none.
                    await self._forward(client, reader, head, Grant())
                elif head.method == "CONNECT":
                    await self._connect(client, head, grant)
                else:
                    await self._forward(client, reader, head, grant)
            except _ConnectionRefused as refused:
                if grant is not None:
                    grant.failed, grant.failed_at = PullError(refused.kind, str(refused)), time.monotonic()
                if refused.kind is PullErrorKind.FORBIDDEN:
                    log.warning("connection of a store's client refused: %s", refused)
                await self._loop.sock_sendall(client, _answer(refused, head.method))

    def _grant(self, head: _RequestHead) -> Grant | None:
        scheme, _, value = head.get("proxy-authorization").partition(" ")
        with contextlib.suppress(ValueError):
            return self._grants.get(base64.b64decode(value).decode().partition(":")[0]) if scheme == "Basic" else None
        return None

    async def _connect(self, client: socket.socket, head: _RequestHead, grant: Grant) -> None:
        """Serves an HTTPS connection by carrying bytes both ways until it ends."""
        host, _, port = head.target.rpartition(":")
        host = host.strip("[]")
        proxy = self._proxies.of_url("https", host, int(port))
        server = await self._open(host, int(port), grant, proxy)
        with server:
            if proxy is not None:
                await self._ask(server, proxy, head.target)
            await self._loop.sock_sendall(client, b"HTTP/1.1 200 Connection established\r\n\r\n")
            await self._both(client, server)

    async def _forward(self, client: socket.socket, reader: "_Reader", head: _RequestHead, grant: Grant) -> None:
        """Serves requests over plain HTTP, one after another, all to one host."""
        first = urlsplit(head.target)
        host, port = first.hostname or "", first.port or 80
        if first.scheme != "http" or not host:
            raise _ConnectionRefused(PullErrorKind.BAD_REQUEST, "only http URLs and CONNECT are understood")
        proxy = self._proxies.of_url("http", host, port)
        asks = self._asks_who(head, grant)
        anywhere = asks and self._named(head, grant)
        # Only this machine's cloud knows its identity.
        proxy = None if asks else proxy
        server = await self._open(host, port, grant, proxy, identity=asks, anywhere=anywhere)
        begun: set[asyncio.Task[Any]] = set()
        with server:
            try:
                await self._pass_on(server, reader, head, proxy)
                back = self._loop.create_task(self._pump(server, client))
                begun.add(back)
                while True:
                    following = self._loop.create_task(reader.head())
                    begun.add(following)
                    await asyncio.wait({following, back}, return_when=asyncio.FIRST_COMPLETED, timeout=_HEAD_WAIT)
                    again = following.result() if following.done() else None
                    if again is None:
                        return
                    begun.discard(following)
                    now = urlsplit(again.target)
                    same = (now.scheme, now.hostname, now.port or 80) == ("http", host, port)
                    if not same or self._asks_who(again, grant) != asks:
                        return  # the client will open another connection
                    await self._pass_on(server, reader, again, proxy)
            finally:
                for task in begun:
                    task.cancel()
                if begun:
                    await asyncio.gather(*begun, return_exceptions=True)

    def _asks_who(self, head: _RequestHead, grant: Grant) -> bool:
        """Returns whether a request asks for the pod's identity and may do so."""
        if not grant.identity or head.names & _SIGNED:
            return False
        return bool(head.names & _ASKS_WHO) or self._named(head, grant)

    def _named(self, head: _RequestHead, grant: Grant) -> bool:
        return bool(grant.identity_urls) and head.target.startswith(grant.identity_urls)

    async def _pass_on(self, server: socket.socket, reader: "_Reader", head: _RequestHead, proxy: URL | None) -> None:
        split = urlsplit(head.target)
        path = split._replace(scheme="", netloc="").geturl() or "/"
        target = path if proxy is None else head.target
        kept = [(name, value) for name, value in head.headers if not name.lower().startswith("proxy-")]
        if proxy is not None and (authorization := _authorization(proxy)):
            kept.append(("Proxy-Authorization", authorization))
        lines = "".join(f"{name}: {value}\r\n" for name, value in kept)
        await self._loop.sock_sendall(server, f"{head.method} {target} HTTP/1.1\r\n{lines}\r\n".encode("latin-1"))
        if head.get("transfer-encoding"):
            raise _ConnectionRefused(
                PullErrorKind.BAD_REQUEST, "a request with a body of unknown length cannot be passed on"
            )
        left = int(head.get("content-length") or 0)
        while left > 0:
            piece = await reader.some(left)
            if not piece:
                return
            await self._loop.sock_sendall(server, piece)
            left -= len(piece)

    async def _open(
        self,
        host: str,
        port: int,
        grant: Grant,
        proxy: URL | None,
        *,
        identity: bool = False,
        anywhere: bool = False,
    ) -> socket.socket:
        """Opens a connection to the host, or to the operator's proxy for it. Raises _ConnectionRefused."""
        anywhere = anywhere or (host.lower(), port) in grant.home
        try:
            found = await self._resolve(host, port)
        except (OSError, UnicodeError, TimeoutError):
            found = []
            if proxy is None:
                raise _ConnectionRefused(
                    PullErrorKind.DNS, f"the name {host} cannot be resolved; check its spelling"
                ) from None
        allowed, why = [], ""
        for address in found:
            refused = None if anywhere else self._refusal(address)
            if refused is None or (identity and refused == "a link-local address"):
                allowed.append(address)
            else:
                why = addresses.told(address, refused)
        if found and not allowed:
            at = "" if host in found else f"{host}: "
            raise _ConnectionRefused(PullErrorKind.FORBIDDEN, f"{at}{why} (a redirect of the store may lead there)")
        if proxy is not None:
            host, port = proxy.host or "", proxy.port or 80
            try:
                allowed = await self._resolve(host, port)
            except (OSError, UnicodeError, TimeoutError):
                raise _ConnectionRefused(
                    PullErrorKind.DNS,
                    f"the name of the proxy, {host}, cannot be resolved; check HTTPS_PROXY, HTTP_PROXY and ALL_PROXY",
                ) from None
        problem: OSError | None = None
        for address in allowed:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            server = socket.socket(family, socket.SOCK_STREAM)
            try:
                server.setblocking(False)
                server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                async with asyncio.timeout(self._timeout):
                    await self._loop.sock_connect(server, (address, port))
                return server
            except OSError as error:  # a TimeoutError, too
                server.close()
                problem = error
            except BaseException:
                server.close()
                raise
        timed_out = isinstance(problem, TimeoutError)
        what = "timed out" if timed_out else (problem and problem.strerror) or "no address"
        kind = PullErrorKind.TIMEOUT if timed_out else PullErrorKind.UNREACHABLE
        raise _ConnectionRefused(
            kind, f"no connection to {host}:{port} ({what}); check that it is up and reachable from the pods"
        )

    async def _ask(self, server: socket.socket, proxy: URL, target: str) -> None:
        authorization = _authorization(proxy)
        more = f"Proxy-Authorization: {authorization}\r\n" if authorization else ""
        await self._loop.sock_sendall(server, f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n{more}\r\n".encode())
        answer = b""
        async with asyncio.timeout(self._timeout):
            while not answer.endswith(b"\r\n\r\n"):
                # Read byte by byte, as what follows is the store's.
                byte = await self._loop.sock_recv(server, 1)
                if not byte:
                    raise _ConnectionRefused(
                        PullErrorKind.UNREACHABLE, f"the proxy {proxy.host} ended the connection; check the proxy"
                    )
                if len(answer) > _MAX_HEAD:
                    raise _ConnectionRefused(
                        PullErrorKind.UNREACHABLE,
                        f"the headers of the proxy {proxy.host} have more than {_MAX_HEAD} bytes; check the proxy",
                    )
                answer += byte
        status = re.match(rb"HTTP/1\.[01] (\d{3})", answer)
        if status is None:
            raise _ConnectionRefused(
                PullErrorKind.UNREACHABLE,
                f"the proxy {proxy.host} does not answer with HTTP; check HTTPS_PROXY and ALL_PROXY",
            )
        if not status[1].startswith(b"2"):
            code = status[1].decode()
            kind = PullErrorKind.CREDENTIALS if code == "407" else PullErrorKind.UNREACHABLE
            raise _ConnectionRefused(
                kind, f"the proxy {proxy.host} refuses to connect to {target} ({code}); check its rules, or NO_PROXY"
            )

    async def _both(self, client: socket.socket, server: socket.socket) -> None:
        """Carries bytes both ways until either side ends."""
        ways = {self._loop.create_task(self._pump(client, server)), self._loop.create_task(self._pump(server, client))}
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.wait(ways)

    async def _pump(self, source: socket.socket, target: socket.socket) -> None:
        buffer = bytearray(_CHUNK)
        view = memoryview(buffer)
        with contextlib.suppress(OSError):
            while count := await self._loop.sock_recv_into(source, buffer):
                await self._loop.sock_sendall(target, view[:count])


class _Reader:
    """A parser of a client's requests: their heads and bodies."""

    def __init__(self, loop: asyncio.AbstractEventLoop, source: socket.socket) -> None:
        self._loop = loop
        self._source = source
        self._held = b""

    async def head(self) -> _RequestHead | None:
        """Returns the next request's head, or None at the end. Raises ValueError for an invalid head."""
        while b"\r\n\r\n" not in self._held:
            more = await self._loop.sock_recv(self._source, _MAX_HEAD)
            if not more:
                return None
            self._held += more
            if len(self._held) > _MAX_HEAD:
                raise ValueError("the head of a request is too long")
        text, _, self._held = self._held.partition(b"\r\n\r\n")
        first, *lines = text.decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ")
        pairs = (line.partition(":") for line in lines)
        return _RequestHead(method, target, tuple((name.strip(), value.strip()) for name, _, value in pairs))

    async def some(self, most: int) -> bytes:
        """Returns the next bytes of a body."""
        if not self._held:
            return await self._loop.sock_recv(self._source, min(most, _CHUNK))
        piece, self._held = self._held[:most], self._held[most:]
        return piece


async def _addresses(host: str, port: int) -> list[str]:
    async with asyncio.timeout(10.0):
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _authorization(proxy: URL) -> str:
    if not proxy.user and not proxy.password:
        return ""
    return "Basic " + base64.b64encode(f"{proxy.user or ''}:{proxy.password or ''}".encode()).decode()


def _answer(refused: _ConnectionRefused, method: str) -> bytes:
    code = "403 Forbidden" if refused.kind is PullErrorKind.FORBIDDEN else "502 Bad Gateway"
    body = f"{_MARK}{refused.kind.name}: {refused}{_MARK}".encode()
    return f"HTTP/1.1 {code}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + (
        body if method != "HEAD" else b""
    )


def refusal_in(text: str) -> tuple[PullErrorKind, str] | None:
    """Returns this proxy's refusal if an error's text quotes it, or else None."""
    match = re.search(rf"{_MARK}([A-Z_]+): ([^{_MARK}]*){_MARK}", text)
    return (PullErrorKind[match[1]], match[2]) if match and match[1] in PullErrorKind.__members__ else None


def identity_urls(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the URLs, named by the environment, at which a pod asks for its identity."""
    names = ("AWS_CONTAINER_CREDENTIALS_FULL_URI", "IDENTITY_ENDPOINT", "MSI_ENDPOINT")
    found = [environment.get(name, "") for name in names]
    if path := environment.get("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", ""):
        found.append(f"http://169.254.170.2{path}")
    return tuple(url for url in found if url.startswith("http://"))
