"""A member of etcd that lost its data, in real processes started like those of the chart."""

import os
import shutil
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesh.etcdserver import member as etcdmember
from mesh.etcdserver.member import ListedMember, joins
from mesh.process import find_binary, free_port, programs, tethered
from tests.support.authority import Authority
from tests.support.etcd import EtcdServer
from tests.support.waiting import until

URL = "http://m0:2380"


class Members:
    """Three members on loopback. `start` starts one of them with the data it has."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = ["m0", "m1", "m2"]
        self.peers = {name: f"http://127.0.0.1:{free_port()}" for name in self.names}
        self.clients = {name: f"http://127.0.0.1:{free_port()}" for name in self.names}
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        environment = {
            **os.environ,
            "ETCD_NAME": name,
            "ETCD_DATA_DIR": str(self.folder / name),
            "ETCD_LISTEN_CLIENT_URLS": self.clients[name],
            "ETCD_ADVERTISE_CLIENT_URLS": self.clients[name],
            "ETCD_LISTEN_PEER_URLS": self.peers[name],
            "ETCD_INITIAL_ADVERTISE_PEER_URLS": self.peers[name],
            "ETCD_INITIAL_CLUSTER": ",".join(f"{name}={url}" for name, url in self.peers.items()),
            "ETCD_UNSAFE_NO_FSYNC": "true",
            "ETCDCTL_ENDPOINTS": ",".join(self.clients.values()),
        }
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                tethered([sys.executable, "-m", "mesh.etcdserver.member"]), env=environment, stdout=log, stderr=log
            )

    def end(self, name: str) -> None:
        """Kills the member."""
        child = self.running.pop(name)
        child.kill()
        child.wait(10)

    def ctl(self, *argv: str, of: str) -> str:
        """Runs etcdctl on the given member alone, and returns its output, which is empty if the command fails."""
        command = [find_binary("etcdctl"), f"--endpoints={self.clients[of]}", "--command-timeout=2s", *argv]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout

    async def agree_to(self, key: str) -> None:
        """Waits until the members have a leader, and writes the key."""
        await until(lambda: self.ctl("put", key, "v", of="m0"), timeout=40, interval=0.2, why="there is a quorum")

    async def serves(self, name: str, key: str) -> None:
        """Waits until the member itself returns the key."""
        await until(
            lambda: self.ctl("get", key, of=name),
            timeout=40,
            interval=0.2,
            why=lambda: f"{name} has {key}:\n{(self.folder / f'{name}.log').read_text()[-3000:]}",
        )


@pytest.fixture
def members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Members]:
    members = Members(tmp_path)
    yield members
    for name in list(members.running):
        members.end(name)


@pytest.mark.long
async def test_a_member_that_lost_its_data_comes_back(members: Members) -> None:
    """A member without data is added again as a new member and gets everything from the others. A member with data just
    starts."""
    for name in members.names:
        members.start(name)
    await members.agree_to("k")
    for name in members.names:
        await members.serves(name, "k")
    first = members.ctl("member", "list", of="m0")

    members.end("m1")
    members.start("m1")
    await members.serves("m1", "k")
    assert members.ctl("member", "list", of="m0") == first

    members.end("m1")
    shutil.rmtree(members.folder / "m1")
    await members.agree_to("meanwhile")
    members.start("m1")
    await members.serves("m1", "meanwhile")
    now = members.ctl("member", "list", of="m1")
    assert now.count("started") == 3
    assert len(set(first.split("\n")) & set(now.split("\n")) - {""}) == 2
    assert "joins the others as a new member" in (members.folder / "m1.log").read_text()


@pytest.mark.long
async def test_it_waits_while_the_others_have_no_quorum(members: Members) -> None:
    """A member without data waits while the others have no quorum, and never starts a separate cluster. The result is
    the same if the member was replaced before, or if an earlier start left an empty folder."""
    for name in members.names:
        members.start(name)
    await members.agree_to("k")
    for name in members.names:
        await members.serves(name, "k")
    for turn in ("once", "again"):
        members.end("m1")
        shutil.rmtree(members.folder / "m1")
        (members.folder / "m1" / "member" / "snap").mkdir(parents=True)
        (members.folder / "m1").chmod(0o700)
        if turn == "again":
            members.end("m2")
        members.start("m1")
        if turn == "again":
            log = members.folder / "m1.log"
            await until(lambda log=log: "members have no quorum" in log.read_text(), timeout=40, why=log.read_text)
            assert not (members.folder / "m1" / "member" / "wal").exists()
            members.start("m2")
            await members.agree_to("late")
        await members.serves("m1", "k")
    assert members.ctl("member", "list", of="m1").count("started") == 3


def test_members_tell_by_tls_too(tmp_path: Path) -> None:
    """With TLS, members ask each other with their peer certificate, as in the chart. Without a certificate they get no
    answer."""
    certificate, key = (authority := Authority()).issue("localhost")
    files = {"ETCD_PEER_TRUSTED_CA_FILE": authority.pem, "ETCD_PEER_CERT_FILE": certificate, "ETCD_PEER_KEY_FILE": key}
    environment = {}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        environment[name] = str(tmp_path / name)
    peer = f"https://localhost:{free_port()}"
    listen = peer.replace("localhost", "127.0.0.1")
    extra = [f"--listen-peer-urls={listen}", f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=test={peer}"]
    extra += ["--peer-client-cert-auth", f"--peer-trusted-ca-file={environment['ETCD_PEER_TRUSTED_CA_FILE']}"]
    extra += [f"--peer-cert-file={environment['ETCD_PEER_CERT_FILE']}"]
    extra += [f"--peer-key-file={environment['ETCD_PEER_KEY_FILE']}"]
    with EtcdServer(tmp_path / "etcd", extra=extra):
        assert etcdmember.exists([peer], etcdmember._peer_tls(environment))
        assert not etcdmember.exists([peer], ssl.create_default_context(cadata=authority.pem.decode()))
    assert not etcdmember.exists([peer], etcdmember._peer_tls(environment)), "no member answers"


def entry(**fields: object) -> ListedMember:
    return ListedMember.of({"ID": 0xAB, "name": "m0", "peerURLs": [URL], **fields})


@pytest.mark.parametrize(
    ("listed", "joined", "asked"),
    [
        pytest.param([entry()], False, [], id="a-cluster-that-is-being-made"),
        pytest.param([entry(name="")], True, ["remove", "add"], id="added-and-started-or-not"),
        pytest.param([], True, ["add"], id="removed-and-not-added"),
        pytest.param([entry(clientURLs=["http://m0:2379"])], True, ["remove", "add"], id="its-data-are-gone"),
        pytest.param([entry(name="m1", peerURLs=["http://m1:2380"], clientURLs=["c"])], True, ["add"], id="others"),
        pytest.param([entry(peerURLs=["https://m0"], clientURLs=["c"])], True, ["remove", "add"], id="another-address"),
    ],
)
def test_what_the_others_are_asked_for(
    listed: list[ListedMember], joined: bool, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A member without data asks the others to remove and add it as needed, even if an earlier start was interrupted
    halfway."""
    said: list[tuple[str, ...]] = []
    monkeypatch.setattr(etcdmember, "_etcdctl", lambda *argv: said.append(argv) or "")
    assert joins("m0", URL, listed) is joined
    assert [argv[1] for argv in said] == asked
    assert all(argv[2] in ("ab", "m0") for argv in said)


def test_a_start_without_its_settings_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mesh.etcdserver.member"], capture_output=True, text=True, timeout=60, env={}
    )
    assert done.returncode == 1
    assert "ETCD_NAME is not set" in done.stderr


@pytest.mark.parametrize(
    ("program", "said"),
    [
        pytest.param(None, "the program etcd is missing: put it on PATH, or install", id="missing"),
        pytest.param(b"no program", "check that the program is made for this machine", id="unusable"),
    ],
)
def test_a_start_without_a_usable_etcd_says_so(
    program: bytes | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if program is not None:
        (tmp_path / "etcd").write_bytes(program)
        (tmp_path / "etcd").chmod(0o755)
    monkeypatch.setattr(programs, "_WHEELS", {"etcd": ("no_such_wheel", "etcd", "no-such-wheel")})
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the handler would stay after the test
    for name, value in {
        "PATH": str(tmp_path),
        "ETCD_NAME": "m0",
        "ETCD_DATA_DIR": str(tmp_path / "data"),
        "ETCD_INITIAL_CLUSTER": f"m0={URL}",
        "ETCD_INITIAL_ADVERTISE_PEER_URLS": URL,
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        etcdmember.main()
    assert ended.value.code == 1
    assert said in capfd.readouterr().err
