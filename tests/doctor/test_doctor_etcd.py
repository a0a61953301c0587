"""Faults planted in a real etcd or its connection: the doctor finds and names each one, and says what to do."""

import asyncio
import datetime
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mesh.cli.doctor import etcdchecks
from mesh.cli.doctor.etcdfacts import EtcdFacts, MemberFacts
from mesh.cli.doctor.findings import Level
from mesh.cli.doctor.handshake import Handshake, Trouble
from mesh.etcd import Etcd, EtcdError, EtcdMember, Status
from mesh.options.etcdsettings import EtcdSettings
from mesh.schema.keys import Keys
from tests.support.certificates import HOUR, certificate
from tests.support.etcd import EtcdServer

NOW = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


def put(server: EtcdServer, key: bytes, value: bytes = b"{}") -> None:
    async def work() -> None:
        async with Etcd(server.settings) as etcd:
            await etcd.put(key, value)

    asyncio.run(work())


def looked(doctor, server: EtcdServer, *arguments: str):
    return doctor("--only", "etcd", "--etcd", server.endpoint, *arguments)


def test_a_healthy_etcd_has_nothing_but_ok(doctor, etcd_server: EtcdServer, keys: Keys) -> None:
    """Only the version may cause a warning, because the etcd that tests use is old."""
    put(etcd_server, keys.pod("pod-1"))
    put(etcd_server, keys.owner, b'{"install":"a/mesh","schema":1}')
    visit = looked(doctor, etcd_server, "--base", keys.base, "--install-id", "a/mesh")
    assert set(visit.bad) <= {("etcd", "version")}
    assert visit.code == 0
    for check in ("reach", "leader", "members", "alarm", "quota", "latency", "owner", "prefix"):
        assert visit.said("ok", "etcd", check)


def test_etcd_away(doctor, own_etcd: EtcdServer) -> None:
    own_etcd.kill9()
    visit = looked(doctor, own_etcd)
    assert "nothing listens there" in visit.said("fail", "etcd", "reach")


def test_etcd_hanging(doctor, own_etcd: EtcdServer) -> None:
    """The process of etcd is stopped, so it accepts connections but sends nothing."""
    own_etcd.freeze()
    visit = looked(doctor, own_etcd, "--timeout", "1")
    assert "it does not answer" in visit.said("fail", "etcd", "reach")


def test_a_name_that_dns_does_not_know(doctor) -> None:
    visit = doctor("--only", "etcd", "--etcd", "http://etcd.invalid:2379", "--timeout", "2")
    assert "its name cannot be resolved" in visit.said("fail", "etcd", "reach")


@pytest.fixture(scope="module")
def auth_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """An etcd with a user alice, who may use only keys that begin with `mine/`."""
    with EtcdServer(tmp_path_factory.mktemp("auth") / "data", extra=["--bcrypt-cost=4"]) as server:
        server.etcdctl("user", "add", "root:secret")
        server.etcdctl("role", "add", "root")
        server.etcdctl("user", "grant-role", "root", "root")
        server.etcdctl("role", "add", "owner")
        server.etcdctl("role", "grant-permission", "owner", "--prefix=true", "readwrite", "mine/")
        server.etcdctl("user", "add", "alice:wonder")
        server.etcdctl("user", "grant-role", "alice", "owner")
        server.etcdctl("auth", "enable")
        yield server


@pytest.mark.parametrize("how", ["options", "secret"])
def test_a_wrong_password(doctor, auth_etcd: EtcdServer, tmp_path: Path, how: str) -> None:
    """A wrong password is detected, whether it comes from options or from the connection's Secret."""
    if how == "options":
        (tmp_path / "password").write_text("wrong")
        given = ["--etcd-user", "alice", "--etcd-password-file", str(tmp_path / "password")]
        visit = looked(doctor, auth_etcd, *given)
    else:
        secret = {"endpoints": auth_etcd.endpoint, "userid": "alice", "password": "wrong"}
        (tmp_path / "etcd_connection").write_text(json.dumps(secret))
        visit = doctor("--only", "etcd", "--etcd-config", str(tmp_path / "etcd_connection"))
    text = visit.said("fail", "etcd", "password")
    assert "invalid user ID or password" in text
    assert "check user and password" in text
    assert ("etcd", "reach") not in visit.bad, "etcd is reachable: only the password is wrong"


