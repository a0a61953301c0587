"""Pulls over HTTP: only a complete response with status 200 is a model, only allowed addresses are connected to, and no
secret is shown."""

import asyncio
import gzip
import os
import re
import ssl
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest
from aiohttp import web
from yarl import URL

from puller.errors import Nature, PullError, PullErrorKind
from puller.http_client import HttpPolicy, retry_after
from puller.limits import PullLimits
from puller.provider import Listing, RemoteFile
from puller.puller import Puller
from puller.source import Source
from tests.support.certificates import certificate
from tests.support.once import ONCE
from tests.support.waiting import until

CONTENT = os.urandom(100_000)
LARGE = os.urandom(11 * 2**20 + 7)


class Store:
    """A real HTTP server, which records its requests."""

    def __init__(self) -> None:
        self.requests: list[web.BaseRequest] = []
        self.blocked = asyncio.Event()
        self.gone = asyncio.Event()
        self.port = 0
        self.host = "127.0.0.1"
        self.on_request: Callable[[], None] = lambda: None

    def url(self, path: str, host: str = "", user: str = "") -> str:
        return f"http://{user and user + '@'}{host or self.host}:{self.port}{path}"

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        self.requests.append(request)
        self.on_request()
        match request.path.split("/")[1:]:
            case ["small", *_]:
                return web.Response(body=CONTENT)
            case ["large", *_]:
                return web.Response(body=LARGE)
            case ["empty", *_]:
                return web.Response(body=b"")
            case ["chunked", *_]:
                response = web.StreamResponse()
                response.enable_chunked_encoding()
                await response.prepare(request)
                await response.write(LARGE)
                return response
            case ["status", status, *_]:
                headers = {"Retry-After": request.query["after"]} if "after" in request.query else {}
                return web.Response(status=int(status), text="<html>not a model</html>", headers=headers)
            case ["to", *_]:
                return web.Response(status=302, headers={"Location": request.query["url"]})
            case ["circle", *_]:
                return web.Response(status=307, headers={"Location": request.path})
            case ["nowhere", *_]:
                return web.Response(status=301)
            case ["gzip", *_]:
                return web.Response(body=gzip.compress(CONTENT), headers={"Content-Encoding": "gzip"})
            case ["truncated", how, *_]:
                response = web.StreamResponse()
                if how == "chunked":
                    response.enable_chunked_encoding()
                else:
                    response.content_length = int(how)
                await response.prepare(request)
                await response.write(CONTENT)
                assert request.transport is not None
                request.transport.close()
                return response
            case ["stalls", after, *_]:
                response = web.StreamResponse()
                if after != "headers":
                    response.content_length = int(after) + 1
                    await response.prepare(request)
                    await response.write(LARGE[: int(after)])
                self.blocked.set()
                try:
                    await asyncio.sleep(30)
                finally:
                    self.gone.set()
            case ["whole", *_]:  # says that it has ranges, and has none
                headers = {"ETag": '"one"', "Accept-Ranges": "bytes"}
                if "Range" in request.headers or self.blocked.is_set():
                    self.blocked.set()
                    return web.Response(body=LARGE, headers=headers)
                response = web.StreamResponse(headers=headers)
                response.content_length = len(LARGE)
                await response.prepare(request)
                await response.write(LARGE[:1000])
                await self.blocked.wait()
                await response.write(LARGE[1000:])
                return response
            case ["endless", *_]:
                response = web.StreamResponse()
                response.enable_chunked_encoding()
                await response.prepare(request)
                try:
                    while True:
                        await response.write(bytes(2**20))
                finally:
                    self.gone.set()
        return web.Response(status=404)


async def serve(store: Store, host: str, context: ssl.SSLContext | None = None) -> web.ServerRunner:
    runner = web.ServerRunner(web.Server(store.answer, handler_cancellation=True), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, host, 0, ssl_context=context)
    await site.start()
    store.host = host
    store.port = runner.addresses[0][1]
    return runner


@pytest.fixture
async def store():
    store = Store()
    runner = await serve(store, "127.0.0.1")
    yield store
    await runner.cleanup()


