"""An administrator's commands against a real mesh: `mesh doctor`, and a restore while the mesh serves."""

import asyncio
import json
import subprocess
import sys

import numpy as np
import pytest

from tests.support import models
from tests.support.localmesh import Client, LocalMesh
from tests.support.waiting import until

ONE = np.ones((1, 1), np.float32)


async def mesh_command(mesh: LocalMesh, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs `mesh` with these words, for at most a minute."""
    return await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "mesh", *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def etcd_options(mesh: LocalMesh) -> list[str]:
    return ["--etcd", mesh.etcd.endpoint, "--base", mesh.base]


async def doctor(mesh: LocalMesh) -> tuple[int, dict[tuple[str, str], str]]:
    """Returns the doctor's exit code and its findings other than `ok`, by area and check."""
    words = ["doctor", "--only", "mesh,etcd", "--endpoint", mesh.rest_url(), "--json", *etcd_options(mesh)]
    done = await mesh_command(mesh, *words)
    assert done.returncode in (0, 1), done.stderr
    answer = json.loads(done.stdout)
    bad = {(one["area"], one["check"]): one["what"] for one in answer["findings"] if one["level"] != "ok"}
    bad.pop(("etcd", "version"), None)  # the wheel's etcd is an old one
    return done.returncode, bad


@pytest.mark.long
async def test_the_doctor_finds_what_is_planted(a_mesh) -> None:
    """The doctor finds nothing in a healthy mesh of real processes, and then each fault that the test plants: a type
    without pods, a model that kills servers, a mesh without pods."""
    async with a_mesh(pods=2, fake=True) as mesh:
        await mesh.register_fake("good", now=True)
        assert await doctor(mesh) == (0, {})

        setting = '{"big": {"required": ["gpu"]}}'
        done = await mesh_command(mesh, "settings", "type_constraints", setting, "--endpoint", mesh.rest_url())
        assert done.returncode == 0, done.stderr
        await mesh.register_fake("large", type="big")
        await mesh.register_fake("killer", fail="crash", now=True)
        await until(lambda: quarantined(mesh, "killer"), timeout=60, interval=0.2)
        code, bad = await doctor(mesh)
        assert code == 1
        assert "type big (1 registered)" in bad.pop(("mesh", "types"))
        assert "killer: quarantined" in bad.pop(("mesh", "quarantine"))

        for pod in mesh.pods:
            await pod.stop()
        await until(lambda: no_pods(mesh), timeout=30, interval=0.1)
        code, bad = await doctor(mesh)
        assert code == 1
        assert "no runtime pods" in bad[("mesh", "pods")]
        assert "no runtime pod has registered itself" in bad[("etcd", "pods")]


async def quarantined(mesh: LocalMesh, model_id: str) -> bool:
    return (await mesh.status(model_id))["quarantined"]


async def no_pods(mesh: LocalMesh) -> bool:
    return not (await mesh.rest("GET", "/mesh/v1/pods")).json["pods"]


async def test_a_restore_under_a_mesh_that_serves(a_mesh, tmp_path) -> None:
    """Models that are as in the backup still answer after a restore. A changed model stays as it is without
    `--overwrite`; with it, the model answers with the backup's content as soon as the restore is done."""
    async with a_mesh(pods=2, runtime_options=["--check-interval", "1"]) as mesh:
        client = Client(mesh.channel())
        await mesh.register("kept", models.constant(1.0))
        await mesh.register("changed", models.constant(2.0))
        backup = str(tmp_path / "registry.backup")
        done = await mesh_command(mesh, "backup", backup, *etcd_options(mesh))
        assert done.returncode == 0, done.stderr

        await mesh.rest("DELETE", "/mesh/v1/models/changed")
        await mesh.register("changed", models.constant(3.0), load=True)
        assert (await client.infer("kept", x=ONE))[0].item() == 1
        assert (await client.infer("changed", x=ONE))[0].item() == 3

        done = await mesh_command(mesh, "restore", backup, *etcd_options(mesh))
        assert done.returncode == 1
        assert "model changed" in done.stderr
        assert (await client.infer("changed", x=ONE))[0].item() == 3, "the changed model was left as it is"

        done = await mesh_command(mesh, "restore", backup, "--overwrite", *etcd_options(mesh))
        assert done.returncode == 0, done.stderr
        assert "overwritten: 1 model" in done.stdout
        assert (await client.infer("changed", x=ONE))[0].item() == 2
        assert (await client.infer("kept", x=ONE))[0].item() == 1
