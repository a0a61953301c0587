"""Credentials for etcd that change while a client runs. The client takes them only if they work."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from mesh.etcd import Etcd, EtcdDenied, EtcdError, Lease, rotation
from mesh.options import etcd as etcdoptions
from mesh.options import etcdsecret
from mesh.options.etcdsettings import EtcdFiles, EtcdSettings
from tests.support.authority import Authority, Mounted
from tests.support.etcd import EtcdServer
from tests.support.following import following
from tests.support.proxy import Proxy
from tests.support.waiting import until

ROOT = "--user=root:secret"


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, "LOOK", 0.1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """An etcd with the users alice and bob, who may access `mine/`, and eve, who may access nothing."""
    with EtcdServer(tmp_path_factory.mktemp("rotation") / "etcd", extra=["--bcrypt-cost=4"]) as server:
        server.etcdctl("role", "add", "root")
        server.etcdctl("role", "add", "owner")
        server.etcdctl("role", "grant-permission", "owner", "--prefix=true", "readwrite", "mine/")
        for user in ("root:secret", "alice:wonder", "bob:builder", "eve:evil"):
            server.etcdctl("user", "add", user)
        for user, role in (("root", "root"), ("alice", "owner"), ("bob", "owner")):
            server.etcdctl("user", "grant-role", user, role)
        server.etcdctl("auth", "enable")
        yield server


class Mount:
    """The Secret with the credentials, as mounted in a pod."""

    def __init__(self, folder: Path, server: EtcdServer) -> None:
        self.known = {"endpoints": server.endpoint, "userid": "alice", "password": "wonder", "root_prefix": "mine"}
        self.mounted = Mounted(folder, etcd_connection=b"")
        self.path = folder / "etcd.connection"  # the name that `Mounted` gives to the file
        self.put()

    def put(self, raw: bytes | None = None, **changes: str) -> None:
        self.known.update(changes)
        self.mounted.put(etcd_connection=json.dumps(self.known).encode() if raw is None else raw)

    def client(self) -> Etcd:
        return Etcd(etcdsecret.read(self.path).settings, follow=True)


@pytest.fixture
def mount(tmp_path: Path, server: EtcdServer) -> Mount:
    server.etcdctl(ROOT, "del", "--prefix", "mine/")
    passwd(server, "alice", "wonder")
    return Mount(tmp_path / "secret", server)


def passwd(server: EtcdServer, user: str, password: str) -> None:
    """Changes a user's password, after which etcd no longer accepts the user's tokens."""
    server.etcdctl(ROOT, "user", "passwd", user, "--interactive=false", stdin=password)


async def test_a_password_that_etcd_changes_first(server: EtcdServer, mount: Mount) -> None:
    """If etcd changes a password before the Secret, requests are refused until the Secret follows. A lease and a watch
    continue throughout."""
    async with mount.client() as etcd, following(etcd, b"mine/") as follower:
        lease = await Lease.grant(etcd, ttl=3)
        await etcd.put(b"mine/a", b"1", lease=lease.id)
        passwd(server, "alice", "changed")
        with pytest.raises(EtcdDenied):
            await etcd.put(b"mine/b", b"2")
        mount.put(password="changed")
        await etcd.put(b"mine/b", b"2")
        await follower.has(lambda f: f.content == {b"mine/a": b"1", b"mine/b": b"2"}, "both changes have come")
        assert len(follower.snapshots) == 1
        assert etcd.statistics().credential_changes == 1
        await until(lambda: lease.statistics().streams == 2, timeout=30, why="the lease is renewed in the new way")
        assert not lease.lost.is_set()
        await lease.close()


async def test_a_password_that_the_secret_changes_first(server: EtcdServer, mount: Mount) -> None:
    """If the Secret changes a password before etcd, no request is refused: the client uses the old password until etcd
    accepts the new one."""
    async with mount.client() as etcd:
        await etcd.put(b"mine/a", b"1")
        mount.put(password="changed")
        await until(lambda: "authentication failed" in etcd.statistics().refusal, why="the new password was tried")
        await etcd.put(b"mine/a", b"2")
        passwd(server, "alice", "changed")
        # What was refused a moment ago is not tried again within a second: the request may be early.
        await until(lambda: _done(etcd.put(b"mine/a", b"3")), interval=0.1, why="the new password is taken")
        assert etcd.statistics().credential_changes == 1
        assert etcd.statistics().refusal == ""


async def _done(request) -> bool:
    try:
        await request
    except EtcdDenied:
        return False
    return True


async def test_another_user_without_a_failure(server: EtcdServer, mount: Mount) -> None:
    """A client changes to another user without a failure if both users are valid for a while."""
    async with mount.client() as etcd, following(etcd, b"mine/") as follower:
        await etcd.put(b"mine/a", b"1")
        mount.put(userid="bob", password="builder")
        await until(lambda: etcd.statistics().credential_changes == 1, why="the new user is taken, without any request")
        await until(lambda: follower.mirror.statistics().watches == 2, why="the watch takes the new user too")
        server.etcdctl(ROOT, "user", "revoke-role", "alice", "owner")
        await etcd.put(b"mine/a", b"2")
        await follower.has(lambda f: f.content == {b"mine/a": b"2"}, "the change has come")
        assert etcd.settings.user == "bob"
    server.etcdctl(ROOT, "user", "grant-role", "alice", "owner")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        pytest.param({"raw": b'{"endpoints": '}, "not a JSON object", id="half a file"),
        pytest.param({"certificate_file": "ca.crt"}, "certificate_file", id="a key that is missing"),
        pytest.param({"password": "wrong"}, "authentication failed", id="password"),
        pytest.param({"userid": "eve", "password": "evil"}, "permission denied", id="a user without rights"),
        pytest.param({"endpoints": "http://127.0.0.1:1"}, "127.0.0.1:1", id="an endpoint where nobody is"),
        pytest.param({"root_prefix": "theirs"}, "restart the process", id="other keys"),
        pytest.param({"certificate": "nonsense"}, "not in PEM", id="no certificate"),
    ],
)
async def test_what_does_not_work_is_not_taken(change: dict[str, str], says: str, mount: Mount) -> None:
    """If new credentials do not work, the client keeps its connection and logs one warning with the reason. When the
    Secret returns to the old credentials, there is no further warning."""
    with capture_logs() as lines:
        await _keeps(change, says, mount)
    (told,) = [line for line in lines if line["log_level"] == "warning"]
    assert "are kept" in told["event"]
    assert says in told["why"]
    assert "wonder" not in repr(lines)


async def _keeps(change: dict[str, str], says: str, mount: Mount) -> None:
    before = dict(mount.known)
    async with mount.client() as etcd, following(etcd, b"mine/") as follower:
        await etcd.put(b"mine/a", b"1")
        mount.put(**change)
        await until(lambda: says in etcd.statistics().refusal, timeout=30, why=lambda: etcd.statistics().refusal)
        await etcd.put(b"mine/a", b"2")
        await follower.has(lambda f: f.content == {b"mine/a": b"2"}, "the watch goes on")
        assert follower.mirror.statistics().watches == 1
        mount.known = before
        mount.put()
        await until(lambda: not etcd.statistics().refusal, why="the refusal is over")
        assert etcd.statistics().credential_changes == 0


async def test_other_endpoints(server: EtcdServer, mount: Mount) -> None:
    """Requests and streams move to new endpoints, and the old address is no longer needed."""
    async with Proxy(server.port) as proxy:
        mount.put(endpoints=proxy.endpoint)
        async with mount.client() as etcd, following(etcd, b"mine/") as follower:
            await etcd.put(b"mine/a", b"1")
            assert etcd.statistics().endpoint == proxy.endpoint
            mount.put(endpoints=server.endpoint)
            await until(lambda: etcd.statistics().endpoint == server.endpoint, why="the new endpoints are taken")
            await until(lambda: follower.mirror.statistics().watches == 2, why="the watch takes the new endpoints too")
            proxy.cut()
            await etcd.put(b"mine/a", b"2")
            await follower.has(lambda f: f.content == {b"mine/a": b"2"}, "the change has come")


async def test_many_who_are_refused_together(server: EtcdServer, mount: Mount) -> None:
    """When many requests are refused together, the credentials are renewed only once, for all of them."""
    async with mount.client() as etcd:
        await etcd.put(b"mine/a", b"1")
        passwd(server, "alice", "changed")
        mount.put(password="changed")
        await asyncio.gather(*(etcd.get(b"mine/a") for _ in range(50)))
        assert etcd.statistics().credential_changes == 1
        assert etcd.statistics().tokens == 1


async def test_who_does_not_follow_stays(server: EtcdServer, mount: Mount) -> None:
    """A client that does not follow the Secret, such as a command for one member of etcd, keeps its credentials."""
    async with Etcd(replace(etcdsecret.read(mount.path).settings, endpoints=(server.endpoint,))) as etcd:
        await etcd.put(b"mine/a", b"1")
        passwd(server, "alice", "changed")
        mount.put(password="changed")
        with pytest.raises(EtcdDenied):
            await etcd.put(b"mine/a", b"2")


async def test_a_password_in_a_file_of_its_own(server: EtcdServer, tmp_path: Path) -> None:
    """A client follows a password from `--etcd-password-file` too."""
    passwd(server, "alice", "wonder")
    path = tmp_path / "password"
    path.write_text("wonder\n")
    settings, base = etcdoptions.Login(etcd_user="alice", etcd_password_file=path).reach(server.endpoint, base="mine")
    assert base == "mine"
    async with Etcd(settings, follow=True) as etcd:
        await etcd.put(b"mine/a", b"1")
        passwd(server, "alice", "changed")
        path.write_text("changed\n")
        await etcd.put(b"mine/a", b"2")
        assert etcd.statistics().credential_changes == 1


async def test_a_client_certificate_is_followed(tmp_path: Path) -> None:
    """A renewed client certificate is used while the old one is still valid. A certificate that does not match its key
    is refused."""
    authority = Authority()
    names = Mounted(tmp_path / "server", **_files(authority, authority.issue("127.0.0.1", "etcd.test")))
    client = Mounted(tmp_path / "client", **_files(authority, authority.issue("client")))
    extra = [f"--cert-file={names.path}/tls.crt", f"--key-file={names.path}/tls.key", "--client-cert-auth"]
    files = EtcdFiles(
        ca=str(client.path / "ca.crt"),
        certificate=str(client.path / "tls.crt"),
        private_key=str(client.path / "tls.key"),
    )
    extra.append(f"--trusted-ca-file={names.path}/ca.crt")
    with ExitStack() as stack:
        server = stack.enter_context(EtcdServer(tmp_path / "etcd", scheme="https", extra=extra))
        settings = EtcdSettings(
            endpoints=(server.endpoint,),
            ca=(client.path / "ca.crt").read_bytes(),
            certificate=(client.path / "tls.crt").read_bytes(),
            private_key=(client.path / "tls.key").read_bytes(),
            files=files,
            server_name="etcd.test",
        )
        async with Etcd(settings, follow=True) as etcd, following(etcd, b"k") as follower:
            await etcd.put(b"k", b"1")
            one, other = authority.issue("client"), authority.issue("client")
            client.put(**_files(authority, (one[0], other[1])))
            await until(lambda: "does not work with its key" in etcd.statistics().refusal, why="a pair of two")
            client.put(**_files(authority, Authority().issue("client")))
            await until(
                lambda: "a test of the changed ones failed" in etcd.statistics().refusal,
                why="an authority unknown to etcd",
            )
            await etcd.put(b"k", b"2")
            client.put(**_files(authority, one))
            await until(lambda: etcd.settings.certificate == one[0], timeout=30, why="the renewed one is taken")
            await etcd.put(b"k", b"3")
            await follower.has(lambda f: f.content == {b"k": b"3"}, "the change has come")


def _files(authority: Authority, pair: tuple[bytes, bytes]) -> dict[str, bytes]:
    return {"ca_crt": authority.pem, "tls_crt": pair[0], "tls_key": pair[1]}


async def test_closing_while_one_is_proven(mount: Mount) -> None:
    """A client can be closed while it tries new credentials. Later requests fail."""
    etcd = mount.client()
    await etcd.put(b"mine/a", b"1")
    async with Proxy(1) as proxy:
        proxy.swallow()
        mount.put(endpoints=proxy.endpoint)
        await etcd.get(b"mine/a")  # with the former ones; this begins the trial of the new ones
        await until(lambda: proxy.accepted, why="the new ones are tried")
        await etcd.close()
    with pytest.raises(EtcdError):
        await etcd.get(b"mine/a")
