"""The operator's proxies: every kind of store uses them, except for hosts in `NO_PROXY`, and address checks still
apply."""

import json
import socket
import ssl
from urllib.parse import urlsplit

import pytest
from aiohttp import web

from puller.errors import PullError, PullErrorKind
from puller.http_client import HttpPolicy
from puller.proxies import Proxies
from puller.puller import Puller
from puller.source import Source
from puller.tunnel import Grant, Tunnel
from tests.support.certificates import certificate
from tests.support.liars import File, Liar, unique
from tests.support.once import ONCE

BOTH = {"HTTPS_PROXY": "http://secure:1", "HTTP_PROXY": "plain:2"}


@pytest.mark.parametrize(
    ("environment", "url", "proxy"),
    [
        (BOTH, "https://a.com", "http://secure:1"),
        (BOTH, "http://a.com", "http://plain:2"),
        ({"https_proxy": "http://lower:1", **BOTH}, "https://a.com", "http://lower:1"),
        ({"ALL_PROXY": "http://all:1"}, "http://a.com", "http://all:1"),
        ({"HTTPS_PROXY": "http://secure:1"}, "http://a.com", None),
        ({}, "https://a.com", None),
        (BOTH, "http://localhost:9", None),
        (BOTH, "http://127.0.0.5", None),
        (BOTH, "http://[::1]:8", None),
        *[
            ({**BOTH, "NO_PROXY": no}, f"https://{host}", None if direct else "http://secure:1")
            for no, host, direct in [
                ("a.com", "a.com", True),
                ("a.com", "x.a.com", True),
                ("a.com", "xa.com", False),
                (".a.com", "x.a.com", True),
                (".a.com", "a.com", True),
                ("*.a.com", "x.a.com", True),
                ("A.com", "a.COM.", True),
                ("*", "b.com", True),
                ("b.com, a.com", "a.com", True),
                ("b.com a.com", "a.com", True),
                ("10.0.0.0/8", "10.1.2.3", True),
                ("10.0.0.0/8", "11.1.2.3", False),
                ("10.1.2.3", "10.1.2.3", True),
                ("fd00::/8", "[fd00::1]", True),
                ("a.com:443", "a.com", True),
                ("a.com:8443", "a.com", False),
                ("a.com:8443", "a.com:8443", True),
                ("10.1.2.3:9", "10.1.2.3:9", True),
                ("", "a.com", False),
                (",,", "a.com", False),
                ("1", "10.0.0.1", False),
            ]
        ],
    ],
)
def test_which_proxy_is_for_which_url(environment, url, proxy):
    split = urlsplit(url)
    found = Proxies.of(environment).of_url(split.scheme, split.hostname or "", split.port)
    assert (str(found).rstrip("/") if found else None) == proxy


@pytest.mark.parametrize("text", ["socks5://a:1", "https://a:1", "http://", "http://[::1", "ftp://user:secret@a"])
def test_what_is_no_proxy(text):
    """The error for an invalid proxy names the variable, but shows no password."""
    with pytest.raises(ValueError, match="HTTPS_PROXY") as caught:
        Proxies.of({"HTTPS_PROXY": text})
    assert "secret" not in str(caught.value)


@pytest.fixture
def no_names(monkeypatch):
    """Makes names of stores unknown to this machine, so only the proxy resolves them."""
    real = socket.getaddrinfo

    def resolved(host, *arguments, **more):
        if str(host).endswith(".test"):
            raise socket.gaierror(socket.EAI_NONAME, "not known here")
        return real(host, *arguments, **more)

    monkeypatch.setattr(socket, "getaddrinfo", resolved)


@pytest.fixture
async def world(tmp_path, no_names):
    """A store called store.test that only a proxy reaches, with and without TLS. The proxy records its requests."""
    asked: list[str] = []

    async def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"]

    authority, server = certificate("store.test")
    (tmp_path / "server.pem").write_bytes(server)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "server.pem")
    store = Liar()
    for place in ("/s3/bbb/m", "/www/m", "/hub/o/r/m"):
        store.files[place] = File(unique(3000))
    runner = web.ServerRunner(web.Server(store.answer), shutdown_timeout=0.1)
    await runner.setup()
    for tls in (None, context):
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
    ports = dict(zip(("http", "https"), (address[1] for address in runner.addresses), strict=True))
    proxy = Tunnel(lambda address: None, connect_timeout=5, resolve=resolve)
    yield store, ports, proxy.url(Grant()), authority, asked
    proxy.close()
    await runner.cleanup()


