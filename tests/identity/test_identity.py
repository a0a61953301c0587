"""The files of an identity: which files are refused at the start, what a change of files does, and real connections
over gRPC and Mesh's own transport."""

import asyncio
import ssl

import grpc
import pytest
from cryptography.hazmat.primitives import serialization

from mesh.identity import Identity, IdentityError, credentials, handover, rpc
from mesh.identity.handover import KEEP, SETTLE
from mesh.pb import health_pb2, health_pb2_grpc
from mesh.telemetry import metrics
from mesh.wire import framing
from mesh.wire.client import Lost, Pool
from mesh.wire.server import Server
from tests.support.authority import SERVER_ONLY, Authority, Mounted

OPTIONS = (("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1))


@pytest.fixture
def authority() -> Authority:
    return Authority()


@pytest.fixture
def mounted(tmp_path, authority) -> Mounted:
    return Mounted.of(tmp_path / "tls", authority)


def test_an_identity_knows_when_it_expires(mounted):
    identity = Identity(mounted.path)
    assert 23.9 * 3600 < identity.expires_in <= 24 * 3600
    registry = metrics.Registry()
    identity.follow(registry)
    line = next(
        line
        for line in metrics.render(registry.snapshot()).decode().splitlines()
        if line.startswith("mesh_internal_certificate_expires_seconds ")
    )
    assert 23.9 * 3600 < float(line.split()[1]) <= 24 * 3600
    assert identity.statistics().refusal == ""


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        pytest.param(lambda files, ours, other: files.pop("tls_key"), ["tls.key", "mesh certificates"], id="missing"),
        pytest.param(
            lambda files, ours, other: files.update(tls_key=other.issue()[1]),
            ["tls.crt", "tls.key", "key values mismatch"],
            id="key-of-another",
        ),
        pytest.param(lambda files, ours, other: files.update(tls_key=b"x"), ["tls.key", "PEM"], id="no-key"),
        pytest.param(lambda files, ours, other: files.update(ca_crt=b"x"), ["ca.crt", "PEM"], id="no-authority"),
        pytest.param(
            lambda files, ours, other: files.update(ca_crt=b"\xff"), ["ca.crt", "PEM"], id="authority-not-even-text"
        ),
        pytest.param(
            lambda files, ours, other: files.update(ca_crt=other.pem), ["ca.crt", "signed by"], id="other-authority"
        ),
        pytest.param(
            lambda files, ours, other: files.update(
                zip(("tls_crt", "tls_key"), ours.issue("mesh.example"), strict=True)
            ),
            ["mesh.internal", "mismatch"],
            id="other-name",
        ),
        pytest.param(
            lambda files, ours, other: files.update(zip(("tls_crt", "tls_key"), ours.issue(hours=-1), strict=True)),
            ["tls.crt has expired on", "internalTLS.existingSecret"],
            id="expired",
        ),
        pytest.param(
            lambda files, ours, other: files.update(
                zip(("tls_crt", "tls_key"), ours.issue(use=SERVER_ONLY), strict=True)
            ),
            ["purpose", "servers and clients"],
            id="for-servers-only",
        ),
    ],
)
def test_files_that_do_not_work_are_refused_at_the_start(tmp_path, authority, spoil, words):
    """The error about unusable files says which file is wrong, or what is wrong with the certificate."""
    certificate, key = authority.issue()
    files = {"ca_crt": authority.pem, "tls_crt": certificate, "tls_key": key}
    spoil(files, authority, Authority("other"))
    folder = Mounted(tmp_path / "tls", **files)
    with pytest.raises(IdentityError) as caught:
        Identity(folder.path)
    for word in words:
        assert word in str(caught.value)


def test_a_key_with_a_password_does_not_ask_for_it(tmp_path, authority):
    certificate, key = authority.issue()
    private = serialization.load_pem_private_key(key, None).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"secret")
    )
    folder = Mounted(tmp_path / "tls", ca_crt=authority.pem, tls_crt=certificate, tls_key=private)
    with pytest.raises(IdentityError, match="without a password"):
        Identity(folder.path)


