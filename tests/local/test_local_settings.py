"""Settings of `mesh up`, its ports and its data directory."""

import socket
import subprocess
import sys

import pytest

from mesh.local import parts, supervisor
from mesh.local.folder import DataFolder
from mesh.local.settings import LocalServer, UpError, UpSettings, default_capacity, reachable


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"listen": "nonsense"}, "--listen"),
        ({"listen": "127.0.0.1:0"}, "--listen"),
        ({"probe": "127.0.0.1:99999"}, "--probe"),
        ({"pods": 0}, "--pods"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_name_their_option(changes, word):
    with pytest.raises(UpError, match=word):
        UpSettings(**changes).check()


def test_a_server_is_named_with_its_types_and_its_command():
    """In `--server-command` of `mesh up`, the types stand before the first equals sign. The command may contain further
    equals signs."""
    assert LocalServer.parse("a,b:1=run --x=1 {socket}") == LocalServer("a,b:1", "run --x=1 {socket}")
    settings = UpSettings(pods=2, servers=(LocalServer("a", "run {port}"),), capacity=5)
    assert settings.all_pods == 3
    argv = parts.LocalPod(settings, 3, etcd_url="u", session=None).argv()
    for option, value in (("--server-command", "run {port}"), ("--types", "a"), ("--capacity", "5")):
        assert argv[argv.index(option) + 1] == value
    assert "--server-command" not in parts.LocalPod(settings, 2, etcd_url="u", session=None).argv()
    by_server = parts.LocalPod(UpSettings(servers=settings.servers), 3, etcd_url="u", session=None).argv()
    assert "--capacity" not in by_server, "the server reports it"


@pytest.mark.parametrize("text", ["", "run {socket}", "=run", "a=", "run --x=1"])
def test_a_server_without_types_or_command_is_refused(text):
    """A `--server-command` of `mesh up` that lacks types or a command is refused with the form to use."""
    with pytest.raises(ValueError, match=r"TYPE,\.\.\.=COMMAND"):
        LocalServer.parse(text)


def test_where_clients_reach_it():
    """A mesh that listens on all interfaces tells clients to use loopback. With the grpc edge, REST has a separate
    port."""
    assert UpSettings(listen="0.0.0.0:1234").rest_address == "127.0.0.1:1234"
    assert reachable("[::]:1234") == "[::1]:1234"
    assert reachable("192.0.2.1:80") == "192.0.2.1:80"
    grpc = UpSettings(edge="grpc", listen="127.0.0.1:1", rest_listen="127.0.0.1:2")
    assert (grpc.rest_address, grpc.grpc_address) == ("127.0.0.1:2", "127.0.0.1:1")


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [
        pytest.param("max", "0", 2 * 2**30, id="no-limit"),
        pytest.param(str(3 * 2**30), str(2**30), 2**29, id="cgroup"),
        pytest.param(str(2**20), "0", 64 * 2**20, id="least"),
    ],
)
def test_the_default_capacity_is_a_share_of_what_is_free(tmp_path, limit, used, expected):
    """By default all pods together get half of the memory that is free within the cgroup's limit, but each gets at
    least 64 MiB."""
    (tmp_path / "meminfo").write_text(f"MemTotal: {16 * 2**20} kB\nMemAvailable:  {8 * 2**20} kB\n")
    (tmp_path / "memory.max").write_text(limit)
    (tmp_path / "memory.current").write_text(used)
    assert default_capacity(2, meminfo=tmp_path / "meminfo", cgroup=tmp_path) == expected


def test_a_taken_port_is_said_with_the_way_out():
    """If a port is in use, the error names it and its cause, and contains an option to copy."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UpError, match=f"port {port} is taken by another program: .*--listen 127.0.0.1:{port + 1}"):
            supervisor.check_free(f"127.0.0.1:{port}", "--listen")
    supervisor.check_free(f"127.0.0.1:{port}", "--listen")


def test_an_address_that_is_not_this_machines_is_said():
    """The error for an address that is not this machine's does not claim that a port is in use."""
    with pytest.raises(UpError, match="a server cannot listen on"):
        supervisor.check_free("192.0.2.1:1234", "--listen")


def test_one_mesh_a_data_directory(tmp_path):
    """A second mesh in the same data directory is refused, and the error names the first mesh's process id. Once the
    first mesh has ended, the directory can be used again."""
    with DataFolder(tmp_path / "d"):
        with (
            pytest.raises(UpError, match=r"another mesh is using .* \(process \d+\).*--data-dir"),
            DataFolder(tmp_path / "d"),
        ):
            pass
    with DataFolder(tmp_path / "d"):
        pass


def test_the_folder_for_sockets_is_short_and_does_not_stay(tmp_path):
    """Sockets lie in a folder with a short path. The folder of a mesh that was killed is removed by the next mesh."""
    with DataFolder(tmp_path) as folder:
        run_dir = folder.run_dir
        assert run_dir.is_dir()
        assert len(str(run_dir)) < 40
        assert run_dir.stat().st_mode & 0o77 == 0
    assert not run_dir.exists()
    code = (
        "import os, sys; from pathlib import Path; from mesh.local.folder import DataFolder\n"
        "folder = DataFolder(Path(sys.argv[1])).__enter__(); print(folder.run_dir, flush=True); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=30)
    from pathlib import Path

    left = Path(killed.stdout.strip())
    assert left.is_dir()
    with DataFolder(tmp_path):
        assert not left.exists()


def test_only_a_folder_of_ours_is_removed(tmp_path):
    """Only a folder that Mesh has made is removed, even if the data directory names another one."""
    precious = tmp_path / "mesh-up-precious"
    precious.mkdir()
    (tmp_path / "run").write_text(str(precious))
    with DataFolder(tmp_path):
        assert precious.is_dir()


def test_a_data_directory_that_cannot_be_is_said(tmp_path):
    """The error for an unusable data directory names the option that sets another one."""
    (tmp_path / "file").touch()
    with pytest.raises(UpError, match="--data-dir"), DataFolder(tmp_path / "file"):
        pass
