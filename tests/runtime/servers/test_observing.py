"""A foreign server's memory, observed from outside: found by its address, followed through restarts, or not visible."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from mesh.host import processes
from mesh.process import free_port
from mesh.runtime.servers import observing
from mesh.runtime.servers.observing import ServerMemory

LISTENS = """
import socket, sys, time
unix = socket.socket(socket.AF_UNIX)
unix.bind(sys.argv[1])
unix.listen()
held = bytearray(b"1") * (30 << 20)
print("ready", flush=True)
time.sleep(600)
"""


@asynccontextmanager
async def listening(path: Path) -> AsyncIterator[int]:
    """Runs a process that listens on a unix socket and holds 30 MiB."""
    path.unlink(missing_ok=True)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", LISTENS, str(path), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    await process.stdout.readline()
    try:
        yield process.pid
    finally:
        process.kill()
        await process.wait()


async def test_a_neighbour_is_found_by_its_socket(tmp_path: Path) -> None:
    """The server that listens on the socket is observed. After its end, the next server at the same address is
    observed."""
    path = tmp_path / "s"
    memory = ServerMemory(f"unix:{path}")
    assert memory.read() is None
    for life in (1, 2):
        async with listening(path) as pid:
            assert await memory.find()
            assert (memory.lives, memory.why) == (life, "")
            assert str(pid) in memory.what
            assert (memory.read() or 0) >= 30 << 20
            assert await memory.find(), "the same one"
            assert memory.lives == life
        assert memory.read() is None


async def test_what_is_not_visible_is_not_observed(tmp_path: Path) -> None:
    """A server is not observed if it runs on another machine or in another container, or if `--server-memory none`
    turns observation off. The reason is reported."""
    for address, words in (("10.1.2.3:80", "another machine"), (f"unix:{tmp_path}/none", "another container")):
        memory = ServerMemory(address)
        assert not await memory.find()
        assert words in memory.why
        assert memory.read() is None
    memory = ServerMemory(f"127.0.0.1:{free_port()}", watched=False)
    assert not await memory.find()
    assert memory.why == "--server-memory is none"


async def test_a_process_that_runs_the_pod_too_is_not_the_server(tmp_path: Path, monkeypatch) -> None:
    """A listener that is an ancestor of this pod, such as an init process with socket activation, is not observed."""
    monkeypatch.setattr(processes, "behind_socket", lambda path: os.getppid())
    memory = ServerMemory(f"unix:{tmp_path}/s")
    assert not await memory.find()
    assert "also runs this pod" in memory.why


async def test_a_child_counts_with_its_descendants_only_if_it_listens(tmp_path: Path, monkeypatch) -> None:
    """The pod's child is observed if the child, or a descendant, listens at the address. Otherwise the listening
    process is observed, because the child may be the client of a container engine."""
    async with listening(tmp_path / "s") as pid:
        memory = ServerMemory(f"unix:{tmp_path}/s", lambda: pid)
        assert await memory.find()
        assert str(pid) in memory.what
        async with listening(tmp_path / "other") as other:
            memory = ServerMemory(f"unix:{tmp_path}/s", lambda: other)
            assert await memory.find()
            assert str(pid) in memory.what
    monkeypatch.setattr(observing, "_AGAIN", 0.0)
    assert not await memory.find()


async def test_a_process_that_was_started_a_moment_ago_counts_when_it_is_looked_for(
    tmp_path: Path, monkeypatch
) -> None:
    """The list of the server's processes is cached for seconds, but a load's growth includes the new process of its
    model."""
    async with listening(tmp_path / "s") as pid, listening(tmp_path / "model") as model:
        tree = processes.tree
        memory = ServerMemory(f"unix:{tmp_path}/s")
        assert await memory.find()
        before = memory.read()
        assert before is not None
        monkeypatch.setattr(processes, "tree", lambda root: tree(root) | ({model} if root == pid else set()))
        assert (memory.read() or 0) < before + (20 << 20), "the list is kept"
        assert (memory.read(relook=True) or 0) >= before + (20 << 20)
