"""The certificates of the chart's etcd: the steps of a change, and a real etcd that changes to another authority."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesh.etcd import Etcd, EtcdError
from mesh.etcdserver import certificates
from mesh.identity import handover
from mesh.options.etcdsettings import EtcdSettings
from mesh.process import free_port, tethered
from tests.support.authority import Authority, Mounted
from tests.support.waiting import until

NAMES = ("mesh.internal", "localhost")


def issued(by: Authority) -> dict[str, bytes]:
    """Returns certificate files that are valid for the mesh and for a member on loopback."""
    certificate, key = by.issue(*NAMES)
    return {"ca_crt": by.pem, "tls_crt": certificate, "tls_key": key}


def held(copies: certificates.Copies) -> list[bytes]:
    """Returns the files that etcd reads: authorities, certificate and key."""
    return [(copies.folder / name).read_bytes() for name in ("ca.crt", "tls.crt", "tls.key")]


def test_copies_take_the_steps_of_a_handover(tmp_path: Path) -> None:
    """When the mounted files change, etcd trusts both authorities and presents the former certificate until the new
    files have reached all clients. Then it presents the new certificate."""
    now = [0.0]
    old, new = issued(Authority()), issued(Authority("new"))
    mounted = Mounted(tmp_path / "mounted", **old)
    copies = certificates.Copies(mounted.path, tmp_path / "run", elapsed=lambda: now[0])
    assert held(copies) == list(old.values())
    before = copies.authorities

    mounted.put(**new)
    copies.look()
    assert held(copies)[1:] == list(old.values())[1:]
    assert copies.authorities == before | handover.authorities(new["ca_crt"])
    now[0] = handover.SETTLE
    copies.look()
    assert held(copies)[1:] == list(new.values())[1:]
    assert copies.authorities > before
    now[0] = handover.KEEP
    copies.look()
    assert held(copies) == list(new.values())
    assert len(list((tmp_path / "run").glob("version-*"))) == 1
    assert (copies.folder / "tls.key").stat().st_mode & 0o777 == 0o600


def test_files_that_do_not_work(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Unusable files are passed on only at the start. Later the former files are kept. Each case is logged once."""
    old, other = issued(Authority()), issued(Authority("other"))
    mounted = Mounted(tmp_path / "mounted", **{**old, "tls_key": other["tls_key"]})
    copies = certificates.Copies(mounted.path, tmp_path / "run")
    assert held(copies)[2] == other["tls_key"]
    copies.look()
    assert len(caplog.records) == 1
    mounted.put(**old)
    copies.look()
    assert held(copies) == list(old.values())
    mounted.put(**{**old, "ca_crt": other["ca_crt"]})
    copies.look()
    assert held(copies) == list(old.values())
    assert len(caplog.records) == 2
    with pytest.raises(OSError, match="nowhere"):
        certificates.Copies(tmp_path / "nowhere", tmp_path / "other")


_QUICKLY = """
from mesh.etcdserver import certificates, member
from mesh.identity import handover
handover.SETTLE, certificates.LOOK, certificates.TURN = 8.0, 0.1, 0.5
member.main()
"""


class Member:
    """The only member of an etcd with TLS, started like the chart's, with short delays."""

    def __init__(self, folder: Path, files: dict[str, bytes]) -> None:
        self.mounted = Mounted(folder / "mounted", **files)
        self.log = folder / "log"
        self.port, peer = free_port(), free_port()
        url = f"https://localhost:{peer}"
        current = folder / "run" / "current"
        environment = {
            **os.environ,
            "ETCD_NAME": "mesh-etcd-1",
            "ETCD_DATA_DIR": str(folder / "data"),
            "ETCD_LISTEN_CLIENT_URLS": f"https://127.0.0.1:{self.port}",
            "ETCD_ADVERTISE_CLIENT_URLS": f"https://localhost:{self.port}",
            "ETCD_LISTEN_PEER_URLS": f"https://127.0.0.1:{peer}",
            "ETCD_INITIAL_ADVERTISE_PEER_URLS": url,
            "ETCD_INITIAL_CLUSTER": f"mesh-etcd-1={url}",
            "ETCD_UNSAFE_NO_FSYNC": "true",
            "MESH_ETCD_CERTIFICATES": str(self.mounted.path),
        }
        for kind in ("", "PEER_"):
            environment |= {
                f"ETCD_{kind}TRUSTED_CA_FILE": str(current / "ca.crt"),
                f"ETCD_{kind}CERT_FILE": str(current / "tls.crt"),
                f"ETCD_{kind}KEY_FILE": str(current / "tls.key"),
                f"ETCD_{kind}CLIENT_CERT_AUTH": "true",
            }
        with self.log.open("ab") as log:
            argv = tethered([sys.executable, "-P", "-c", _QUICKLY])
            self.child = subprocess.Popen(argv, env=environment, stdout=log, stderr=log)

    async def answers(self, files: dict[str, bytes]) -> bool:
        """Returns whether a new connection with the given files succeeds, with etcd and the client accepting each
        other."""
        settings = EtcdSettings(
            endpoints=(f"https://localhost:{self.port}",),
            ca=files["ca_crt"],
            certificate=files["tls_crt"],
            private_key=files["tls_key"],
            timeout=3.0,
        )
        async with Etcd(settings) as etcd:
            try:
                await etcd.put(b"k", b"v")
            except EtcdError:
                return False
        return True


@pytest.fixture
def member(tmp_path: Path) -> Iterator[tuple[Member, dict[str, bytes]]]:
    files = issued(Authority())
    member = Member(tmp_path, files)
    yield member, files
    member.child.kill()
    member.child.wait(10)


@pytest.mark.long
@pytest.mark.timeout(120)
async def test_another_authority_is_followed(member: tuple[Member, dict[str, bytes]]) -> None:
    """When etcd changes to another authority, it is restarted. Clients with the former files are served until etcd
    shows the new certificate, and clients with the new files from then on. SIGTERM ends etcd and the process that
    started it."""
    running, old = member
    new = issued(Authority("new"))

    async def until_answered(files: dict[str, bytes]) -> None:
        async with asyncio.timeout(40.0):
            while not await running.answers(files):
                await asyncio.sleep(0.1)

    await until_answered(old)
    assert not await running.answers(new)
    running.mounted.put(**new)
    await until(lambda: "etcd was restarted" in running.log.read_text(), timeout=40, why=running.log.read_text)
    text = running.log.read_text()
    assert text.index("another authority") < text.index("only after a restart")
    await until_answered(old)
    await until_answered(new)
    assert not await running.answers(old), "their authority did not sign what etcd shows now"
    running.child.terminate()
    assert await asyncio.to_thread(running.child.wait, 40) == 128 + signal.SIGTERM, running.log.read_text()[-2000:]
    assert "received signal; shutting down" in running.log.read_text()