@pytest.fixture
async def make_puller(tmp_path):
    made = []

    def make(policy: HttpPolicy) -> Puller:
        puller = Puller(directory=tmp_path / f"models-{len(made)}", http=policy, retries=ONCE)
        puller.sweep()
        made.append(puller)
        return puller

    yield make
    for puller in made:
        await puller.close()


def entries(puller: Puller) -> set[str]:
    """Returns the entries of the puller's directory, without its lock and the files that it keeps."""
    return {entry.name for entry in puller.directory.iterdir()} - {".lock", ".blobs"}


async def refused(puller: Puller, url: str, kind: PullErrorKind) -> str:
    with pytest.raises(PullError) as caught:
        await puller.pull(Source(url), into="id")
    assert caught.value.kind is kind, caught.value
    # A file of an earlier pull has a temporary name until it is safe on disk.
    await until(lambda: not puller.statistics().cache.unsafe, interval=0.001, why="earlier files are safe on disk")
    assert entries(puller) == set(), "a failed pull left something"
    return caught.value.text


@pytest.mark.parametrize(
    ("path", "content"),
    [
        pytest.param("/small/a.onnx", CONTENT, id="small"),
        pytest.param("/large/a.onnx", LARGE, id="large"),
        pytest.param("/chunked/a.onnx", LARGE, id="chunked"),
        pytest.param("/empty/a.onnx", b"", id="empty"),
    ],
)
async def test_a_file_arrives_whole(puller, store, path, content):
    """A file arrives complete with and without an announced length, in one piece or in many."""
    pulled = await puller.pull(Source(store.url(path)), into="id")
    assert pulled.path == puller.directory / "id" / "a.onnx"
    assert pulled.path.read_bytes() == content
    assert pulled.bytes == len(content)


async def test_a_pull_waits_for_no_connection_while_it_holds_one(store, tmp_path):
    """If a server sends the complete file for a part, the connections of the parts are released before the file is
    requested."""
    limits = PullLimits(connections=8, ranges=2, range_bytes=10 * 2**20)
    policy = HttpPolicy(allow_private=True, connect_timeout=5, read_timeout=5, total_timeout=10)
    puller = Puller(directory=tmp_path / "models", http=policy, retries=ONCE, limits=limits)
    puller.sweep()
    held: list[int] = []
    store.on_request = lambda: held.append(limits.statistics().connections)
    try:
        pulled = await puller.pull(Source(store.url("/whole/a.onnx")), into="id")
    finally:
        await puller.close()
    assert pulled.path.read_bytes() == LARGE
    assert held == [1, 2, 1]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        pytest.param("/small/a.onnx?version=3", "a.onnx", id="query"),
        pytest.param("/small/..%2F..%2Fescape", "%2E.%2F..%2Fescape", id="encoded-slashes"),
        pytest.param("/small/%2e%2e", "%2E.", id="dots"),
        pytest.param("/small", "small", id="no-folder"),
        pytest.param("/small/" + "x" * 4000, None, id="long"),
    ],
)
async def test_names_are_harmless(puller, store, path, name, tmp_path):
    """Whatever a URL ends with, its file is written in the pull's folder, and nothing is written elsewhere."""
    pulled = await puller.pull(Source(store.url(path)), into="../id")
    assert pulled.path.parent.parent == puller.directory
    assert name is None or pulled.path.name in (name, "_model")
    assert {entry.name for entry in tmp_path.iterdir()} == {"models", "root"}


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (404, PullErrorKind.NOT_FOUND),
        (410, PullErrorKind.NOT_FOUND),
        (401, PullErrorKind.CREDENTIALS),
        (407, PullErrorKind.CREDENTIALS),
        (403, PullErrorKind.FORBIDDEN),
        (408, PullErrorKind.TIMEOUT),
        (429, PullErrorKind.BUSY),
        (500, PullErrorKind.UNREACHABLE),
        (503, PullErrorKind.UNREACHABLE),
        (504, PullErrorKind.TIMEOUT),
        (400, PullErrorKind.BAD_REQUEST),
        (202, PullErrorKind.BAD_REQUEST),
        (206, PullErrorKind.BAD_REQUEST),
        (304, PullErrorKind.BAD_REQUEST),
    ],
)
async def test_only_200_is_a_model(puller, store, status, kind):
    """Only a response with status 200 is saved as a model; an error page is not, and the error names the status."""
    assert str(status) in await refused(puller, store.url(f"/status/{status}/a.onnx"), kind)


