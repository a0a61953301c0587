"""Changes of the Secret with the connection to etcd in a running mesh, none of whose processes may end."""

import json
import os
import signal

import grpc
import numpy as np
import pytest

from tests.support import models
from tests.support.authority import Mounted
from tests.support.localmesh import Client, LocalMesh, children, command
from tests.support.waiting import until

ONE = np.ones((1, 1), np.float32)


@pytest.mark.long
async def test_a_changed_password(tmp_path, own_etcd):
    """Loaded models are served while etcd has a new password and the Secret still has the old one. Once the Secret has
    the new password, models are registered and loaded, no pod has lost its lease, and a restarted worker uses the
    Secret's new content."""
    own_etcd.etcdctl("role", "add", "root")
    for user in ("root", "mesh"):
        own_etcd.etcdctl("user", "add", f"{user}:secret")
        own_etcd.etcdctl("user", "grant-role", user, "root")
    own_etcd.etcdctl("auth", "enable")
    known = {"endpoints": own_etcd.endpoint, "userid": "mesh", "password": "secret", "root_prefix": "ns"}
    mounted = Mounted(tmp_path / "secret", connection_json=json.dumps(known).encode())
    options = ["--etcd-config", str(mounted.path / "connection.json")]
    async with LocalMesh(tmp_path, own_etcd, pods=1, router_options=options, runtime_options=options) as mesh:
        client = Client(mesh.channel())
        await mesh.register("before", models.constant(1.0), load=True)
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
