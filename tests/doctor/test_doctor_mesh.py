"""The doctor's checks of what a mesh's endpoint reports, with a fake mesh. tests/system/test_admin.py checks a real
one."""

import asyncio
import datetime
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from typer.testing import CliRunner

from mesh.cli.app import build
from mesh.cli.doctor import certificates, meshfacts
from mesh.cli.doctor.findings import Area, Level
from tests.cli.conftest import FakeMesh, failure, mesh
from tests.support.certificates import HOUR, certificate
from tests.support.etcd import EtcdServer

__all__ = ["mesh"]

POD = {
    "pod": "pod-1",
    "state": "ready",
    "labels": ["cpu"],
    "capacity": 100 * 2**20,
    "used": 50 * 2**20,
    "oldest_idle_ms": 60_000,
    "suspect": False,
}


@pytest.fixture
def fine(mesh: FakeMesh) -> FakeMesh:
    """A fake mesh without faults."""
    mesh.answer("/mesh/v1/stats", {"workers": 2})
    mesh.answer("/mesh/v1/pods", {"pods": [POD]})
    mesh.answer("/mesh/v1/settings", {"settings": {"type_constraints": "", "type_limits": ""}})
    register(mesh, "good")
    return mesh


def register(mesh: FakeMesh, name: str, **more: Any) -> None:
    mesh.models[name] = {"type": "onnx", "path": "/m.onnx", "key": "", **more}


def looked(doctor, mesh: FakeMesh, *arguments: str):
    return doctor("--only", "mesh", "--endpoint", mesh.endpoint, *arguments)


def test_a_healthy_mesh_has_nothing_but_ok(doctor, fine: FakeMesh) -> None:
    visit = looked(doctor, fine)
    assert (visit.code, visit.bad) == (0, [])
    for check in ("reach", "pods", "room", "models", "quarantine", "failing", "types"):
        assert visit.said("ok", "mesh", check)


def test_nothing_at_the_endpoint(doctor) -> None:
    visit = doctor("--only", "mesh", "--endpoint", "http://127.0.0.1:9")
    assert "kubectl port-forward" in visit.said("fail", "mesh", "reach")


def test_something_else_at_the_endpoint(doctor, mesh: FakeMesh) -> None:
    assert "not the REST interface of a mesh" in looked(doctor, mesh).said("fail", "mesh", "reach")


@pytest.mark.parametrize(
    ("status", "reason", "todo"),
    [(401, "UNAUTHENTICATED", "Secret mesh-admin-key"), (403, "FORBIDDEN", "the role `read` on all models")],
)
def test_a_mesh_that_asks_for_a_key(doctor, fine: FakeMesh, status: int, reason: str, todo: str) -> None:
    """If the mesh refuses the doctor, the finding says which key or role the doctor needs."""
    fine.answer("/mesh/v1/stats", make=lambda: failure(status, reason, "no credentials: send a key"))
    said = looked(doctor, fine).said("fail", "mesh", "key")
    assert "no credentials" in said
    assert todo in said


def test_no_runtime_pods(doctor, fine: FakeMesh) -> None:
    fine.answer("/mesh/v1/pods", {"pods": []})
    assert "component=runtime" in looked(doctor, fine).said("fail", "mesh", "pods")


def test_pods_that_disappeared(doctor, fine: FakeMesh) -> None:
    fine.answer("/mesh/v1/pods", {"pods": [POD, {**POD, "pod": "pod-2", "suspect": True}]})
    assert "pod-2 has disappeared" in looked(doctor, fine).said("warn", "mesh", "pods")


def test_a_quarantined_model_and_one_that_fails(doctor, fine: FakeMesh) -> None:
    """Quarantined and failing models are reported by name with the reason."""
    register(fine, "killer", errors=["quarantined, a server died of it: pod-1: out of memory"], quarantined=True)
    register(fine, "broken", errors=["no such file"], quarantined=False)
    visit = looked(doctor, fine)
    assert "killer: quarantined, a server died of it: pod-1: out of memory" in visit.said("warn", "mesh", "quarantine")
    assert "mesh release" in visit.said("warn", "mesh", "quarantine")
    assert "broken: no such file" in visit.said("warn", "mesh", "failing")


def test_many_models_in_trouble_are_counted(doctor, fine: FakeMesh) -> None:
    for number in range(400):
        register(fine, f"m{number}", errors=["no such file"], quarantined=False)
    text = looked(doctor, fine).said("warn", "mesh", "failing")
    assert "400 models are failing" in text
    assert "and 395 more" in text


def alias(name: str, **more: Any) -> dict[str, Any]:
    return {"id": name, "status": "DEFINED", "active": "good", "target": "good", **more}


