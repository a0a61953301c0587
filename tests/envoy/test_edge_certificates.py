"""The certificates that the edge shows: always valid ones, whatever an operator puts in place while it runs."""

import json
import os
import ssl
from dataclasses import replace
from pathlib import Path

import pytest

from mesh.envoy import config
from mesh.envoy.certificates import Certificates, read
from mesh.telemetry import metrics
from tests.support.certificates import HOUR, certificate

GOOD = certificate("127.0.0.1")
OTHER = certificate("127.0.0.1", ends=2 * HOUR)
EXPIRED = certificate("127.0.0.1", ends=-HOUR)
NOT_YET = certificate("127.0.0.1", begins=HOUR, ends=2 * HOUR)


def chain(made: tuple[bytes, bytes]) -> str:
    """Returns the certificate from the content of a file that also contains the key."""
    return made[1][: made[1].index(b"-----BEGIN PRIVATE")].decode()


@pytest.fixture
def tls(tmp_path: Path) -> config.Tls:
    put(tmp_path / "tls.pem", GOOD[1])
    return config.Tls(certificate=str(tmp_path / "tls.pem"), private_key=str(tmp_path / "tls.pem"))


@pytest.fixture
def edge(tls: config.Tls, tmp_path: Path) -> Certificates:
    (tmp_path / "run").mkdir(mode=0o700)
    edge = Certificates(tls, tmp_path / "run")
    edge.start()
    return edge


def put(path: Path, content: bytes) -> None:
    """Writes a file by renaming, as Kubernetes does."""
    fresh = path.with_suffix(".new")
    fresh.write_bytes(content)
    fresh.replace(path)


def shown(tmp_path: Path) -> str:
    """Returns the certificate that Envoy is given."""
    path = tmp_path / "run" / "edge-certificate.json"
    (secret,) = json.loads(path.read_text())["resources"]
    assert os.stat(path).st_mode & 0o077 == 0, "the file holds a key"
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"edge-certificate.json", "client-authority.json"}
    return secret["tls_certificate"]["certificate_chain"]["inline_string"]


def test_a_certificate_that_has_expired_is_refused_at_the_start(tls: config.Tls, tmp_path: Path) -> None:
    """An expired certificate is refused at the start. Envoy would use it, and each client would report a different
    error."""
    put(tmp_path / "tls.pem", EXPIRED[1])
    expected = r"tls\.pem has expired on 20.*replace the file with a valid one .*tls\.secretName"
    with pytest.raises(ValueError, match=expected):
        Certificates(tls, tmp_path).start()


def test_a_new_certificate_is_taken(edge: Certificates, tmp_path: Path) -> None:
    assert shown(tmp_path) == chain(GOOD)
    assert not edge.look()
    put(tmp_path / "tls.pem", OTHER[1])
    assert edge.look()
    assert shown(tmp_path) == chain(OTHER)
    assert 3600 < edge.expires_in <= 7200


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (EXPIRED[1], "has expired on"),
        (NOT_YET[1], "is not valid before"),
        (b"no certificate", "does not work with the key"),
        (chain(OTHER).encode(), "does not work with the key"),
        (None, "No such file"),
    ],
    ids=["expired", "not yet", "nonsense", "no key", "missing"],
)
def test_what_does_not_work_is_not_taken_and_said_once(
    content: bytes | None, why: str, edge: Certificates, tmp_path: Path
) -> None:
    """A certificate that does not work is not used: Envoy keeps the former one until a valid one comes. Metrics show
    that a certificate is refused, and when the one in use expires."""
    registry = metrics.Registry("test")
    edge.follow(registry)
    if content is None:
        (tmp_path / "tls.pem").unlink()
    else:
        put(tmp_path / "tls.pem", content)
    assert [edge.look() for _ in range(3)] == [False] * 3
    assert shown(tmp_path) == chain(GOOD)
    assert why in edge.refusal
    found = {metric["name"]: metric["series"][0][1] for metric in registry.snapshot()["metrics"]}
    assert found["mesh_edge_certificate_refused"] == 1
    assert 0 < found["mesh_edge_certificate_expires_seconds"] <= 3600
    put(tmp_path / "tls.pem", OTHER[1])
    assert edge.look()
    assert (shown(tmp_path), edge.refusal) == (chain(OTHER), "")


def test_a_pair_that_comes_in_two_steps_is_taken_when_it_is_whole(tls: config.Tls, tmp_path: Path) -> None:
    """If a certificate arrives a moment before its key, the old pair is used until both have arrived."""
    key = tmp_path / "key.pem"
    key.write_bytes(GOOD[1])
    tls = replace(tls, private_key=str(key))
    (tmp_path / "run").mkdir()
    edge = Certificates(tls, tmp_path / "run")
    edge.start()
    put(tmp_path / "tls.pem", OTHER[1])
    assert not edge.look()
    assert "does not work with the key" in edge.refusal
    assert shown(tmp_path) == chain(GOOD)
    put(key, OTHER[1])
    assert edge.look()
    assert shown(tmp_path) == chain(OTHER)


def test_authorities_for_clients_follow_the_same_rule(tls: config.Tls, tmp_path: Path) -> None:
    """An expired or invalid authority for clients is not used, just like a certificate."""
    ca = tmp_path / "ca.crt"
    put(ca, GOOD[0])
    (tmp_path / "run").mkdir()
    edge = Certificates(
        config.Tls(certificate=tls.certificate, private_key=tls.private_key, client_ca=str(ca)), tmp_path / "run"
    )
    edge.start()
    for content, why in (
        (b"nothing", "cannot be used as the certificate authority"),
        (chain(EXPIRED).encode(), "has expired"),
    ):
        put(ca, content)
        assert not edge.look()
        assert why in edge.refusal
    given = json.loads((tmp_path / "run" / "client-authority.json").read_text())["resources"][0]
    assert given["validation_context"]["trusted_ca"]["inline_string"] == GOOD[0].decode()
    put(ca, OTHER[0])
    assert edge.look()


def test_what_is_read_is_what_openssl_would_load(tls: config.Tls) -> None:
    """The expiry that is read is that of the certificate which openssl would load from the file."""
    ends = ssl._ssl._test_decode_cert(tls.certificate)["notAfter"]  # type: ignore[attr-defined]
    assert read(tls).expires == ssl.cert_time_to_seconds(ends)