@pytest.mark.parametrize(
    ("status", "after", "seconds"),
    [(429, "5", 5.0), (503, "120", 120.0), (429, "soon", None), (429, "", None), (404, "5", None)],
)
async def test_a_store_says_when_to_ask_again(puller, store, status, after, seconds):
    """The error of a passing failure has the waiting time that the store names, unless that is missing or invalid. The
    error of a missing file has none."""
    with pytest.raises(PullError) as caught:
        await puller.pull(Source(store.url(f"/status/{status}/a.onnx?after={after}")), into="id")
    assert caught.value.retry_after == seconds
    assert caught.value.nature is (Nature.NOT_FOUND if status == 404 else Nature.PASSING)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "Fri, 01 Jan 2100 00:00:05 GMT", "Date": "Fri, 01 Jan 2100 00:00:00 GMT"}, 5.0),
        ({"Retry-After": "Fri, 01 Jan 1990 00:00:05 GMT"}, 0.0),
        ({"Retry-After": "Fri, 99 Jan 1990"}, None),
        ({"Retry-After": "-1"}, None),
        ({"Retry-After": "1e999"}, None),
        ({"Retry-After": "9" * 400}, None),
        ({"Retry-After": "5", "Date": "never"}, 5.0),
        ({}, None),
    ],
    ids=str,
)
def test_times_to_ask_again(headers, seconds):
    """The time to retry is a number of seconds, or a date that is compared with the server's clock if the server sends
    one."""
    assert retry_after(headers) == seconds


@pytest.mark.parametrize("how", ["100001", str(2**21), "chunked"])
async def test_a_truncated_body_is_noticed(puller, store, how):
    """A truncated body is detected: fewer bytes than announced, small or large, or a missing last chunk."""
    await refused(puller, store.url(f"/truncated/{how}/a.onnx"), PullErrorKind.INTEGRITY)


async def test_a_compressed_body_is_refused(puller, store):
    """A compressed body is refused, because it would be saved as a model. The request asks for no compression."""
    await refused(puller, store.url("/gzip/a.onnx"), PullErrorKind.BAD_REQUEST)
    assert store.requests[0].headers["Accept-Encoding"] == "identity"


@pytest.mark.parametrize("after", ["headers", "0", "5000000"])
async def test_a_stalled_server_ends_in_a_timeout(puller, store, after):
    """A pull ends with a timeout if the server stalls before the headers, before the body or in the middle of the
    body."""
    await refused(puller, store.url(f"/stalls/{after}/a.onnx"), PullErrorKind.TIMEOUT)


async def test_the_whole_pull_is_bounded(make_puller, store):
    """A pull ends after its total time, although the server may be silent for longer."""
    puller = make_puller(HttpPolicy(allow_private=True, read_timeout=60, total_timeout=0.1))
    await refused(puller, store.url("/stalls/5000000/a.onnx"), PullErrorKind.TIMEOUT)


async def test_an_endless_body_ends_at_the_limit(puller, store):
    """A body without an announced length is cut off when it exceeds the size limit."""
    await refused(puller, store.url("/endless/a.onnx"), PullErrorKind.TOO_LARGE)
    await until(store.gone.is_set)


async def test_an_announced_length_over_the_limit_is_not_begun(puller, store):
    """A body whose announced length exceeds the limit is refused before it is read."""
    await refused(puller, store.url(f"/truncated/{2**26}/a.onnx"), PullErrorKind.TOO_LARGE)


@pytest.mark.parametrize("after", ["headers", "1000", "9000000"])
async def test_a_cancelled_pull_leaves_nothing(puller, store, left, after, make_puller):
    """A pull that is cancelled at any stage leaves nothing: its folder is removed, and the server sees the client
    disconnect."""
    patient = make_puller(HttpPolicy(allow_private=True))
    task = asyncio.create_task(patient.pull(Source(store.url(f"/stalls/{after}/a.onnx")), into="id"))
    await store.blocked.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert entries(patient) == set()
    await until(store.gone.is_set)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0x7f000001", "[::1]", "[::ffff:127.0.0.1]", "[::]"])
