"""The pod's directory: names, renames, sweeping, and what it refuses to touch."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puller import disk as disks
from puller.disk import Disk, folder_name
from puller.errors import PullErrorKind


@pytest.fixture
def disk(tmp_path):
    disk = Disk(tmp_path / "models")
    disk.open()
    yield disk
    disk.close()


def entries(disk: Disk) -> set[str]:
    return {entry.name for entry in disk.directory.iterdir()} - {".lock", ".blobs"}


ids = st.text(min_size=1, max_size=300) | st.sampled_from(["..", ".", "../../etc", "/etc", "a" * 5000, "~", ".lock"])


@given(ids)
def test_a_name_is_one_harmless_element(text):
    """Any id gives the name of one folder directly in the puller's directory, and every file system accepts the
    name."""
    name = folder_name(text)
    assert name.isascii()
    assert 0 < len(name) <= 255
    assert "/" not in name
    assert not name.startswith(".")


@given(ids, ids)
def test_different_ids_have_different_names(one, other):
    """Different ids have different names, even if the names of long ids are truncated."""
    assert (folder_name(one) == folder_name(other)) == (one == other)


def test_a_long_id_cannot_be_imitated():
    """An id that spells the truncated name of a long id gets a different name."""
    cut = folder_name("x" * 1000)
    assert folder_name(cut) != cut


def test_ordinary_ids_stay_readable():
    """Ordinary ids stay readable in folder names, because operators look into this directory."""
    assert folder_name("fraud-model_v2.1") == "fraud-model_v2.1"


def test_commit_replaces_what_was_there(disk):
    for content in ("one", "two"):
        partial = disk.begin()
        (partial / content).write_text(content)
        path = disk.commit(partial, "id")
    assert [entry.name for entry in path.iterdir()] == ["two"]
    assert entries(disk) == {"id"}


def test_sweep_leaves_the_lock_and_the_whole_files(disk, tmp_path):
    """A sweep removes folders, files and links. It keeps the lock, complete files and the targets of links."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    (disk.begin() / "half").write_text("x")
    (disk.directory / "file").write_text("x")
    (disk.directory / "link").symlink_to(outside)
    disk.commit(disk.begin(), "id")
    (disk.blobs / "whole").write_text("x")
    disk.sweep()
    assert entries(disk) == set()
    assert (disk.blobs / "whole").exists()
    assert (outside / "precious").exists()


def test_sweep_refuses_a_directory_that_is_not_its_own(tmp_path):
    """A sweep refuses a directory that is not the puller's, because a wrong option must not empty somebody's home
    directory."""
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="holds other files than Mesh's"):
        Disk(tmp_path).sweep()
    assert (tmp_path / "thesis.tex").exists()


def test_one_process_a_directory(disk):
    """Only one process uses a directory at a time. A second process is refused until the first one releases the
    directory. Then the second process sweeps the leftovers."""
    (disk.begin() / "half").write_text("x")
    second = Disk(disk.directory)
    with pytest.raises(ValueError, match="used by another process"):
        second.open()
    disk.close()
    second.sweep()
    assert entries(second) == set()
    second.close()


def test_remove_stays_inside(disk, tmp_path):
    """Only folders directly in the puller's directory can be removed. Removing a missing folder succeeds."""
    disk.remove(disk.path("never pulled"))
    for path in (tmp_path, disk.directory / ".lock", Path("/")):
        with pytest.raises(ValueError, match="is not a folder of"):
            disk.remove(path)


def test_write_errors(disk):
    """A full disk is an error of the disk; a missing file is not."""
    error = disks.write_error(OSError(28, os.strerror(28)))
    assert error is not None
    assert error.kind is PullErrorKind.DISK_FULL
    assert disks.write_error(FileNotFoundError(2, "no")) is None
