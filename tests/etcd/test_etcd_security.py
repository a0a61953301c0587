"""Access to etcd by TLS with a private certificate authority, and by user and password with tokens that expire."""

import asyncio
import datetime
import ipaddress
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from mesh.etcd import Etcd, EtcdDenied, EtcdUnavailable, Lease
from mesh.options.etcdsettings import EtcdFiles, EtcdSettings
from tests.support.counting import counting
from tests.support.etcd import EtcdServer
from tests.support.following import following
from tests.support.proxy import Proxy
from tests.support.waiting import until

# --- TLS ---


@dataclass(frozen=True)
class Pki:
    """A private certificate authority with a certificate for 127.0.0.1 and one for a client, as PEM."""

    ca: bytes
    server: tuple[bytes, bytes]
    client: tuple[bytes, bytes]


_NAMES = (x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("etcd.test"))


def make_certificate(
    name: str, issuer: tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer[0].subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(_NAMES), critical=False)
    )
    return builder.sign(issuer[1] if issuer else key, hashes.SHA256()), key


def pem(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> tuple[bytes, bytes]:
    return certificate.public_bytes(serialization.Encoding.PEM), private_pem(key)


def private_pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


@pytest.fixture(scope="module")
def pki() -> Pki:
    authority = make_certificate("test authority", None)
    return Pki(
        authority[0].public_bytes(serialization.Encoding.PEM),
        pem(*make_certificate("127.0.0.1", authority)),
        pem(*make_certificate("client", authority)),
    )


@pytest.fixture(scope="module")
def tls_etcd(pki: Pki, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """An etcd that accepts only TLS, and only clients with a certificate."""
    folder = tmp_path_factory.mktemp("tls")
    for name, content in (("ca", pki.ca), ("cert", pki.server[0]), ("key", pki.server[1])):
        (folder / name).write_bytes(content)
    extra = [
        f"--cert-file={folder / 'cert'}",
        f"--key-file={folder / 'key'}",
        f"--trusted-ca-file={folder / 'ca'}",
        "--client-cert-auth",
    ]
    with EtcdServer(folder / "data", scheme="https", extra=extra) as server:
        server.settings = EtcdSettings(
            endpoints=(server.endpoint,), ca=pki.ca, certificate=pki.client[0], private_key=pki.client[1]
        )
        yield server


async def test_everything_works_over_mutual_tls(tls_etcd: EtcdServer) -> None:
    async with Etcd(tls_etcd.settings) as etcd, following(etcd, b"k/") as follower:
        lease = await Lease.grant(etcd, ttl=5)
        await etcd.put(b"k/1", b"v", lease=lease.id)
        await follower.has(lambda f: f.content == {b"k/1": b"v"}, "the change has come")
        await lease.revoke()
        await follower.has(lambda f: not f.content, "the deletion has come")


async def test_its_certificate_is_checked_against_a_name_that_was_given(tls_etcd: EtcdServer) -> None:
    """The certificate of etcd is checked against a configured name, because pods' addresses change. A certificate
    without that name is refused."""
    async with Etcd(replace(tls_etcd.settings, server_name="etcd.test")) as etcd:
        assert (await etcd.status()).has_leader
    async with Etcd(replace(tls_etcd.settings, server_name="other.test", timeout=1.0)) as etcd:
        with pytest.raises(EtcdUnavailable):
            await etcd.status(timeout=1.0)


async def test_certificates_are_replaced_while_it_runs(tls_etcd: EtcdServer, pki: Pki, tmp_path: Path) -> None:
    """Requests and watches continue when the files change to certificates of another authority and etcd then trusts
    only the new authority. Unusable files do not change the client."""
    files = {name: tmp_path / name for name in ("ca", "cert", "key")}

    def write(ca: bytes, cert: bytes, key: bytes) -> None:
        for name, content in (("ca", ca), ("cert", cert), ("key", key)):
            files[name].write_bytes(content)

    folder = tls_etcd.folder.parent
    authority = make_certificate("another authority", None)
    server, client = (pem(*make_certificate(name, authority)) for name in ("127.0.0.1", "client"))
    ca = authority[0].public_bytes(serialization.Encoding.PEM)
    write(pki.ca, *pki.client)
    paths = EtcdFiles(ca=str(files["ca"]), certificate=str(files["cert"]), private_key=str(files["key"]))
    settings = replace(tls_etcd.settings, files=paths)
    async with Etcd(settings, follow=True) as etcd, following(etcd, b"r/") as follower:
        await etcd.put(b"r/1", b"v")
        await follower.has(lambda f: f.content == {b"r/1": b"v"}, "the change has come")
        tls_etcd.stop()
        try:
            for name, content in (("ca", ca), ("cert", server[0]), ("key", server[1])):
                (folder / name).write_bytes(content)
            write(b"no authority", *client)
            await tls_etcd.start()
            with pytest.raises(EtcdUnavailable):
                await etcd.status(timeout=1.0)
            write(ca, *client)
            await etcd.put(b"r/2", b"w", timeout=20)
            await follower.has(lambda f: b"r/2" in f.content, "the change has come over a new connection")
        finally:
            tls_etcd.stop()
            for name, content in (("ca", pki.ca), ("cert", pki.server[0]), ("key", pki.server[1])):
                (folder / name).write_bytes(content)
            await tls_etcd.start()


async def test_modelmeshs_secret_reaches_it(tls_etcd: EtcdServer, pki: Pki, tmp_path: Path) -> None:
    """A pod connects with ModelMesh's Secret, mounted as a folder in which the certificates are files next to the
    document. Its keys have the document's root prefix."""
    for name, content in (("ca.crt", pki.ca), ("tls.crt", pki.client[0]), ("tls.key", pki.client[1])):
        (tmp_path / name).write_bytes(content)
    document = {
        "endpoints": tls_etcd.endpoint,
        "root_prefix": "ns-one",
        "certificate_file": "ca.crt",
        "client_certificate_file": "tls.crt",
        "client_key_file": "tls.key",
    }
    (tmp_path / "etcd_connection").write_text(json.dumps(document))
    argv = [sys.executable, "-m", "mesh.runtime", "--etcd-config", str(tmp_path / "etcd_connection")]
    argv += ["--base", "mm/mesh", "--name", "pod-1", "--capacity", "64MiB"]
    pod = await asyncio.create_subprocess_exec(*argv, stderr=asyncio.subprocess.DEVNULL)
    try:
        async with Etcd(tls_etcd.settings) as etcd:

            async def there() -> bool:
                return await etcd.get(b"ns-one/mm/mesh/pods/pod-1") is not None

            await until(there, timeout=60, interval=0.1)
    finally:
        pod.terminate()
        assert await pod.wait() == 0


async def test_the_systems_trust_is_used_where_none_is_given(
    tls_etcd: EtcdServer, pki: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "system.pem").write_bytes(pki.ca)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "system.pem"))
    async with Etcd(replace(tls_etcd.settings, ca=None)) as etcd:
        assert (await etcd.status()).has_leader