def test_a_user_that_may_not_use_the_prefix(doctor, auth_etcd: EtcdServer, tmp_path: Path) -> None:
    (tmp_path / "password").write_text("wonder")
    given = ["--etcd-user", "alice", "--etcd-password-file", str(tmp_path / "password")]
    text = looked(doctor, auth_etcd, *given, "--base", "theirs").said("fail", "etcd", "password")
    assert "grant the user read and write below theirs/" in text
    assert looked(doctor, auth_etcd, *given, "--base", "mine/mesh").code == 0


def test_a_full_etcd(doctor, tmp_path: Path) -> None:
    """An etcd that has really reached its quota is reported with its alarm and the exhausted quota."""
    quota = 4 * 2**20
    with EtcdServer(tmp_path / "data", extra=[f"--quota-backend-bytes={quota}"]) as server:

        async def fill() -> None:
            async with Etcd(server.settings) as etcd:
                for number in range(1024):  # small values: etcd refuses the first that would exceed the quota
                    await etcd.put(b"k%d" % number, b"x" * 2**15)

        with pytest.raises(EtcdError, match="space exceeded"):
            asyncio.run(fill())
        visit = looked(doctor, server, "--quota", str(quota))
        assert "NOSPACE" in visit.said("fail", "etcd", "alarm")
        assert "etcdctl alarm disarm" in visit.said("fail", "etcd", "alarm")
        assert "raise it" in visit.said("fail", "etcd", "quota")


def test_a_nearly_full_quota(doctor, etcd_server: EtcdServer, keys: Keys) -> None:
    async def used() -> int:
        async with Etcd(etcd_server.settings) as etcd:
            return (await etcd.status()).db_bytes

    put(etcd_server, keys.pod("pod-1"))
    quota = int(asyncio.run(used()) / 0.85)
    assert "raise it" in looked(doctor, etcd_server, "--quota", str(quota)).said("warn", "etcd", "quota")


def tls_etcd(
    folder: Path, name: str = "127.0.0.1", *, ends: datetime.timedelta = HOUR, clients: bool = False
) -> tuple[EtcdServer, Path]:
    """Returns an etcd with a certificate for this name, and the file with its authority. With `clients`, clients need
    a certificate too."""
    authority, server = certificate(name, ends=ends)
    (folder / "ca").write_bytes(authority)
    (folder / "server").write_bytes(server)
    extra = [f"--cert-file={folder / 'server'}", f"--key-file={folder / 'server'}"]
    extra += [f"--trusted-ca-file={folder / 'ca'}", "--client-cert-auth"] if clients else []
    return EtcdServer(folder / "data", scheme="https", extra=extra), folder / "ca"


def test_an_expired_certificate(doctor, tmp_path: Path) -> None:
    server, ca = tls_etcd(tmp_path, ends=-HOUR)
    with server:
        text = looked(doctor, server, "--etcd-ca", str(ca), "--timeout", "2").said("fail", "etcd", "certificate")
    assert "expired on 20" in text
    assert "renew" in text


def test_a_certificate_for_another_name(doctor, tmp_path: Path) -> None:
    """If etcd's certificate is for another name, the finding lists the certificate's names and says how to use one of
    them."""
    server, ca = tls_etcd(tmp_path, "mesh-etcd-0.mesh-etcd")
    with server:
        text = looked(doctor, server, "--etcd-ca", str(ca), "--timeout", "2").said("fail", "etcd", "certificate")
        assert "it is for mesh-etcd-0.mesh-etcd" in text
        assert "override_authority" in text
        secret = {
            "endpoints": server.endpoint,
            "certificate_file": "ca",
            "override_authority": "mesh-etcd-0.mesh-etcd",
        }
        (tmp_path / "etcd_connection").write_text(json.dumps(secret))
        again = doctor("--only", "etcd", "--etcd-config", str(tmp_path / "etcd_connection"))
        assert "answers" in again.said("ok", "etcd", "reach")