def test_aliases_that_are_stuck_or_name_nothing(doctor, fine: FakeMesh) -> None:
    """A stuck move is reported with its reason. A model that an alias names but that is not registered is reported with
    its role."""
    fine.answer("/mesh/v1/aliases", {"aliases": [alias("fraud", versions={"1": "good"})], "next": None})
    visit = looked(doctor, fine)
    assert visit.bad == []
    assert "1 aliases, 0 moving" in visit.said("ok", "mesh", "moves")
    stuck = alias("fraud", target="gone", status="TRANSITION_FAILED", why="no such file")
    split = alias("other", weights={"good": 90, "away": 10})
    fine.answer("/mesh/v1/aliases", {"aliases": [stuck, split], "next": None})
    visit = looked(doctor, fine)
    assert "1 alias has not moved" in visit.said("warn", "mesh", "moves")
    assert "fraud to gone: no such file" in visit.said("warn", "mesh", "moves")
    assert "other (calls) names away; fraud (target) names gone" in visit.said("fail", "mesh", "aliases")


def test_a_type_without_pods(doctor, fine: FakeMesh) -> None:
    """A type without pods is a finding only if models of that type are registered."""
    register(fine, "large", type="big")
    asked = {"big": {"required": ["gpu", "cpu"]}, "unused": {"required": ["tpu"]}}
    fine.answer("/mesh/v1/settings", {"settings": {"type_constraints": json.dumps(asked)}})
    text = looked(doctor, fine).said("fail", "mesh", "types")
    assert "type big (1 registered)" in text
    assert "cpu, gpu" in text
    assert "unused" not in text


def test_a_type_that_no_server_takes(doctor, fine: FakeMesh) -> None:
    """If no pod's server takes models of a type, the finding names the types that exist."""
    fine.answer("/mesh/v1/pods", {"pods": [{**POD, "types": ["onnx"]}, {**POD, "pod": "pod-2", "types": ["sklearn"]}]})
    register(fine, "trees", type="xgboost")
    text = looked(doctor, fine).said("fail", "mesh", "types")
    assert "no pod accepts models of type xgboost: the pods of this mesh accept onnx, sklearn (1 registered)" in text
    assert "type onnx" not in text


def test_the_file_with_grants(doctor, fine: FakeMesh) -> None:
    """The doctor reports a file with grants. If the file's newer content is not in force, the doctor says why and since
    when."""
    filed = {"source": "/etc/mesh/grants", "grants": 3, "error": "", "age": 0.0}
    fine.answer("/mesh/v1/stats", {"workers": 2, "grants_file": filed})
    assert "/etc/mesh/grants has 3 grants" in looked(doctor, fine).said("ok", "mesh", "grants")
    fine.answer("/mesh/v1/stats", {"workers": 2, "grants_file": {**filed, "error": "it is not valid", "age": 90.0}})
    text = looked(doctor, fine).said("fail", "mesh", "grants")
    assert "cannot be used, so its content of 90 s ago is still in use: it is not valid" in text


def test_a_data_plane_configuration_that_cannot_be_used(doctor, fine: FakeMesh) -> None:
    config = {"source": "/etc/mesh/dataplane", "methods": ["a.B/c"], "others": False, "error": ""}
    fine.answer("/mesh/v1/stats", {"workers": 2, "dataplane": config})
    assert "/etc/mesh/dataplane has rules for 1 methods" in looked(doctor, fine).said("ok", "mesh", "dataplane")
    fine.answer("/mesh/v1/stats", {"workers": 2, "dataplane": {**config, "error": "it is not JSON"}})
    text = looked(doctor, fine).said("fail", "mesh", "dataplane")
    assert "/etc/mesh/dataplane cannot be used" in text
    assert "it is not JSON" in text


def test_a_setting_that_cannot_be_parsed_is_a_fault(doctor, fine: FakeMesh) -> None:
    fine.answer("/mesh/v1/settings", {"settings": {"type_constraints": "{", "type_limits": "["}})
    text = looked(doctor, fine).said("fail", "mesh", "settings")
    assert "type_constraints" in text
    assert "type_limits" in text


def test_a_missing_storage_key(doctor, fine: FakeMesh, tmp_path: Path) -> None:
    """If models name a storage key that the mounted Secret does not have, that is a finding."""
    for number in range(2):
        register(fine, f"m{number}", key='{"storage_key": "minio"}')
    register(fine, "other", key='{"storage_key": "there"}')
    (tmp_path / "there").write_text("{}")
    text = looked(doctor, fine, "--storage-config", str(tmp_path)).said("fail", "mesh", "storage")
    assert "has no key minio, which 2 models name (m0, ...)" in text
    assert "key there" not in text
    (tmp_path / "minio").write_text("{}")
    assert looked(doctor, fine, "--storage-config", str(tmp_path)).code == 0


def test_models_in_use_that_do_not_fit(doctor, fine: FakeMesh) -> None:
    """Too little memory for the models in use is a finding: a pod is full, and its next victim was used a minute
    ago."""
    full: Mapping[str, Any] = {**POD, "used": 95 * 2**20}
    fine.answer("/mesh/v1/pods", {"pods": [full]})
    assert "more pods" in looked(doctor, fine).said("warn", "mesh", "room")
    fine.answer("/mesh/v1/pods", {"pods": [{**full, "oldest_idle_ms": 3_600_000}]})
    assert looked(doctor, fine).said("ok", "mesh", "room")


