"""A change of the password of etcd's user, and of the Secret with the connection to etcd, in a running mesh."""

import asyncio
import json
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import replace

import grpc
import numpy as np
import pytest

from mesh.etcd import Etcd, EtcdDenied
from tests.support import documented, models
from tests.support.authority import Mounted
from tests.support.etcd import EtcdServer
from tests.support.localmesh import Client, LocalMesh, children, command
from tests.support.waiting import until

ONE = np.ones((1, 1), np.float32)


async def works_within_its_prefix(mesh: LocalMesh, etcd: EtcdServer, options: list[str]) -> None:
    """Checks that commands with the mesh's user write only below the mesh's prefix, and that another mesh's user can
    neither read nor write there."""
    base = ["--base", mesh.base, *options]
    argv = [sys.executable, "-m", "mesh"]
    for words in (["keys", "create", "ci", "--direct"], ["backup", str(mesh.folder / "backup")], ["prefix", "show"]):
        done = await asyncio.to_thread(
            subprocess.run, [*argv, *words, *base], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
    as_root = ("--user=root:secret",)
    assert f"mesh/{mesh.base}/auth/keys/ci" in etcd.etcdctl(*as_root, "get", "--prefix", "--keys-only", "")
    outside = [line for line in etcd.etcdctl(*as_root, "get", "--prefix", "--keys-only", "").split() if line]
    assert [key for key in outside if not key.startswith("mesh/")] == []
    for words in ("role add other", "role grant-permission other --prefix=true readwrite other/", "user add other:x"):
        etcd.etcdctl(*as_root, *words.split())
    etcd.etcdctl(*as_root, "user", "grant-role", "other", "other")
    async with Etcd(replace(etcd.settings, user="other", password="x")) as client:
        for request in (
            client.get(f"mesh/{mesh.base}/registry/before".encode()),
            client.put(f"mesh/{mesh.base}/auth/grants/all".encode(), b"{}"),
        ):
            with pytest.raises(EtcdDenied):
                await request


@pytest.mark.long
async def test_a_changed_password(tmp_path, own_etcd):
    """Loaded models are served while etcd has a new password and the Secret still has the old one. Once the Secret has
    the new password, models are registered and loaded, no pod has lost its lease, and a restarted worker uses the
    Secret's new content.

    The mesh's user may read and write the mesh's prefix and nothing else, as the docs advise, and the user of another
    mesh can do neither there."""
    for words in documented.block("kubernetes.md", "A user of etcd for each mesh"):
        own_etcd.etcdctl(*shlex.split(words.put({"team-a": "mesh", "PASSWORD": "secret"}).removeprefix("etcdctl ")))
    known = {"endpoints": own_etcd.endpoint, "userid": "mesh", "password": "secret", "root_prefix": "mesh"}
    mounted = Mounted(tmp_path / "secret", connection_json=json.dumps(known).encode())
    options = ["--etcd-config", str(mounted.path / "connection.json")]
    async with LocalMesh(tmp_path, own_etcd, pods=1, router_options=options, runtime_options=options) as mesh:
        client = Client(mesh.channel())
        await mesh.register("before", models.constant(1.0), load=True)
        assert (await mesh.rest("PUT", "/mesh/v1/aliases/alias", {"target": "before"})).status == 201
        await works_within_its_prefix(mesh, own_etcd, options)
        own_etcd.etcdctl("--user=root:secret", "user", "passwd", "mesh", "--interactive=false", stdin="changed")
        assert (await client.infer("before", x=ONE))[0] == 1.0
        mounted.put(connection_json=json.dumps(known | {"password": "changed"}).encode())

        async def loaded(name: str, value: float) -> bool:
            try:
                await mesh.register(name, models.constant(value), load=True)
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.UNAVAILABLE, error.details()
                return False
            return True

        await until(lambda: loaded("after", 2.0), timeout=60, interval=0.2, why="a model is registered and loaded")
        assert (await client.infer("after", x=ONE))[0] == 2.0
        for pid in children(mesh.routers[0].pid):
            if "router.process.worker" in command(pid):
                os.kill(pid, signal.SIGKILL)
        await until(lambda: loaded("later", 3.0), timeout=60, interval=0.2, why="the new worker reaches etcd")
        assert (await client.infer("later", x=ONE))[0] == 3.0
        assert "lease lost" not in mesh.pods[0].log.read_text()