def test_another_authority(doctor, tmp_path: Path) -> None:
    server, _ = tls_etcd(tmp_path)
    (tmp_path / "other").write_bytes(certificate("127.0.0.1")[0])
    with server:
        given = ["--etcd-ca", str(tmp_path / "other"), "--timeout", "2"]
        text = looked(doctor, server, *given).said("fail", "etcd", "certificate")
    assert "authority that is not trusted" in text
    assert "--etcd-ca" in text


def test_a_certificate_that_ends_soon(doctor, tmp_path: Path) -> None:
    server, ca = tls_etcd(tmp_path, ends=72 * HOUR)
    with server:
        visit = looked(doctor, server, "--etcd-ca", str(ca))
    assert "expires in 2 days" in visit.said("warn", "etcd", "expiry")
    assert visit.code == 0 or ("etcd", "expiry") in visit.bad


def test_http_where_it_speaks_tls_and_the_other_way_round(doctor, tmp_path: Path, etcd_server: EtcdServer) -> None:
    server, _ = tls_etcd(tmp_path)
    with server:
        plain = doctor("--only", "etcd", "--etcd", server.endpoint.replace("https", "http"), "--timeout", "2")
    assert "use https://" in plain.said("fail", "etcd", "reach")
    secure = doctor("--only", "etcd", "--etcd", etcd_server.endpoint.replace("http", "https"), "--timeout", "2")
    assert "use http://" in secure.said("fail", "etcd", "reach")


def test_a_client_without_the_certificate_that_it_wants(doctor, tmp_path: Path) -> None:
    server, ca = tls_etcd(tmp_path, clients=True)
    with server:
        text = looked(doctor, server, "--etcd-ca", str(ca), "--timeout", "2").said("fail", "etcd", "certificate")
    assert "--etcd-cert" in text


def test_a_prefix_of_another_mesh(doctor, etcd_server: EtcdServer, keys: Keys) -> None:
    put(etcd_server, keys.owner, b'{"install":"b/mesh","schema":1}')
    visit = looked(doctor, etcd_server, "--base", keys.base, "--install-id", "a/mesh")
    assert "belongs to the mesh 'b/mesh', but this is 'a/mesh'" in visit.said("fail", "etcd", "owner")


def test_no_pod_has_published_itself(doctor, etcd_server: EtcdServer, keys: Keys) -> None:
    put(etcd_server, keys.model("m"))
    visit = looked(doctor, etcd_server, "--base", keys.base)
    assert "kubectl get pods" in visit.said("fail", "etcd", "pods")


def test_a_prefix_with_nothing_below(doctor, etcd_server: EtcdServer, keys: Keys) -> None:
    assert "check --base" in looked(doctor, etcd_server, "--base", keys.base).said("warn", "etcd", "prefix")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not a JSON object"),
        ('{"endpoints": ""}', "`endpoints` is missing"),
        ('{"enpoints": "x"}', "not a known field"),
    ],
)
def test_a_secret_that_cannot_be_used(doctor, tmp_path: Path, content: str, said: str) -> None:
    """An unusable connection Secret is a finding like others, and the other checks still run."""
    (tmp_path / "etcd_connection").write_text(content)
    visit = doctor("--etcd-config", str(tmp_path / "etcd_connection"), "--endpoint", "http://127.0.0.1:9")
    assert said in visit.said("fail", "etcd", "settings")
    assert ("mesh", "reach") in visit.bad


