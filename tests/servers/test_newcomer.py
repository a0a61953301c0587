"""The first steps of a new user of each model server: the commands of its page, as written."""

import asyncio
import contextlib
import json
import os
import re
import shlex
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest

from mesh.modelservers import environments, torchserve
from mesh.process import free_port
from tests.support.documented import DOCS, Command, Shell
from tests.support.etcd import EtcdServer
from tests.support.localmesh import LocalMesh
from tests.support.waiting import until

pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).resolve().parents[2]


def commands(page: str, heading: str) -> list[str]:
    """Returns the commands of one section of a page. Continued lines are joined."""
    section = (DOCS / page).read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = "\n".join(re.findall(r"^    (.*)$", section, re.MULTILINE)).replace("\\\n", " ")
    return [part.strip() for part in re.split(r"\n(?=mesh |curl |python |mkdir |ovms |~/)", lines)]


async def typed(shell: Shell, command: str, words: Mapping[str, str]) -> str:
    """Runs a command with replaced words, and returns what it printed. Fails if its status is not 0."""
    done = await asyncio.to_thread(shell.run, Command("", "", command).put(words))
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout + done.stderr


@contextlib.asynccontextmanager
async def up(shell: Shell, command: str) -> AsyncIterator[str]:
    """Runs the page's `mesh up` on other ports, and without its samples, until the block ends. Yields the URL of the
    mesh."""
    assert command.startswith("mesh up "), command
    port, probe = free_port(), free_port()
    more = f"--no-samples --listen 127.0.0.1:{port} --probe 127.0.0.1:{probe} --capacity 1GiB"
    url = f"http://127.0.0.1:{port}"
    shell.environment |= {"MESH_ENDPOINT": url, "MESH_SERVERS_DIR": str(environments.root())}
    with shell.running(f"{command} {more}") as said:
        await until(lambda: "The mesh is up" in said(), timeout=240, why="the mesh is up")
        yield url


def answer(said: str) -> list[float]:
    """Returns the numbers in the only output of an answer that curl has printed."""
    found = json.loads(said)
    assert "outputs" in found, found
    (output,) = found["outputs"]
    return output["data"]


async def test_a_new_user_serves_a_pipeline_in_three_commands(environment: Path, tmp_path: Path) -> None:
    """A model that scikit-learn has trained is registered without a type, and answers its first call."""
    first, *three = commands("mlserver.md", "Try it")
    assert len(three) == 3, three
    shell = Shell(tmp_path)
    async with up(shell, first) as url:
        _, registered, called = [await typed(shell, command, {"http://127.0.0.1:8033": url}) for command in three]
    assert "type sklearn: it is a pickle of a scikit-learn model" in registered
    assert json.loads(called)["outputs"][0]["name"] == "predict"
    assert answer(called) == [0]


async def test_a_new_user_serves_code_for_triton(tmp_path: Path) -> None:
    """The model of the page, written before the mesh starts, doubles its input."""
    if environments.installed("triton") is None:
        pytest.skip("SKIPPED, THE PAGE OF TRITON IS NOT TESTED: run `mesh servers install triton`")
    write, first, register, call = commands("triton.md", "Try it")
    shell = Shell(tmp_path)
    await typed(shell, write, {})
    async with up(shell, first) as url:
        await typed(shell, register, {})
        assert answer(await typed(shell, call, {"http://127.0.0.1:8033": url})) == [3.0, 4.0]


async def test_a_new_user_serves_torchscript(tmp_path: Path) -> None:
    """A traced model is registered without a type, and answers."""
    if lacks := torchserve.missing():
        pytest.skip(f"SKIPPED, THE PAGE OF TORCHSERVE IS NOT TESTED: {lacks}")
    first, *three = commands("torchserve.md", "Try it")
    shell = Shell(tmp_path)
    python = torchserve.find().python
    if named := os.environ.get(torchserve.VARIABLE):
        shell.environment[torchserve.VARIABLE] = named
    async with up(shell, first) as url:
        words = {"~/torchserve/bin/python": str(python), "http://127.0.0.1:8033": url}
        _, registered, called = [await typed(shell, command, words) for command in three]
    assert "type pytorch: it is a TorchScript model" in registered
    assert len(answer(called)) == 2


@pytest.mark.parametrize("started", ["beside the pod", "by the pod"])
async def test_a_new_user_serves_an_openvino_model(etcd_server: EtcdServer, tmp_path: Path, started: str) -> None:
    """A pod of the page joins a mesh, and the model of the page answers. Each of the two ways to start OVMS is one
    test. The program `ovms` is the stand-in for OVMS."""
    beside, ovms, child, register, call = commands("ovms.md", "Start a pod for OVMS")
    stand_in = tmp_path / "bin" / "ovms"
    stand_in.parent.mkdir()
    stand_in.write_text(
        f"#!/bin/sh\nexport PYTHONPATH={shlex.quote(str(ROOT))}\n"
        f'exec {shlex.quote(sys.executable)} -P -m tests.support.fakeovms "$@"\n'
    )
    stand_in.chmod(0o755)
    model = tmp_path / "data" / "iris"
    model.mkdir(parents=True)
    (model / "iris.xml").write_text("<?xml version='1.0'?><net name='m' version='11'><layers>")
    (model / "iris.bin").write_text("2")
    async with LocalMesh(tmp_path / "mesh", etcd_server, pods=0) as mesh:
        shell = Shell(tmp_path / "here", MESH_ENDPOINT=mesh.rest_url(), MESH_ETCD=etcd_server.endpoint)
        shell.environment |= dict.fromkeys(("MESH_DATA", "MESH_CONTROL", "MESH_PROBE"), "127.0.0.1:0")
        shell.environment |= {"MESH_BASE": mesh.base, "MESH_MODEL_DIR": str(tmp_path / "pulled")}
        shell.environment["PATH"] = f"{stand_in.parent}:{shell.environment['PATH']}"
        words = {"9000": str(free_port()), "9001": str(free_port()), "http://127.0.0.1:8033": mesh.rest_url()}
        words |= {path: f"{tmp_path}{path}" for path in ("/models/ovms", "/models/pulled", "/data")}
        with contextlib.ExitStack() as running:
            if started == "by the pod":
                running.enter_context(shell.running(Command("", "", child).put(words)))
            else:
                running.enter_context(shell.running(Command("", "", beside).put(words)))
                config = tmp_path / "models/ovms/models/model_config_list.json"
                await until(config.is_file, timeout=60, why="the pod has written the configuration file")
                running.enter_context(shell.running(Command("", "", ovms).put(words)))
            await mesh.ready(pods=1)
            await typed(shell, register, words)
            assert answer(await typed(shell, call, words)) == pytest.approx([10.2, 7.0, 2.8, 0.4])