def test_a_change_is_taken_and_a_bad_one_is_not(mounted, authority):
    identity = Identity(mounted.path)
    first = identity.current
    assert not identity.look()
    mounted.issue(authority, hours=12)
    assert identity.look()
    second = identity.current
    assert second.certificate != first.certificate
    assert identity.expires_in <= 12 * 3600

    mounted.issue(authority, trust=Authority("other").pem)
    assert not identity.look()
    assert identity.current is second
    assert "signed by" in identity.statistics().refusal

    mounted.issue(authority)
    assert identity.look()
    assert identity.statistics().refusal == ""
    assert identity.changes == 2


# --- connections --------------------------------------------------------------------------------------------------


class Ends:
    """A pod's data port and control port with an identity."""

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self.data = Server(lambda call: call.reply(call.frame))
        self.control = grpc.aio.server(interceptors=(rpc.OnlyKnown(),))

    async def __aenter__(self) -> "Ends":
        self.data_port = await self.data.listen_tcp("127.0.0.1", 0, identity=self.identity)
        health_pb2_grpc.add_HealthServicer_to_server(Health(), self.control)
        self.control_port = rpc.listen(self.control, "127.0.0.1:0", self.identity)
        await self.control.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.data.close(0)
        await self.control.stop(None)

    async def call(self, identity: Identity | None) -> str:
        """Calls the data port on a new connection. Returns an empty text, or the reason why there was no answer."""
        pool = Pool(f"127.0.0.1:{self.data_port}", identity=identity, connect_timeout=5)
        try:
            reply = await pool.call(b"/s/m", (), framing.pack(b"hello"), timeout=10)
            assert reply.frame == framing.pack(b"hello")
            return ""
        except Lost as lost:
            return str(lost)
        finally:
            pool.abort()

    async def ask(self, identity: Identity | None) -> str:
        """Calls the control port on a new connection. Returns an empty text, or the reason why there was no answer."""
        async with rpc.channel(f"127.0.0.1:{self.control_port}", OPTIONS, identity) as channel:
            try:
                await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
                return ""
            except grpc.aio.AioRpcError as error:
                return f"{error.code().name} {error.details()}"


class Health(health_pb2_grpc.HealthServicer):
    async def Check(self, request, context):
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


@pytest.fixture(params=["call", "ask"])
def port(request):
    return request.param


async def test_those_of_one_authority_talk_to_each_other(port, mounted, authority, tmp_path):
    async with Ends(Identity(mounted.path)) as ends:
        for _ in range(2):
            assert await getattr(ends, port)(Identity(Mounted.of(tmp_path / f"{_}", authority).path)) == ""


async def test_others_are_refused(port, mounted, authority, tmp_path, monkeypatch):
    """A client is refused if it connects without TLS, or if its certificate has expired, is from another authority, or
    is for another name. The right certificate is accepted."""
    ours = Identity(mounted.path)
    async with Ends(ours) as ends:
        assert await getattr(ends, port)(None)

        other = Authority("other")
        stranger = Identity(Mounted.of(tmp_path / "stranger", other, trust=other.pem + authority.pem).path)
        assert await getattr(ends, port)(stranger)

        monkeypatch.setattr(credentials, "_handshake", lambda *_: {"notAfter": "Jan  5 09:34:43 2018 GMT"})
        expired = Identity(Mounted.of(tmp_path / "expired", authority, hours=-1).path)
        assert await getattr(ends, port)(expired)

        certificate, key = authority.issue("mesh.example")
        named = Mounted(tmp_path / "named", ca_crt=authority.pem, tls_crt=certificate, tls_key=key)
        assert await getattr(ends, port)(Identity(named.path))

        assert await getattr(ends, port)(ours) == ""