@pytest.mark.parametrize("missing", ["authority", "certificate", "tls"])
async def test_what_is_not_trusted_is_not_talked_to(missing: str, tls_etcd: EtcdServer) -> None:
    """A connection with an unknown authority, without a client certificate or without TLS is refused in time. The error
    names the member."""
    settings = replace(tls_etcd.settings, timeout=0.5)
    if missing == "authority":
        other = make_certificate("another authority", None)[0]
        settings = replace(settings, ca=other.public_bytes(serialization.Encoding.PEM))
    elif missing == "certificate":
        settings = replace(settings, certificate=None, private_key=None)
    else:
        settings = replace(settings, endpoints=(tls_etcd.endpoint.replace("https", "http"),))
    async with Etcd(settings) as etcd:
        with pytest.raises(EtcdUnavailable, match=str(tls_etcd.port)):
            await etcd.get(b"k")


def test_unusable_certificates_are_refused_at_once(pki: Pki) -> None:
    with pytest.raises(ValueError, match="not in PEM"):
        Etcd(EtcdSettings(ca=b"-----BEGIN CERTIFICATE-----\nnonsense\n"))
    with pytest.raises(ValueError, match="needs its private key"):
        Etcd(EtcdSettings(certificate=pki.client[0]))


# --- user and password ---


@pytest.fixture(scope="module")
def auth_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """An etcd with the user alice, who may access keys that begin with `mine/`, and tokens that expire after a second.

    The tokens are signed (JWT), because etcd's simple tokens do not expire while they are used.
    """
    folder = tmp_path_factory.mktemp("auth")
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    (folder / "private").write_bytes(private_pem(key))
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / "public").write_bytes(public)
    token = f"--auth-token=jwt,pub-key={folder / 'public'},priv-key={folder / 'private'},sign-method=RS256,ttl=1s"
    with EtcdServer(folder / "data", extra=[token, "--bcrypt-cost=4"]) as server:
        enable_auth(server)
        yield server


