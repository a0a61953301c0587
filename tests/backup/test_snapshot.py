"""Snapshots of a real etcd, and how many are kept."""

import errno
import fcntl
import json
import subprocess
from pathlib import Path

import pytest

from mesh.cli import snapshot
from mesh.etcd import Etcd
from mesh.process import find_binary
from tests.backup.conftest import Admin
from tests.support.etcd import EtcdServer


def test_etcd_starts_from_it(own_etcd: EtcdServer, tmp_path: Path) -> None:
    """etcd's own tool accepts a snapshot and its digest, and restores every key."""
    admin = Admin(own_etcd)
    admin.put({b"k%d" % number: b"v" * 5000 for number in range(300)})
    result = admin.run("snapshot", "--dir", str(tmp_path / "snapshots"), "--json")
    assert result.exit_code == 0, result.stderr
    made = Path(json.loads(result.stdout)["file"])
    assert made.parent == tmp_path / "snapshots"
    assert made.stat().st_mode & 0o077 == 0
    data = tmp_path / "restored"
    tool = find_binary("etcdutl")
    subprocess.run([tool, "snapshot", "restore", str(made), f"--data-dir={data}"], check=True, capture_output=True)
    again = EtcdServer(data)
    with again:
        assert again.etcdctl("get", "k", "--prefix", "--count-only", "-w", "fields").count('"Count" : 300') == 1


def make(folder: Path, *names: str) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_newest_are_kept(admin: Admin, tmp_path: Path) -> None:
    """The newest `--keep` snapshots of this etcd are kept. The last snapshot of another etcd and all other files in the
    folder are kept too."""
    cluster = json.loads(admin.run("snapshot", "--dir", str(tmp_path / "x"), "--json").stdout)["cluster"]
    folder = tmp_path / "snapshots"
    mine = [f"etcd-{cluster}-{number}-2020010{number}T000000Z.db" for number in range(1, 5)]
    others = [f"etcd-abc-9-2019010{number}T000000Z.db" for number in range(1, 4)]
    make(folder, *mine, *others, "notes.txt")
    result = admin.run("snapshot", "--dir", str(folder), "--keep", "3")
    assert result.exit_code == 0, result.stderr
    found = names(folder)
    assert {mine[3], mine[2], others[2], "notes.txt"} <= found
    assert len(found) == 5, "the new snapshot is kept too"
    assert "removed 4 older" in result.stdout


def test_what_a_killed_run_has_left_is_removed(admin: Admin, tmp_path: Path) -> None:
    """The leftovers of a killed run are removed, but a file that another run is writing is not."""
    (tmp_path / ".restore-a" / "data").mkdir(parents=True)
    make(tmp_path, ".etcd-a-1-20200101T000000Z.db.part", ".etcd-b-1-20200101T000000Z.db.part")
    with (tmp_path / ".etcd-b-1-20200101T000000Z.db.part").open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert admin.run("snapshot", "--dir", str(tmp_path)).exit_code == 0
    found = names(tmp_path)
    assert ".restore-a" not in found
    assert ".etcd-a-1-20200101T000000Z.db.part" not in found
    assert ".etcd-b-1-20200101T000000Z.db.part" in found


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_the_old_ones(
    admin: Admin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """If the disk is full, the command fails, keeps the old snapshots and leaves no part of the new one."""
    old = "etcd-abc-9-20190101T000000Z.db"
    make(tmp_path, old)

    def full(descriptor: int) -> None:
        raise OSError(number, "no room")

    monkeypatch.setattr(snapshot.os, "fsync", full)
    result = admin.run("snapshot", "--dir", str(tmp_path), "--keep", "1")
    assert result.exit_code == 1
    assert "is full: give it more space" in result.stderr
    assert "Its 1 older snapshots are unchanged" in result.stderr
    assert names(tmp_path) == {old}


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_snapshot_that_is_not_whole_is_not_kept(
    admin: Admin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """A snapshot that was truncated or changed on its way does not match the digest at its end."""
    whole = Etcd.database

    async def damaged(self: Etcd, *, idle: float):
        parts = [part async for part in whole(self, idle=idle)]
        if damage == "cut":
            parts.pop()
        else:
            blob, remaining = parts[0]
            parts[0] = (bytes([blob[0] ^ 1]) + blob[1:], remaining)
        for part in parts:
            yield part

    monkeypatch.setattr(Etcd, "database", damaged)
    result = admin.run("snapshot", "--dir", str(tmp_path))
    assert result.exit_code == 1
    assert "does not match its checksum" in result.stderr
    assert names(tmp_path) == set()


def test_an_etcd_that_is_away_is_said(own_etcd: EtcdServer, tmp_path: Path) -> None:
    own_etcd.kill9()
    result = Admin(own_etcd).run("snapshot", "--dir", str(tmp_path / "snapshots"))
    assert result.exit_code == 4
    assert "etcd does not answer" in result.stderr
    assert names(tmp_path / "snapshots") == set()


def test_a_folder_that_cannot_be_made_is_said(admin: Admin, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = admin.run("snapshot", "--dir", str(tmp_path / "file" / "below"))
    assert result.exit_code == 1
    assert "Not a directory" in result.stderr
