"""Connections of every provider: only to allowed addresses, after every redirect and name resolution."""

import asyncio
import base64
import itertools
import json
from urllib.parse import urlsplit

import pytest
from aiohttp import web

from puller.errors import PullError, PullErrorKind
from puller.http_client import HttpPolicy
from puller.puller import Puller
from puller.source import Source
from puller.tunnel import Grant, Tunnel
from tests.support.liars import File, liars, unique
from tests.support.once import ONCE

STATUSES = (301, 302, 303, 307, 308)
CONTENT = unique(3000)


@pytest.fixture
async def stores():
    async with liars(2) as made:
        yield made


@pytest.fixture
async def make(tmp_path):
    """A function that makes a puller, whose storage secret has a key for each kind of store at one origin."""
    made = []

    def puller(origin: str, **policy: bool) -> Puller:
        secrets = tmp_path / "secrets"
        secrets.mkdir(exist_ok=True)
        for name, settings in {
            "s3": {"type": "s3", "endpoint_url": f"{origin}/s3", "access_key_id": "a", "secret_access_key": "b"},
            "s3-anonymous": {"type": "s3", "endpoint_url": f"{origin}/s3", "identity": "anonymous"},
            "gs": {"type": "gcs", "endpoint_url": f"{origin}/s3", "identity": "anonymous"},
            "azure": {"type": "azure", "endpoint_url": f"{origin}/s3", "identity": "anonymous"},
            "hf": {"type": "hf", "endpoint_url": f"{origin}/hub", "token": "t"},
        }.items():
            (secrets / name).write_text(json.dumps(settings))
        puller = Puller(
            directory=tmp_path / f"models{len(made)}",
            http=HttpPolicy(connect_timeout=5, read_timeout=5, **policy),
            secrets=secrets,
            retries=ONCE,
        )
        puller.sweep()
        made.append(puller)
        return puller

    yield puller
    for one in made:
        await one.close()


def source(kind: str, origin: str) -> Source:
    """Returns the source of the file `m` in a store of the given kind."""
    path = {
        "s3": "s3://bbb/m",
        "s3-anonymous": "s3://bbb/m",
        "gs": "gs://bbb/m",
        "azure": "azure://account/bbb/m",
        "hf": "hf://o/r/m",
        "http": f"{origin}/www/m",
    }[kind]
    return Source(path, "" if kind == "http" else json.dumps({"storage_key": kind}))


OBJECTS = ("s3", "s3-anonymous", "gs", "azure")


def sends_on(status: int, to: str, *, only_bodies: bool = False):
    """Returns a handler that redirects requests to another place, with `only_bodies` only requests for the file
    itself."""

    def answer(request: web.BaseRequest) -> web.StreamResponse | None:
        if "/api/" in request.path or (only_bodies and request.method != "GET"):
            return None
        return web.Response(status=status, headers={"Location": to})

    return answer


def fill(stores) -> None:
    for store in stores:
        for place in ("/s3/bbb/m", "/www/m", "/hub/o/r/m"):
            store.files[place] = File(CONTENT)


@pytest.mark.parametrize("kind", OBJECTS)
async def test_an_endpoint_of_the_operators_may_be_anywhere(make, stores, kind):
    """The operator's own endpoint may have any address, even if private addresses are not allowed."""
    fill(stores)
    puller = make(stores[0].origin)
    assert (await puller.pull(source(kind, stores[0].origin), into="m")).path.read_bytes() == CONTENT


@pytest.mark.parametrize("only_bodies", [False, True], ids=["all", "bodies"])
@pytest.mark.parametrize("kind", OBJECTS)
async def test_a_store_that_redirects_inside(make, stores, kind, only_bodies):
    """A redirect by a store causes no connection to another port of loopback, by address or by name, or to the address
    where clouds serve credentials."""
    fill(stores)
    store, inside = stores
    puller = make(store.origin)
    hosts = (f"127.0.0.1:{inside.port}", f"localhost:{inside.port}", "169.254.169.254")
    for status, host in itertools.product(STATUSES, hosts):
        store.answer_instead = sends_on(status, f"http://{host}/s3/bbb/m", only_bodies=only_bodies)
        with pytest.raises(PullError) as caught:
            await puller.pull(source(kind, store.origin), into="m")
        # obstore reports a redirect that it does not follow as an error of the store.
        assert caught.value.kind in (PullErrorKind.FORBIDDEN, PullErrorKind.BAD_REQUEST, PullErrorKind.UNREACHABLE)
    assert not inside.delivered