def a_puller(tmp_path, origin: str, environment: dict[str, str], authority: bytes) -> Puller:
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    for name, settings in {
        "s3": {"type": "s3", "endpoint_url": f"{origin}/s3", "access_key_id": "a", "secret_access_key": "b"},
        "hf": {"type": "hf", "endpoint_url": f"{origin}/hub", "token": "t"},
    }.items():
        (secrets / name).write_text(json.dumps(settings))
    policy = HttpPolicy(connect_timeout=5, read_timeout=5, ca=authority, proxies=Proxies.of(environment))
    puller = Puller(directory=tmp_path / "models", http=policy, secrets=secrets, retries=ONCE)
    puller.sweep()
    return puller


def source(kind: str, origin: str) -> Source:
    path = {"s3": "s3://bbb/m", "hf": "hf://o/r/m", "www": f"{origin}/www/m"}[kind]
    return Source(path, "" if kind == "www" else json.dumps({"storage_key": kind}))


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("kind", ["s3", "hf", "www"])
async def test_every_store_is_reached_through_the_proxy(tmp_path, world, kind, scheme):
    """Only the proxy can resolve the store's name. With https, TLS reaches to the store itself."""
    store, ports, proxy, authority, asked = world
    origin = f"{scheme}://store.test:{ports[scheme]}"
    puller = a_puller(tmp_path, origin, {"HTTP_PROXY": proxy, "HTTPS_PROXY": proxy}, authority)
    place = {"s3": "/s3/bbb/m", "hf": "/hub/o/r/m", "www": "/www/m"}[kind]
    assert (await puller.pull(source(kind, origin), into="m")).path.read_bytes() == store.files[place].content
    assert "store.test" in asked
    await puller.close()


@pytest.mark.parametrize("kind", ["s3", "hf", "www"])
async def test_no_proxy_is_heeded(tmp_path, world, kind):
    """A host in `NO_PROXY` is reached directly, and the puller resolves its name."""
    _, ports, proxy, authority, asked = world
    origin = f"http://store.test:{ports['http']}"
    puller = a_puller(tmp_path, origin, {"ALL_PROXY": proxy, "NO_PROXY": ".test"}, authority)
    with pytest.raises(PullError) as caught:
        await puller.pull(source(kind, origin), into="m")
    assert caught.value.kind is PullErrorKind.DNS
    assert not asked
    await puller.close()


@pytest.mark.parametrize("kind", ["s3", "www"])
async def test_a_proxy_is_not_asked_for_what_is_forbidden(tmp_path, world, kind):
    """A forbidden address is refused before the proxy gets a request for it, even after a redirect."""
    store, ports, proxy, authority, asked = world
    origin = f"http://store.test:{ports['http']}"
    puller = a_puller(tmp_path, origin, {"ALL_PROXY": proxy}, authority)
    store.answer_instead = lambda request: web.Response(
        status=302, headers={"Location": "http://169.254.169.254/latest"}
    )
    with pytest.raises(PullError) as caught:
        await puller.pull(source(kind, origin), into="m")
    assert caught.value.kind is PullErrorKind.FORBIDDEN
    assert set(asked) == {"store.test"}
    await puller.close()


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("kind", ["s3", "hf", "www"])
async def test_a_proxy_that_is_not_there(tmp_path, world, kind, scheme):
    """An unreachable proxy is a passing failure, and its password is not shown."""
    _, ports, _, authority, _ = world
    origin = f"{scheme}://store.test:{ports[scheme]}"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    puller = a_puller(tmp_path, origin, {"ALL_PROXY": f"http://user:hidden@127.0.0.1:{port}"}, authority)
    with pytest.raises(PullError) as caught:
        await puller.pull(source(kind, origin), into="m")
    assert caught.value.kind is PullErrorKind.UNREACHABLE
    assert "hidden" not in caught.value.text
    await puller.close()
