"""The first steps of a new user: the commands of docs/mlserver.md, as written."""

import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mesh.process import free_port
from tests.support.waiting import until

DOCS = Path(__file__).resolve().parents[2] / "docs" / "mlserver.md"
pytestmark = pytest.mark.timeout(600)


def commands() -> list[str]:
    """Returns the commands in the section "Try it"."""
    section = DOCS.read_text().partition("## Try it")[2].partition("\n## ")[0]
    lines = re.findall(r"^    (.*)$", section, re.MULTILINE)
    text = "\n".join(lines)
    return [part.strip() for part in re.split(r"\n(?=mesh |curl |python )", text)]


async def test_a_new_user_serves_a_pipeline_in_three_commands(environment: Path, tmp_path: Path) -> None:
    """A model that scikit-learn has trained is registered without a type, and answers its first call."""
    up, *three = commands()
    assert len(three) == 3, three
    port, probe = free_port(), free_port()
    here = f"http://127.0.0.1:{port}"
    bins = Path(sys.executable).parent
    env = os.environ | {"PATH": f"{bins}:{os.environ['PATH']}", "MESH_ENDPOINT": here}
    argv = f"{up} --no-samples --listen 127.0.0.1:{port} --probe 127.0.0.1:{probe} --capacity 1GiB".split()
    log = (tmp_path / "up.log").open("w+")
    mesh = subprocess.Popen(argv, cwd=tmp_path, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:

        async def ready() -> bool:
            assert mesh.poll() is None, (tmp_path / "up.log").read_text()
            return "The mesh is up" in (tmp_path / "up.log").read_text()

        await until(ready, timeout=240, why="the mesh is up")
        said = []
        for command in three:
            shell = ["bash", "-c", command.replace("http://127.0.0.1:8033", here)]
            done = await asyncio.to_thread(
                subprocess.run, shell, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False
            )
            assert done.returncode == 0, (command, done.stdout, done.stderr)
            said.append(done.stdout + done.stderr)
        assert "type sklearn: it is a pickle of a scikit-learn model" in said[1]
        (output,) = json.loads(said[2])["outputs"]
        assert (output["name"], output["data"]) == ("predict", [0])
    finally:
        mesh.terminate()
        await asyncio.to_thread(mesh.wait, 60)
        print((tmp_path / "up.log").read_text()[-4000:])
        log.close()