@pytest.mark.parametrize("kind", [*OBJECTS, "hf", "http"])
async def test_link_local_addresses_are_never_allowed_along(make, stores, kind):
    """`--http-allow-private` does not allow link-local addresses. The error names the refused address."""
    fill(stores)
    store = stores[0]
    store.answer_instead = sends_on(302, "http://169.254.169.254/latest/meta-data/", only_bodies=True)
    puller = make(store.origin, allow_private=True)
    with pytest.raises(PullError, match=r"169\.254\.169\.254") as caught:
        await puller.pull(source(kind, store.origin), into="m")
    assert caught.value.kind is PullErrorKind.FORBIDDEN


@pytest.mark.parametrize("kind", [*OBJECTS, "hf", "http"])
async def test_redirects_to_where_it_may_are_followed(make, stores, kind):
    """With private addresses allowed, a redirect to another port of loopback is followed."""
    fill(stores)
    store, other = stores
    place = {"hf": "/hub/o/r/resolve/c/m", "http": "/www/m"}.get(kind, "/s3/bbb/m")
    store.answer_instead = sends_on(307, f"{other.origin}{place}", only_bodies=True)
    puller = make(store.origin, allow_private=True)
    assert (await puller.pull(source(kind, store.origin), into="m")).path.read_bytes() == CONTENT
    assert other.delivered


class Asked:
    """A hand-written client of the tunnel, to make requests that no library would make."""

    def __init__(self, tunnel: Tunnel, grant: Grant) -> None:
        self._url = tunnel.url(grant)

    async def get(self, url: str, headers: str = "", *, as_who: str = "") -> bytes:
        """Returns the answer to a GET of a plain URL, or to a CONNECT."""
        split = urlsplit(self._url)
        token = base64.b64encode(f"{as_who or split.username}:x".encode()).decode()
        reader, writer = await asyncio.open_connection("127.0.0.1", split.port)
        method = "GET" if "://" in url else "CONNECT"
        head = f"{method} {url} HTTP/1.1\r\nHost: x\r\nProxy-Authorization: Basic {token}\r\n{headers}\r\n"
        writer.write(head.encode())
        try:
            return await asyncio.wait_for(reader.read(65536), 10)
        finally:
            writer.close()


@pytest.fixture
async def tunnel(stores):
    """A tunnel that resolves Google's metadata service to its link-local address and other names to loopback, and calls
    every address forbidden."""

    async def resolve(host: str, port: int) -> list[str]:
        return {"metadata.google.internal": ["169.254.169.254"]}.get(host, [host if host[0].isdigit() else "127.0.0.1"])

    made = Tunnel(
        lambda address: "a link-local address" if address in ("127.0.0.2", "169.254.169.254") else "a loopback address",
        connect_timeout=0.5,
        resolve=resolve,
    )
    yield made
    made.close()


@pytest.mark.parametrize(
    "host", ["127.0.0.1:1", "example.com:443", "169.254.169.254:80", "metadata.google.internal:80"]
)
async def test_nothing_is_connected_to_without_leave(tunnel, host):
    """The tunnel connects nowhere without permission, by CONNECT or by a plain request, by address or by name. The
    grant reports each refusal once."""
    grant = Grant(home=frozenset({("elsewhere.example.com", 443)}))
    asked = Asked(tunnel, grant)
    for url in (host, f"http://{host}/"):
        assert (await asked.get(url)).startswith(b"HTTP/1.1 403")
        trouble = grant.trouble()
        assert trouble is not None
        assert trouble.kind is PullErrorKind.FORBIDDEN
        assert grant.trouble() is None