def enable_auth(server: EtcdServer) -> None:
    for command in (
        "user add root:secret",
        "user grant-role root root",
        "role add owner",
        "role grant-permission owner --prefix=true readwrite mine/",
        "user add alice:wonder",
        "user grant-role alice owner",
        "auth enable",
    ):
        if command == "user grant-role root root":
            server.etcdctl("role", "add", "root")
        server.etcdctl(*command.split())
    server.settings = replace(server.settings, user="alice", password="wonder")


async def test_a_user_may_do_what_is_granted_and_no_more(auth_etcd: EtcdServer) -> None:
    async with Etcd(auth_etcd.settings) as etcd:
        await etcd.put(b"mine/key", b"v")
        assert await etcd.get(b"mine/key")
        with pytest.raises(EtcdDenied, match="permission denied"):
            await etcd.put(b"other/key", b"v")
        with pytest.raises(EtcdDenied, match="permission denied"):
            await etcd.get(b"other/key")


@pytest.mark.parametrize(
    ("user", "password"), [("alice", "wrong"), ("nobody", "wonder"), ("", "")], ids=["password", "user", "none"]
)
async def test_who_is_not_known_is_denied(user: str, password: str, auth_etcd: EtcdServer) -> None:
    async with Etcd(replace(auth_etcd.settings, user=user, password=password)) as etcd:
        for request in (etcd.get(b"mine/key"), etcd.put(b"mine/key", b""), etcd.update(b"mine/key", lambda _: b"")):
            with pytest.raises(EtcdDenied):
                await request


async def test_counting_while_tokens_expire(auth_etcd: EtcdServer) -> None:
    """A writer continues to count while its tokens expire, and the watch reconnects although its token has
    expired."""
    async with Proxy(auth_etcd.port) as proxy:
        settings = replace(auth_etcd.settings, endpoints=(proxy.endpoint,))
        async with Etcd(auth_etcd.settings) as near, Etcd(settings) as far:
            async with counting(near, near, far, b"mine/counter") as (writer, follower):
                old, tokens = near.statistics().tokens, far.statistics().tokens
                await until(lambda: near.statistics().tokens >= old + 2, why="the writer's tokens have expired twice")
                assert far.statistics().tokens == tokens, "an open watch needs no token"
                proxy.cut()
                await follower.has(lambda f: f.mirror.statistics().watches >= 2, "the watch is opened again")
                await writer.more()
                await follower.has(lambda f: f.mirror.connected, "it is accepted, with a new token")
                assert far.statistics().tokens > tokens
            assert writer.failed == writer.open == 0


async def test_tokens_that_are_all_forgotten_at_once(own_etcd: EtcdServer) -> None:
    """A client recovers when authentication is switched off and on again, after which etcd knows no earlier token.

    Many requests that start at once fetch one token together.
    """
    enable_auth(own_etcd)
    async with Etcd(own_etcd.settings) as etcd:
        await asyncio.gather(*[etcd.get(b"mine/counter") for _ in range(20)])
        async with counting(etcd, etcd, etcd, b"mine/counter") as (writer, _):
            own_etcd.etcdctl("--user=root:secret", "auth", "disable")
            await writer.more()
            assert etcd.statistics().tokens == 1
            own_etcd.etcdctl("auth", "enable")
            await writer.more()
            assert etcd.statistics().tokens == 2


async def test_users_that_change_under_way(auth_etcd: EtcdServer) -> None:
    """A client continues when users change, which makes etcd reject all signed tokens issued before."""
    async with Etcd(auth_etcd.settings) as etcd, counting(etcd, etcd, etcd, b"mine/changing") as (writer, _):
        for name in ("bob", "carol"):
            tokens = etcd.statistics().tokens
            auth_etcd.etcdctl("--user=root:secret", "user", "add", f"{name}:x")
            await writer.more()
            assert etcd.statistics().tokens > tokens


async def test_credentials_where_none_are_needed_do_no_harm(etcd_server: EtcdServer) -> None:
    async with Etcd(replace(etcd_server.settings, user="alice", password="wonder")) as etcd:
        await etcd.put(b"test/credentials", b"")
        assert etcd.statistics().tokens == 0


def test_the_password_is_not_shown() -> None:
    assert "wonder" not in repr(EtcdSettings(user="alice", password="wonder"))
