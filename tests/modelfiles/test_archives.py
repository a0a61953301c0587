"""The unpacking of archives: no entry is written outside the folder, and limits hold."""

import gzip
import io
import os
import stat
import tarfile
import tempfile
import threading
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.modelfiles import archives
from mesh.modelfiles.archives import ArchiveLimits, BadArchive

ELEMENTS = st.sampled_from(["a", "b", "model.bst", "..", ".", "", "ä", "x" * 300, "a\\b", "~", "__MACOSX", "c:"])
NAMES = st.tuples(st.sampled_from(["", "/", "./", "../"]), st.lists(ELEMENTS, min_size=1, max_size=6)).map(
    lambda parts: parts[0] + "/".join(parts[1])
)
ENTRIES = st.lists(st.tuples(NAMES, st.binary(max_size=50)), max_size=8)


def zipped(path: Path, entries: list[tuple[str, bytes]]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries:
            archive.writestr(zipfile.ZipInfo(name), content)


def tarred(path: Path, entries: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def everything(folder: Path) -> dict[str, bytes | None]:
    """Returns all entries below a folder, with the content of files."""
    found = {}
    for root, folders, files in os.walk(folder):
        for name in folders:
            found[str(Path(root, name).relative_to(folder))] = None
        for name in files:
            found[str(Path(root, name).relative_to(folder))] = Path(root, name).read_bytes()
    return found


@pytest.mark.parametrize("write", [zipped, tarred])
@pytest.mark.filterwarnings("ignore:Duplicate name")
@given(entries=ENTRIES)
def test_nothing_is_written_outside_of_the_folder(write, entries: list[tuple[str, bytes]]) -> None:
    """Whatever the names, either the archive is refused and no file is left, or its files are in the folder with their
    contents. Nothing outside the folder is touched."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "a").write_bytes(b"not mine")
        write(folder / "archive", entries)
        before = everything(folder)
        try:
            archives.unpack(folder / "archive", folder / "into")
        except BadArchive:
            assert everything(folder) == before
            return
        after = everything(folder)
        inside = {path.removeprefix("into/"): after[path] for path in after if path.startswith("into/")}
        assert {path: content for path, content in after.items() if not path.startswith("into")} == before
        wanted = {os.path.normpath(path): content for path, content in entries}
        for path, content in inside.items():
            assert content is None or wanted[path] == content


@pytest.mark.parametrize(
    ("limits", "entries", "says"),
    [
        (ArchiveLimits(bytes=100), [("a", b"1" * 60), ("b", b"1" * 60)], "more than 100 bytes"),
        (ArchiveLimits(files=3), [(str(number), b"") for number in range(4)], "more than 3 files"),
        (ArchiveLimits(depth=3), [("a/b/c/d", b"")], "more than 3 deep"),
    ],
)
@pytest.mark.parametrize("write", [zipped, tarred])
def test_limits_end_the_unpacking(tmp_path: Path, write, limits: ArchiveLimits, entries, says: str) -> None:
    """An archive beyond a limit is refused, and the files written so far are removed."""
    write(tmp_path / "archive", entries)
    with pytest.raises(BadArchive, match=says):
        archives.unpack(tmp_path / "archive", tmp_path / "into", limits)
    assert not (tmp_path / "into").exists()


def test_bytes_are_counted_as_they_are_written(tmp_path: Path) -> None:
    """An archive of less than 100 KB, which unpacks to 64 MiB, is refused at the limit of bytes."""
    with zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(64 << 20))
    assert (tmp_path / "bomb").stat().st_size < 100_000
    with pytest.raises(BadArchive, match="more than 2,097,152 bytes"):
        archives.unpack(tmp_path / "bomb", tmp_path / "into", ArchiveLimits(bytes=2 << 20))


def test_links_and_devices_are_refused(tmp_path: Path) -> None:
    """Links in an archive are refused, because a later entry could leave the folder through them. Devices and pipes are
    refused too."""
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
        with tarfile.open(tmp_path / "tar", "w") as archive:
            info = tarfile.TarInfo("link")
            info.type, info.linkname = kind, "/etc"
            archive.addfile(info)
        text = "holds a link: " if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else "holds a device or a pipe: "
        with pytest.raises(BadArchive, match=text):
            archives.unpack(tmp_path / "tar", tmp_path / "into")
    with zipfile.ZipFile(tmp_path / "zip", "w") as packed:
        entry = zipfile.ZipInfo("link")
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        packed.writestr(entry, "/etc")
    with pytest.raises(BadArchive, match="holds a link: "):
        archives.unpack(tmp_path / "zip", tmp_path / "into")


def test_a_damaged_archive_is_refused(tmp_path: Path) -> None:
    """A byte of the archive is changed here. The refused archive leaves no files behind."""
    for write in (zipped, tarred):
        write(tmp_path / "archive", [("a", os.urandom(5000)), ("b", os.urandom(5000))])
        content = bytearray((tmp_path / "archive").read_bytes())
        content[2000] ^= 1
        (tmp_path / "archive").write_bytes(content)
        with pytest.raises(BadArchive, match="damaged"):
            archives.unpack(tmp_path / "archive", tmp_path / "into")
        assert not (tmp_path / "into").exists()


def test_the_only_folder_of_an_archive_is_its_content(tmp_path: Path) -> None:
    """If an archive contains only one folder, as most do, this folder is the model."""
    zipped(tmp_path / "one", [("model/a", b"1"), ("model/b/c", b"2"), ("__MACOSX/x", b"")])
    assert archives.unpack(tmp_path / "one", tmp_path / "into") == tmp_path / "into" / "model"
    zipped(tmp_path / "two", [("a", b"1"), ("b/c", b"2")])
    assert archives.unpack(tmp_path / "two", tmp_path / "other") == tmp_path / "other"


def test_unpacking_stops_when_nobody_waits(tmp_path: Path) -> None:
    zipped(tmp_path / "archive", [("a", b"1")])
    stop = threading.Event()
    stop.set()
    with pytest.raises(BadArchive, match="was cancelled"):
        archives.unpack(tmp_path / "archive", tmp_path / "into", stop=stop)


def test_only_archives_are_archives(tmp_path: Path) -> None:
    """A compressed file counts as an archive only if it contains a tar archive."""
    (tmp_path / "plain.gz").write_bytes(gzip.compress(b"a pickle"))
    assert not archives.is_archive(tmp_path / "plain.gz")
    assert not archives.is_archive(tmp_path)
    for write in (zipped, tarred):
        write(tmp_path / "archive", [("a", b"")])
        assert archives.is_archive(tmp_path / "archive")