async def test_strangers_get_what_everybody_may(tunnel, stores):
    """Other programs on the machine do not know the tunnel's password. They get neither a connection that needs a grant
    nor an unchecked one."""
    asked = Asked(tunnel, Grant(home=frozenset({("127.0.0.1", stores[0].port)})))
    for url in (f"127.0.0.1:{stores[0].port}", f"{stores[0].origin}/www/none"):
        assert (await asked.get(url)).split()[1] in (b"200", b"404")
        assert (await asked.get(url, as_who="stranger")).split()[1] in (b"403", b"502")


@pytest.mark.parametrize(
    ("headers", "identity", "may"),
    [
        ("Metadata-Flavor: Google\r\n", True, True),
        ("X-aws-ec2-metadata-token: t\r\n", True, True),
        ("Metadata: true\r\n", True, True),
        ("Metadata-Flavor: Google\r\n", False, False),
        ("", True, False),
        ("X-aws-ec2-metadata-token: t\r\nx-amz-content-sha256: UNSIGNED-PAYLOAD\r\n", True, False),
        ("Metadata: true\r\nx-ms-version: 2023\r\n", True, False),
    ],
)
async def test_who_may_ask_who_the_pod_is(tunnel, headers, identity, may):
    """Only a client that uses the pod's identity may call the metadata service, and only with the service's own header,
    which a request after a store's redirect lacks."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nme")
        writer.close()

    service = await asyncio.start_server(serve, "127.0.0.2", 0)
    port = service.sockets[0].getsockname()[1]
    grant = Grant(identity=identity)
    answer = await Asked(tunnel, grant).get(f"http://127.0.0.2:{port}/latest/", headers)
    assert answer.endswith(b"me") is may
    assert answer.startswith(b"HTTP/1.1 403") is not may
    service.close()


async def test_many_objects_arrive_unchanged(make, stores):
    """A tree of sixty objects of up to half a megabyte is pulled."""
    store = stores[0]
    for number in range(60):
        store.files[f"/s3/bbb/t/{number}"] = File(unique(1000 + number * 9000))
    pulled = await make(store.origin).pull(Source("s3://bbb/t", '{"storage_key": "s3"}'), into="m")
    for number in range(60):
        assert (pulled.path / str(number)).read_bytes() == store.files[f"/s3/bbb/t/{number}"].content


@pytest.mark.parametrize("path", ["/www/", "/www/tree/", "", "/www/tree", "/www/page", "/www/page.onnx?x=/"])
async def test_an_index_is_no_model(make, stores, path):
    """An index page or a sign-in page is not taken for a model, because a URL names one file."""
    store = stores[0]

    def answer(request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/www/tree":
            return web.Response(status=301, headers={"Location": "/www/tree/"})
        return web.Response(text="<html><a href='a.onnx'>a.onnx</a></html>", content_type="text/html")

    store.answer_instead = answer
    with pytest.raises(PullError, match=r"one file|not with a file") as caught:
        await make(store.origin, allow_private=True).pull(Source(f"{store.origin}{path}"), into="m")
    assert caught.value.kind is PullErrorKind.BAD_REQUEST


async def test_a_page_that_is_asked_for_by_name_is_a_file(make, stores):
    """An HTML page that the URL names explicitly is a file, because a model may have such a name."""
    store = stores[0]
    store.answer_instead = lambda request: web.Response(text="<html>", content_type="text/html")
    pulled = await make(store.origin, allow_private=True).pull(Source(f"{store.origin}/www/m.html"), into="m")
    assert pulled.path.read_bytes() == b"<html>"


@pytest.mark.parametrize("kind", ["s3", "s3-anonymous", "http"])
@pytest.mark.parametrize("status", [301, 307])
async def test_a_redirect_that_leads_nowhere(make, stores, kind, status):
    """A redirect without a target, as S3 answers for a bucket of another region, is an error that names the setting
    `region`."""
    store = stores[0]
    store.answer_instead = lambda request: web.Response(status=status)
    with pytest.raises(PullError, match='"region"') as caught:
        await make(store.origin, allow_private=True).pull(source(kind, store.origin), into="m")
    assert caught.value.kind is PullErrorKind.BAD_REQUEST