async def test_a_client_without_a_certificate_is_refused(mounted, authority):
    trusting = ssl.create_default_context(cadata=authority.pem.decode())
    async with Ends(Identity(mounted.path)) as ends:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", ends.data_port, ssl=trusting, server_hostname="mesh.internal"
        )
        writer.write(b"POST /s/m HTTP/1.1\r\n\r\n")
        with pytest.raises((ssl.SSLError, ConnectionError, EOFError)):
            await asyncio.wait_for(reader.readexactly(1), 10)
        writer.close()
        nothing = grpc.ssl_channel_credentials(authority.pem)
        options = (*OPTIONS, ("grpc.ssl_target_name_override", "mesh.internal"))
        async with grpc.aio.secure_channel(f"127.0.0.1:{ends.control_port}", nothing, options) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_server_of_another_name_or_authority_is_not_called(port, mounted, authority, tmp_path, monkeypatch):
    ours = Identity(mounted.path)
    monkeypatch.setattr(credentials, "_handshake", lambda *_: {"notAfter": "Jan  5 09:34:43 2018 GMT"})
    certificate, key = authority.issue("mesh.example")
    other = Authority("other")
    for folder in (
        Mounted(tmp_path / "named", ca_crt=authority.pem, tls_crt=certificate, tls_key=key),
        Mounted.of(tmp_path / "stranger", other, trust=other.pem + authority.pem),
    ):
        async with Ends(Identity(folder.path)) as ends:
            assert await getattr(ends, port)(ours)


async def test_an_authority_changes_without_a_refused_connection(port, mounted, authority, tmp_path):
    """An authority can be replaced without a refused connection, in the order of `mesh certificates`. First both sides
    trust both authorities, then the certificates change, and then the old authority is removed. A listening port
    follows each step. In the end, a process that has not followed is refused."""
    old, new = authority, Authority("new")
    folders = {"server": mounted, "client": Mounted.of(tmp_path / "client", old)}
    server, client = (Identity(folder.path) for folder in folders.values())
    late = Identity(Mounted.of(tmp_path / "late", old).path)
    both = old.pem + new.pem
    async with Ends(server) as ends:
        for who, by, trust in (
            ("server", old, both),
            ("client", old, both),
            ("client", new, both),
            ("server", new, both),
            ("client", new, new.pem),
            ("server", new, new.pem),
        ):
            folders[who].issue(by, trust=trust)
            assert (server if who == "server" else client).look()
            assert await getattr(ends, port)(client) == ""
        assert await getattr(ends, port)(late)


async def test_connections_outlive_a_change(mounted, authority):
    """When certificates change, existing connections to the data port stay open."""
    server = Identity(mounted.path)
    async with Ends(server) as ends:
        pool = Pool(f"127.0.0.1:{ends.data_port}", identity=server, connect_timeout=5)
        await pool.call(b"/s/m", (), framing.pack(b"1"), timeout=10)
        mounted.issue(Authority("new"))
        assert server.look()
        await pool.call(b"/s/m", (), framing.pack(b"2"), timeout=10)
        assert pool.statistics().connections == 1
        pool.abort()


async def test_large_messages_and_refusals_come_through(mounted):
    """Large messages and refusals arrive over TLS. A TLS connection cannot be half-closed after a refusal, but its
    answer must still arrive."""
    identity = Identity(mounted.path)
    large = framing.pack(bytes(3 << 20))
    server = Server(lambda call: call.reply(call.frame), max_message=4 << 20)
    port = await server.listen_tcp("127.0.0.1", 0, identity=identity)
    pool = Pool(f"127.0.0.1:{port}", identity=identity, connect_timeout=5)
    try:
        replies = await asyncio.gather(*(pool.call(b"/s/m", (), large, timeout=30) for _ in range(4)))
        assert all(reply.frame == large for reply in replies)
        refused = await pool.call(b"/s/m", (), framing.pack(bytes(5 << 20)), timeout=30)
        assert refused.code != 0
        assert "4194304" in refused.text
    finally:
        pool.abort()
        await server.close(0)


