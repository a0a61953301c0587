"""Memory and listeners of other processes, from real processes and from made-up ones."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from mesh.host import groups, processes
from tests.support.waiting import until

HOLDS = """
import subprocess, sys, time
held = bytearray(b"1") * (40 << 20)
if len(sys.argv) > 1:
    subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print("ready", flush=True)
time.sleep(600)
"""


async def test_a_tree_counts_with_all_its_processes():
    """The private memory of a process tree includes that of its children, and a process that has ended has none."""
    with subprocess.Popen([sys.executable, "-c", HOLDS, HOLDS], stdout=subprocess.PIPE) as parent:
        family: frozenset[int] = frozenset()

        def held() -> bool:
            nonlocal family
            family = processes.tree(parent.pid)
            return len(family) == 2 and sum(processes.private_bytes(pid) for pid in family) >= 80 << 20

        try:
            await until(held, timeout=30, why="parent and child hold 40 MiB each")
            assert parent.pid in family
            assert processes.begun(parent.pid) > 0
        finally:
            for pid in family | {parent.pid}:
                os.kill(pid, 9)
    assert processes.tree(parent.pid) == frozenset()
    assert (processes.private_bytes(parent.pid), processes.begun(parent.pid)) == (0, 0)


def test_the_process_behind_an_address_is_found(tmp_path):
    """A listening process is found by its unix socket and by its port. If no process listens, none is found."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as unix, socket.socket() as tcp, socket.socket() as closed:
        unix.bind(str(path))
        unix.listen()
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        closed.bind(("127.0.0.1", 0))
        assert processes.behind_socket(str(path)) == os.getpid()
        assert processes.behind_port(tcp.getsockname()[1]) == os.getpid()
        assert processes.behind_port(closed.getsockname()[1]) == 0
    assert processes.behind_socket(str(tmp_path / "other")) == 0


def test_a_listener_of_another_user_is_the_only_program_of_that_user(tmp_path):
    """The sockets of another user's processes cannot be read. The listener is found if this user runs one program,
    however many processes it has, and not found if the user runs two programs."""
    user = os.geteuid() + 7

    def running(pid: int, parent: int, uid: int) -> None:
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "stat").write_text(f"{pid} (a) b) S {parent} 0 0")
        (tmp_path / str(pid) / "status").write_text(f"Name:\tx\nUid:\t0\t{uid}\t0\t0\nGid:\t0\n")

    (tmp_path / "net").mkdir()
    line = f"0: 0100007F:1F41 00000000:0000 0A 00000000:00000000 00:00000000 00000000 {user} 0 4711 1"
    (tmp_path / "net" / "tcp").write_text(f"  sl  local_address ...\n{line}\n")
    running(1, 0, 65535)
    running(30, 1, os.geteuid())
    assert processes.behind_port(0x1F41, proc=tmp_path) == 0, "none of its processes is visible"
    for pid, parent in ((40, 1), (41, 40), (42, 41)):
        running(pid, parent, user)
    assert processes.behind_port(0x1F41, proc=tmp_path) == 40
    running(50, 0, user)
    assert processes.behind_port(0x1F41, proc=tmp_path) == 0, "either of two may listen"


def made(folder: Path, *, inside: str, stat: str, path: str = "/system.slice/server.service") -> tuple[Path, Path]:
    """Makes a /proc with the process 70, and its cgroup with the given contents. Returns both folders."""
    proc, root = folder / "proc", folder / "cgroup"
    group = root / path.strip("/")
    (proc / "70").mkdir(parents=True)
    (proc / "70" / "cgroup").write_text(f"0::{path}\n")
    group.mkdir(parents=True, exist_ok=True)
    (group / "cgroup.procs").write_text(inside)
    (group / "memory.stat").write_text(stat)
    return proc, root


def test_a_cgroup_of_one_program_is_used(tmp_path):
    """If a cgroup contains only the server's processes, its anonymous and shared memory counts, without the page
    cache."""
    proc, root = made(tmp_path, inside="70\n71\n", stat="anon 500\nfile 9000\nshmem 20\n")
    folder = groups.of_program(70, {70, 71}, root=root, proc=proc)
    assert folder is not None
    assert groups.used_bytes(folder) == 520
    assert groups.limit_bytes(folder) is None
    (folder / "memory.max").write_text("max\n")
    assert groups.limit_bytes(folder) is None
    (folder / "memory.max").write_text("4096\n")
    assert groups.limit_bytes(folder) == 4096


def test_a_cgroup_of_version_1_is_used(tmp_path):
    """In a cgroup of version 1, resident and shared memory counts."""
    proc, root = made(tmp_path, inside="70\n", stat="total_rss 500\ntotal_cache 70\ntotal_shmem 7\n")
    folder = groups.of_program(70, {70}, root=root, proc=proc)
    assert folder is not None
    assert groups.used_bytes(folder) == 507


def test_a_cgroup_with_other_programs_is_not_used(tmp_path):
    """A cgroup is not used if it also contains another program, if it is the whole machine's, or if its `memory.stat`
    has no known figures."""
    proc, root = made(tmp_path / "a", inside="70\n99\n", stat="anon 500\n")
    assert groups.of_program(70, {70}, root=root, proc=proc) is None
    proc, root = made(tmp_path / "b", inside="70\n", stat="anon 500\n", path="/")
    assert groups.of_program(70, {70}, root=root, proc=proc) is None
    proc, root = made(tmp_path / "c", inside="70\n", stat="nothing known\n")
    assert groups.of_program(70, {70}, root=root, proc=proc) is None
