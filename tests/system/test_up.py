"""`mesh up` as a user runs it: it serves, shows commands to try, keeps its state, and leaves nothing behind."""

import asyncio
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import grpc
import pytest

from mesh.process import free_port, tethered
from tests.support import exampleruntime
from tests.support.exampleproto import PREDICT, PredictRequest, PredictResponse
from tests.support.localmesh import children, command
from tests.support.waiting import until


class Up:
    def __init__(self, folder: Path, *options: str) -> None:
        self.port, self.probe = free_port(), free_port()
        self.log = folder / "up.log"
        argv = [sys.executable, "-P", "-m", "mesh", "up", "--listen", f"127.0.0.1:{self.port}", "--pods", "2"]
        argv += ["--probe", f"127.0.0.1:{self.probe}", "--data-dir", str(folder / "data"), *options]
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                tethered(argv),
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=folder,
                start_new_session=True,
            )

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    async def ready(self) -> "Up":
        """Waits until the commands to try are printed."""

        def shown() -> bool:
            assert self.process.poll() is None, f"mesh up ended:\n{self.text()}"
            return "curl" in self.text()

        await until(shown, timeout=90, interval=0.1, why=f"mesh up is ready:\n{self.text()}")
        return self

    def descendants(self) -> list[int]:
        found, todo = [], [self.process.pid]
        while todo:
            below = children(todo.pop())
            found += below
            todo += below
        return found

    async def end(self, number: int) -> int:
        """Sends a signal, and waits until `mesh up` and every process below it have ended."""
        below = self.descendants()
        assert len(below) >= 7, [command(pid) for pid in below]  # etcd, 2 x (agent, server), router, worker(s), Envoy
        self.process.send_signal(number)
        code = await asyncio.to_thread(self.process.wait, 60)
        await until(
            lambda: not [pid for pid in below if command(pid)],
            timeout=20,
            why=f"nothing is left behind: {[command(pid) for pid in below if command(pid)]}",
        )
        return code

    def rest(self, method: str, path: str, body: object = None) -> dict:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read())


@pytest.mark.timeout(240)
async def test_up_serves_keeps_its_state_and_leaves_nothing_behind(tmp_path):
    """`mesh up` survives a user's session: start, run the printed command, `kill -9`, start again on the same data with
    a pod for another model server, stop most processes, Ctrl-C. It runs in the folder of a project whose modules have
    the same names as Mesh's and exit when imported."""
    for name in ("router", "placement", "puller", "mesh", "proto"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('this is my own {name}.py')")
    up = await Up(tmp_path).ready()
    try:
        registered = [model["id"] for model in up.rest("GET", "/mesh/v1/models")["models"]]
        assert registered
        line = re.search(r"^.*curl.*$", up.text(), re.MULTILINE)
        assert line is not None
        tried = await asyncio.to_thread(
            subprocess.run, line[0][line[0].index("curl") :], shell=True, capture_output=True, text=True, timeout=30
        )
        assert '"outputs"' in tried.stdout, tried
    finally:
        await up.end(signal.SIGKILL)

    server = shlex.join([f"example={sys.executable}", "-P", "-m", exampleruntime.MODULE])
    up = await Up(tmp_path, "--no-samples", "--server-command", f"{server} --listen unix:{{socket}}").ready()
    try:
        assert [model["id"] for model in up.rest("GET", "/mesh/v1/models")["models"]] == registered
        cli = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "mesh", "infer", registered[0]],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "MESH_ENDPOINT": f"http://127.0.0.1:{up.port}"},
        )
        assert cli.returncode == 0, cli

        example = tmp_path / "data" / "samples" / "example"
        example.write_bytes(b"an example")
        body = {"type": "example", "path": example.as_uri()}
        await asyncio.to_thread(up.rest, "PUT", "/mesh/v1/models/example", body)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{up.port}") as channel:
            predict = channel.unary_unary(PREDICT, PredictRequest.SerializeToString, PredictResponse.FromString)
            answer = await predict(PredictRequest(text="hello"), metadata=(("mm-model-id", "example"),), timeout=30)
        assert dict(answer.results) == {"example": "hello"}

        # Whatever hangs is replaced: etcd, a pod's agent, the router.
        hung = [pid for pid in children(up.process.pid) if not re.search(" pod-[23] ", command(pid))]
        assert len(hung) == 3
        for pid in hung:
            os.kill(pid, signal.SIGSTOP)
        await until(
            lambda: not [pid for pid in hung if command(pid)], timeout=30, why="the stopped processes were killed"
        )

        def served() -> bool:
            try:
                return bool(up.rest("GET", f"/v2/models/{registered[0]}/ready")["ready"])
            except OSError:
                return False

        await until(lambda: asyncio.to_thread(served), timeout=60, interval=0.1, why="calls are answered again")
    finally:
        code = await up.end(signal.SIGINT)
    assert code == 0, up.text()
    assert "Traceback" not in up.text()


async def test_a_taken_port_is_said(tmp_path):
    """The error for a port in use names the port and the option to choose another one."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        argv = [sys.executable, "-m", "mesh", "up", "--listen", f"127.0.0.1:{port}", "--data-dir", str(tmp_path / "d")]
        done = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, timeout=60)
    assert done.returncode not in (0, None)
    assert str(port) in done.stdout + done.stderr
    assert "--listen" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