async def test_a_handshake_that_does_not_go_on_holds_nobody_up(mounted):
    """A client that connects and stays silent delays neither other clients' handshakes nor the closing of the
    server."""
    identity = Identity(mounted.path)
    async with Ends(identity) as ends:
        _, writer = await asyncio.open_connection("127.0.0.1", ends.data_port)
        assert await ends.call(identity) == ""
        assert ends.data.statistics().calls == 1
    writer.close()


# --- another authority, unannounced -------------------------------------------------------------------------------


class Elapsed:
    """A clock for durations that tests set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def test_another_authority_comes_without_a_refused_connection(port, mounted, authority, tmp_path):
    """If the authority's Secret is deleted and made again, a process with the new authority and a process without it
    can still talk. In the end, processes that have followed no longer trust the former authority."""
    new, elapsed = Authority("new"), Elapsed()
    folders = [mounted, Mounted.of(tmp_path / "client", authority)]
    server, client = (Identity(folder.path, elapsed=elapsed) for folder in folders)
    late = Identity(Mounted.of(tmp_path / "late", authority).path)
    fresh = Mounted.of(tmp_path / "fresh", new)
    async with Ends(server) as ends:
        for folder, who in zip(folders, (server, client), strict=True):
            folder.issue(new)
            assert who.look()
            assert await getattr(ends, port)(client) == ""
            assert not who.look()
            elapsed.now += 60.0
        assert await getattr(ends, port)(late) == ""
        assert await getattr(ends, port)(Identity(fresh.path)), "the former certificate is still shown"
        elapsed.now += SETTLE - 120.0
        assert server.look()
        assert not client.look()
        assert await getattr(ends, port)(client) == ""
        assert await getattr(ends, port)(Identity(fresh.path)) == ""
        elapsed.now += 60.0
        assert client.look()
        assert await getattr(ends, port)(client) == ""
        elapsed.now += KEEP
        assert server.look()
        assert client.look()
        assert await getattr(ends, port)(client) == ""
        assert await getattr(ends, port)(late)
        assert server.current.ca == client.current.ca == new.pem
        assert not server.look()


def test_another_authority_is_warned_of_at_once(mounted, caplog):
    identity = Identity(mounted.path)
    mounted.issue(Authority("new"))
    identity.look()
    assert [record.levelname for record in caplog.records if "another authority" in str(record.msg)] == ["WARNING"]


def test_a_former_certificate_that_expires_meanwhile_is_not_shown(mounted, authority, monkeypatch):
    """A former certificate that has expired is no longer presented, because no peer would accept it. If the authority
    changes again, the earlier authorities are still trusted for a while."""
    elapsed = Elapsed()
    identity = Identity(mounted.path, elapsed=elapsed)
    second, third = Authority("second"), Authority("third")
    mounted.issue(second)
    assert identity.look()
    mounted.issue(third)
    elapsed.now += 1.0
    assert identity.look()
    for one in (authority, second, third):
        assert handover.authorities(one.pem) <= handover.authorities(identity.current.ca)
    elapsed.now += KEEP
    assert identity.look()
    assert identity.current.ca == third.pem

    made = credentials.made

    def expired(folder, ca, certificate, private_key):
        if certificate == shown:
            raise IdentityError("it has expired")
        return made(folder, ca, certificate, private_key)

    shown = identity.current.certificate
    monkeypatch.setattr(credentials, "made", expired)
    mounted.issue(authority)
    assert identity.look()
    assert identity.current.certificate != shown
    assert len(handover.authorities(identity.current.ca)) == 2


def test_an_authority_that_is_added_takes_no_steps(mounted, authority):
    identity = Identity(mounted.path)
    mounted.issue(authority, trust=authority.pem + Authority("next").pem)
    assert identity.look()
    assert len(handover.authorities(identity.current.ca)) == 2
    assert not identity.look()