def test_foreign_servers_that_are_not_observed_or_state_wrong_sizes(doctor, fine: FakeMesh) -> None:
    """Foreign servers whose memory is not observed are reported, and so are servers that take far more memory than they
    state."""
    seen = {**POD, "factor": 1.1, "unobserved": "", "observed": 2**20}
    fine.answer("/mesh/v1/pods", {"pods": [POD, seen]})
    assert looked(doctor, fine).said("ok", "mesh", "memory")
    wrong = {**seen, "pod": "pod-2", "factor": 3.9}
    unseen = {**seen, "pod": "pod-3", "unobserved": "it runs on another machine"}
    fine.answer("/mesh/v1/pods", {"pods": [POD, wrong, unseen]})
    visit = looked(doctor, fine)
    assert visit.said("warn", "mesh", "memory")
    assert visit.said("warn", "mesh", "sizes")


def test_a_registry_that_is_away(doctor, fine: FakeMesh) -> None:
    """If the registry is unavailable, the router still answers the other checks."""
    fine.answer("/mesh/v1/settings", make=lambda: failure(503, "REGISTRY_AWAY", "etcd does not answer"))
    visit = looked(doctor, fine)
    assert "etcd does not answer" in visit.said("fail", "mesh", "registry")
    assert visit.said("ok", "mesh", "pods")


def test_answers_of_another_version_end_nothing(doctor, fine: FakeMesh) -> None:
    """Answers of another version that the doctor cannot interpret are a finding, not a traceback."""
    fine.answer("/mesh/v1/pods", {"pods": ["what?"]})
    visit = looked(doctor, fine)
    assert visit.said("warn", "mesh", "doctor")


def test_a_router_that_hangs(doctor, fine: FakeMesh) -> None:
    """A router that hangs does not hang the doctor, because each request has a timeout."""

    ends: list[Callable[[], object]] = []

    async def late() -> web.Response:
        end = asyncio.Event()
        ends.append(partial(asyncio.get_running_loop().call_soon_threadsafe, end.set))
        await end.wait()
        return web.Response()

    fine.answer("/mesh/v1/stats", make=late)
    visit = looked(doctor, fine, "--timeout", "0.5")
    for end in ends:
        end()
    assert "did not answer within 0.5 s" in visit.said("fail", "mesh", "reach")


@pytest.mark.parametrize(
    ("name", "ends", "said"),
    [("127.0.0.1", -HOUR, "expired on 20"), ("mesh.example", HOUR, "it is for mesh.example")],
    ids=["expired", "another name"],
)
def test_certificates_of_the_endpoint(doctor, tmp_path: Path, name: str, ends: datetime.timedelta, said: str) -> None:
    """An expired certificate, or a certificate for another name, is reported with a remedy. In this test etcd presents
    it, as any TLS server could."""
    authority, server = certificate(name, ends=ends)
    (tmp_path / "ca").write_bytes(authority)
    (tmp_path / "server").write_bytes(server)
    extra = [f"--cert-file={tmp_path / 'server'}", f"--key-file={tmp_path / 'server'}"]
    with EtcdServer(tmp_path / "data", scheme="https", extra=extra) as listening:
        words = ["--ca", str(tmp_path / "ca"), "doctor", "--only", "mesh", "--endpoint", listening.endpoint, "--json"]
        result = CliRunner().invoke(build(), words)
    assert result.exit_code == 1
    (told,) = (one for one in json.loads(result.stdout)["findings"] if one["check"] == "certificate")
    assert said in told["what"]
    assert told["todo"]


def test_certificates_in_a_folder(doctor, fine: FakeMesh, tmp_path: Path) -> None:
    """With --certificates, the doctor checks the certificates in a folder, and reports files without a certificate."""
    (tmp_path / "tls.crt").write_bytes(certificate("mesh.internal", ends=48 * HOUR)[1])
    (tmp_path / "ca.crt").write_bytes(b"nonsense")
    visit = looked(doctor, fine, "--certificates", str(tmp_path))
    assert "tls.crt (server) expires in 1 day" in visit.said("warn", "certificates", "expiry")
    assert "ca.crt is not a certificate" in visit.said("fail", "certificates", "expiry")


NOW = datetime.datetime.now(datetime.UTC)


@pytest.mark.parametrize(
    ("ends", "level"),
    [(400 * 24 * HOUR, Level.OK), (13 * 24 * HOUR, Level.WARN), (-HOUR, Level.FAIL)],
    ids=["good", "soon", "expired"],
)
def test_how_long_a_certificate_is_good(ends: datetime.timedelta, level: Level) -> None:
    """A file of several certificates is valid until the first of them expires."""
    raw = certificate("a", ends=500 * 24 * HOUR)[1] + certificate("b", ends=ends)[1]
    assert certificates.pem(Area("x"), "expiry", "it", raw, NOW, "renew it").level is level


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("", ""),
        ('{"storage_key": "a"}', "a"),
        ('{"storage_key": 1}', ""),
        ('{"bucket": "b"}', ""),
        ("{", ""),
        ("x", ""),
    ],
)
def test_the_storage_key_of_a_registration(key: str, named: str) -> None:
    """A registration's `key` that is not JSON, or whose `storage_key` is not a text, names no storage key."""
    assert meshfacts.storage_key(key) == named