def test_an_etcd_without_an_address_is_skipped_unless_asked_for(doctor) -> None:
    """If no address of etcd is given, the area is skipped. If the area was requested by name, that is a fault."""
    assert "--etcd" in {one["area"]: one["why"] for one in doctor("--endpoint", "http://127.0.0.1:9").skipped}["etcd"]
    assert doctor("--only", "etcd").said("fail", "etcd", "settings")


# --- judged without an etcd ---

STATUS = Status("http://a:2379", "3.6.1", 9, 1, 1, True, (), cluster=1, member=1)
FINE = EtcdFacts(
    EtcdSettings(endpoints=("http://a:2379",)),
    "mm/mesh",
    (MemberFacts("http://a:2379", Handshake(Trouble.NONE), STATUS),),
    listed=(EtcdMember(1, "a", ("http://a:2379",), False),),
    alarms=(),
    reads_ms=(1.0, 2.0, 3.0),
    owner=b"",
    models=1,
    pods=1,
)


def levels(facts: EtcdFacts, check: str) -> set[Level]:
    return {finding.level for finding in etcdchecks.check(facts, NOW) if finding.check == check}


def test_the_facts_below_are_fine() -> None:
    assert all(finding.level is Level.OK for finding in etcdchecks.check(FINE, NOW))


@pytest.mark.parametrize(
    ("times", "level"), [((99.0,), Level.OK), ((1.0, 150.0, 200.0), Level.WARN), ((1500.0,), Level.FAIL)]
)
def test_slow_reads(times: tuple[float, ...], level: Level) -> None:
    """Reads from etcd are judged by the median of their times."""
    assert levels(replace(FINE, reads_ms=times), "latency") == {level}


def test_a_member_that_does_not_answer() -> None:
    """If one of three members does not answer, a warning names it."""
    endpoints = tuple(f"http://{name}:2379" for name in "abc")
    members = (
        *(MemberFacts(e, Handshake(Trouble.NONE), replace(STATUS, member=n)) for n, e in enumerate(endpoints[:2], 1)),
        MemberFacts(endpoints[2], Handshake(Trouble.REFUSED), error="failed to connect"),
    )
    listed = tuple(EtcdMember(number, f"etcd-{number}", (), False) for number in (1, 2, 3))
    facts = replace(FINE, settings=EtcdSettings(endpoints=endpoints), members=members, listed=listed)
    assert levels(facts, "reach") == {Level.OK, Level.WARN}
    (told,) = (finding for finding in etcdchecks.check(facts, NOW) if finding.check == "members")
    assert told.level is Level.WARN
    assert "etcd-3 of 3 members" in told.what
    assert "no quorum" in told.what


def test_no_leader() -> None:
    lost = MemberFacts("http://a:2379", Handshake(Trouble.NONE), replace(STATUS, has_leader=False))
    assert levels(replace(FINE, members=(lost,), reads_ms=(), read_error="no leader"), "leader") == {Level.FAIL}


def test_endpoints_of_two_clusters() -> None:
    other = MemberFacts("http://b:2379", Handshake(Trouble.NONE), replace(STATUS, cluster=2, member=2))
    assert Level.FAIL in levels(replace(FINE, members=(*FINE.members, other)), "members")


def test_alarms_that_only_a_member_tells() -> None:
    """If the user may not list alarms, the alarms in the members' own status count."""
    told = replace(STATUS, errors=("memberID:1 alarm:NOSPACE",))
    facts = replace(FINE, alarms=None, members=(MemberFacts("http://a:2379", Handshake(Trouble.NONE), told),))
    assert levels(facts, "alarm") == {Level.FAIL}


def test_defragmenting_is_advised_where_it_helps() -> None:
    large = replace(STATUS, db_bytes=95 * 2**20, db_used_bytes=2**20, quota_bytes=100 * 2**20)
    facts = replace(FINE, members=(MemberFacts("http://a:2379", Handshake(Trouble.NONE), large),))
    (told,) = (finding for finding in etcdchecks.check(facts, NOW) if finding.check == "quota")
    assert told.level is Level.FAIL
    assert "etcdctl defrag" in told.todo