async def test_loopback_is_refused_by_default(make_puller, store, host):
    """Loopback is refused by default in every spelling, and a server there receives no request."""
    await refused(make_puller(HttpPolicy()), store.url("/small/a", host=host), PullErrorKind.FORBIDDEN)
    assert not store.requests


@pytest.mark.parametrize("host", ["127.1", "2130706433", "0"])
async def test_short_forms_of_addresses_are_no_hosts(make_puller, store, host):
    """Short forms of addresses, which `inet_aton` would take for loopback, are refused as invalid hosts."""
    await refused(make_puller(HttpPolicy()), store.url("/small/a", host=host), PullErrorKind.BAD_REQUEST)
    assert not store.requests


class Only(HttpPolicy):
    """A rule that allows only one address, so loopback can stand for both allowed and forbidden places."""

    def refusal(self, host: str) -> str | None:
        return None if host == "127.0.0.2" else super().refusal(host)


@pytest.fixture
async def world(store):
    """A server at the one address that `Only` allows, and at another port than `store`: with the same port, one name
    for both would be one origin, whose connection is used again."""
    world = Store()
    runner = await serve(world, "127.0.0.2")
    while world.port == store.port:
        other = await serve(world, "127.0.0.2")
        await runner.cleanup()
        runner = other
    yield world
    await runner.cleanup()


@pytest.mark.parametrize("hops", [1, 3])
async def test_a_redirect_to_loopback_is_refused(make_puller, store, world, hops):
    """A redirect to loopback, directly or after allowed redirects, is refused, and the server there receives no
    request."""
    url = store.url("/small/a")
    for _ in range(hops):
        url = world.url(f"/to/a?url={quote(url, safe='')}")
    assert "loopback" in await refused(make_puller(Only()), url, PullErrorKind.FORBIDDEN)
    assert not store.requests
    assert len(world.requests) == hops


async def test_cloud_metadata_is_refused_even_where_private_is_allowed(make_puller, store):
    """A redirect to the link-local address where clouds serve credentials is refused even if private addresses are
    allowed."""
    puller = make_puller(HttpPolicy(allow_private=True))
    url = store.url("/to/a?url=" + quote("http://169.254.169.254/latest/meta-data", safe=""))
    assert "link-local" in await refused(puller, url, PullErrorKind.FORBIDDEN)


async def test_redirects_that_are_allowed_are_followed(puller, store):
    """Allowed redirects, relative and absolute, are followed. The content comes from the target, and the file's name
    from the registered URL."""
    for target in ("/small/b", store.url("/small/b"), "../small/b"):
        pulled = await puller.pull(Source(store.url(f"/to/a.onnx?url={quote(target, safe='')}")), into="id")
        assert pulled.path.read_bytes() == CONTENT
        assert pulled.path.name == "a.onnx"


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://127.0.0.1/a", "http://", "//[bad/", "gopher://x", "http://h:99999/"]
)
async def test_redirects_to_other_schemes_are_refused(puller, store, target):
    """Redirects to schemes other than http and https, and to invalid URLs, are refused."""
    await refused(puller, store.url(f"/to/a?url={quote(target, safe='')}"), PullErrorKind.BAD_REQUEST)


@pytest.mark.parametrize("path", ["/circle/a", "/nowhere/a"])
async def test_redirects_that_lead_nowhere_end(puller, store, path):
    """A loop of redirects ends after at most six requests, and a redirect without a target is refused."""
    await refused(puller, store.url(path), PullErrorKind.BAD_REQUEST)
    assert len(store.requests) <= 6


@pytest.fixture
def names(monkeypatch):
    """A name server that gives the test's answers for a name one after the other, as in DNS rebinding."""
    answers: dict[str, list[list[str]]] = {}

    async def getaddrinfo(self, host, port, *, family=0, type=0, proto=0, flags=0):
        addresses = answers[host].pop(0) if len(answers[host]) > 1 else answers[host][0]
        return [(2, 1, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    return answers


async def test_a_name_is_judged_by_the_address_connected_to(make_puller, store, world, names):
    """A name is judged by the address that it resolves to: a name for loopback is refused, and of several addresses
    only an allowed one is used."""
    puller = make_puller(Only())
    names["inner.test"] = [["127.0.0.1"]]
    names["inner-2.test"] = [["127.0.0.1", "127.0.0.3"]]
    for host in ("inner.test", "inner-2.test"):
        text = await refused(puller, store.url("/small/a", host=host), PullErrorKind.FORBIDDEN)
        told = r": 127\.0\.0\.[13] is a loopback address, which the operator does not allow \(--http-allow-private\)"
        assert re.search(told + "$", text)
    names["both.test"] = [["127.0.0.1", "127.0.0.2"]]
    pulled = await puller.pull(Source(world.url("/small/a", host="both.test")), into="id")
    assert pulled.path.read_bytes() == CONTENT
    assert not store.requests


async def test_a_redirect_to_a_name_of_loopback_is_refused(make_puller, world, names):
    puller = make_puller(Only())
    names["first.test"] = [["127.0.0.2"]]
    names["rebound.test"] = [["127.0.0.1"]]
    url = world.url(f"/to/a?url={quote('http://rebound.test:1/x', safe='')}", host="first.test")
    await refused(puller, url, PullErrorKind.FORBIDDEN)


async def test_a_name_that_is_rebound_to_loopback_is_refused(make_puller, store, world, names):
    """One name leads to an allowed address at first, and to loopback for the next request, which a redirect to the
    same name causes. A check of the name's first answer would let the second request through."""
    puller = make_puller(Only())
    names["changes.test"] = [["127.0.0.2"], ["127.0.0.1"]]
    url = world.url(f"/to/a?url={quote(store.url('/small/a', host='changes.test'), safe='')}", host="changes.test")
    await refused(puller, url, PullErrorKind.FORBIDDEN)
    assert len(world.requests) == 1
    assert not store.requests


async def test_credentials_are_sent_to_their_origin_only(puller, store):
    """Credentials are sent to the URL's origin, also after a redirect there, but not to another origin."""
    other = Store()
    runner = await serve(other, "127.0.0.2")
    try:
        await puller.pull(Source(store.url("/to/a?url=/small/b", user="u:p%40ss")), into="id")
        assert [request.headers.get("Authorization") for request in store.requests] == ["Basic dTpwQHNz"] * 2
        await puller.pull(
            Source(store.url(f"/to/a?url={quote(other.url('/small/b'), safe='')}", user="u:p")), into="id"
        )
        assert "Authorization" not in other.requests[0].headers
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/status/404/a?sig=secret", PullErrorKind.NOT_FOUND),
        ("/status/500/a?sig=secret", PullErrorKind.UNREACHABLE),
        ("/truncated/100001/a?sig=secret", PullErrorKind.INTEGRITY),
        ("/stalls/0/a?sig=secret", PullErrorKind.TIMEOUT),
        ("/to/a?url=https%3A%2F%2Fuser%3Asecret%40127.0.0.1%3A1%2Fa%3Fsecret", PullErrorKind.UNREACHABLE),
        ("/to/a?url=ftp%3A%2F%2Fuser%3Asecret%40127.0.0.1%2Fa", PullErrorKind.BAD_REQUEST),
    ],
)
async def test_errors_hold_no_secrets(puller, store, path, kind):
    """Neither an error nor the errors that caused it show a password or a query."""
    with pytest.raises(PullError) as caught:
        await puller.pull(Source(store.url(path, user="user:secret")), into="id")
    assert caught.value.kind is kind, caught.value
    shown: BaseException | None = caught.value
    while shown is not None:
        assert "secret" not in str(shown)
        shown = shown.__cause__ or (None if shown.__suppress_context__ else shown.__context__)


async def test_the_source_of_a_pull_is_shown_without_secrets(puller, store):
    pulled = await puller.pull(Source(store.url("/small/a?sig=secret", user="user:secret")), into="id")
    assert "secret" not in pulled.source
    assert pulled.source.startswith("http://127.0.0.1")


async def test_a_signed_query_arrives_as_it_was_registered(puller, store):
    """A signed query is sent as it was registered, because quoting it again would break the signature."""
    await puller.pull(Source(store.url("/small/a?sig=%2fA%3d+b,c;d")), into="id")
    assert store.requests[0].rel_url.raw_query_string == "sig=%2fA%3d+b,c;d"


async def test_servers_that_are_not_there(puller):
    """A refused connection and an unknown host name are different kinds of errors. Both errors name the server."""
    assert "127.0.0.1" in await refused(puller, "http://127.0.0.1:1/a", PullErrorKind.UNREACHABLE)
    assert "no-such-host.invalid" in await refused(puller, "http://no-such-host.invalid/a", PullErrorKind.DNS)


@pytest.mark.parametrize(
    "url", ["http://", "http:///a", "https://host:bad/a", "http:/a", "http://[::1/a", "http://a b/"]
)
async def test_urls_that_are_none(puller, url):
    await refused(puller, url, PullErrorKind.BAD_REQUEST)


async def test_a_server_that_speaks_something_else(puller):
    """A server that answers with something other than HTTP counts as unreachable."""

    async def speak(reader, writer):
        writer.write(b"220 ftp.example.com ready\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(speak, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    await refused(puller, f"http://127.0.0.1:{port}/a", PullErrorKind.UNREACHABLE)
    server.close()


async def test_proxies_of_the_environment_are_not_used(puller, store, monkeypatch):
    """Without proxies in its policy, a puller ignores the proxy variables of the environment."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert (await puller.pull(Source(store.url("/small/a")), into="id")).bytes == len(CONTENT)


async def test_a_private_ca(make_puller, tmp_path):
    """A certificate of a private authority is trusted if the operator supplies that authority. A redirect from https to
    http is refused."""
    ca, server = certificate("127.0.0.1")
    (tmp_path / "server.pem").write_bytes(server)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(Path(tmp_path / "server.pem"))
    store = Store()
    runner = await serve(store, "127.0.0.1", context)
    try:
        url = str(URL(store.url("/small/a")).with_scheme("https"))
        untrusting = make_puller(HttpPolicy(allow_private=True))
        assert "certificate" in await refused(untrusting, url, PullErrorKind.TLS)
        trusting = make_puller(HttpPolicy(allow_private=True, ca=ca))
        assert (await trusting.pull(Source(url), into="id")).path.read_bytes() == CONTENT
        await trusting.remove("id")
        downgrade = str(URL(store.url("/to/a?url=http%3A%2F%2F127.0.0.1%3A1%2Fa")).with_scheme("https"))
        await refused(trusting, downgrade, PullErrorKind.FORBIDDEN)
    finally:
        await runner.cleanup()


async def test_other_stores_can_be_added(tmp_path):
    """A puller uses the providers that its caller gives it. Their files are cleaned up like those of the built-in
    stores."""

    class Fake:
        closed = False

        async def listing(self, location):
            return Listing((RemoteFile("", key=location.name, size=1),), is_file=True)

        async def read(self, location, file, sink):
            sink.write(b"x", 0)
            if file.key == "bad":
                raise PullError(PullErrorKind.NOT_FOUND, "no")

        async def close(self):
            self.closed = True

    fake = Fake()
    puller = Puller(directory=tmp_path / "models", providers={"s3": fake})
    assert (await puller.pull(Source("s3://bucket/a.onnx"), into="id")).bytes == 1
    await puller.remove("id")
    await until(lambda: entries(puller) == set(), why="the file is safe in the cache")
    await refused(puller, "s3://bucket/bad", PullErrorKind.NOT_FOUND)
    assert "s3:" in await refused(puller, "gopher://host/a", PullErrorKind.BAD_REQUEST)
    statistics = puller.statistics()
    assert (statistics.pulls, statistics.failures, statistics.bytes, statistics.leftovers) == (1, 1, 1, 0)
    await puller.close()
    assert fake.closed
