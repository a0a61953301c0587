"""The unpacking of archives: no entry is written outside the folder, and limits hold."""

import bz2
import gzip
import io
import lzma
import os
import resource
import stat
import tarfile
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.modelfiles import archives, packed
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
    """One byte in the middle of the archive is changed. The refused archive leaves no files behind."""
    for write in (zipped, tarred):
        write(tmp_path / "archive", [("a", os.urandom(5000)), ("b", os.urandom(5000))])
        content = bytearray((tmp_path / "archive").read_bytes())
        content[2000] ^= 1
        (tmp_path / "archive").write_bytes(content)
        with pytest.raises(BadArchive, match="damaged"):
            archives.unpack(tmp_path / "archive", tmp_path / "into")
        assert not (tmp_path / "into").exists()


def test_a_damaged_header_in_the_middle_is_noticed(tmp_path: Path) -> None:
    """A tar archive ends with a block of zeros, or with the file. Anything else at the place of a header means that
    entries are missing."""
    entries = [("a", b"1" * 600), ("b", b"2" * 600)]
    with tarfile.open(tmp_path / "tar", "w") as archive:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    whole = (tmp_path / "tar").read_bytes()
    second = 512 + 1024
    for content, says in (
        (whole[:second] + b"?" + whole[second + 1 :], "the header of an entry is not valid"),
        (whole[: second + 100], "the header of an entry is not valid"),
        (whole[: second + 512 + 100], "unexpected end of data"),
    ):
        (tmp_path / "tar").write_bytes(content)
        with pytest.raises(BadArchive, match=rf"is damaged \({says}"):
            archives.unpack(tmp_path / "tar", tmp_path / "into")
        assert not (tmp_path / "into").exists()
    (tmp_path / "tar").write_bytes(whole[: second + 1024 + 512])  # without the zeros
    assert set(everything(archives.unpack(tmp_path / "tar", tmp_path / "into"))) == {"a", "b"}


def _as_tar(form: int, **fields: object) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=form) as archive:
        info = tarfile.TarInfo("a")
        for name, value in fields.items():
            setattr(info, name, value)
        archive.addfile(info)
    return made.getvalue()


LONG = "x" * (2 << 20)
PAX = _as_tar(tarfile.PAX_FORMAT, pax_headers={"comment": LONG})
NAME = _as_tar(tarfile.GNU_FORMAT, name=LONG)
LINK = _as_tar(tarfile.GNU_FORMAT, linkname=LONG, type=tarfile.SYMTYPE)


@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("content", [PAX, NAME, LINK], ids=["pax", "name", "link"])
def test_no_header_is_read_into_memory_whatever_its_length(
    tmp_path: Path, content: bytes, compress: Callable[[bytes], bytes]
) -> None:
    """A header that stands for gigabytes takes a few megabytes in a compressed archive. The header may be the first one
    or a later one."""
    for first in (b"", _as_tar(tarfile.GNU_FORMAT)[:512]):
        (tmp_path / "tar").write_bytes(compress(first + content))
        assert archives.is_archive(tmp_path / "tar")
        with pytest.raises(BadArchive, match="a header of the archive has more than 1,048,576 bytes"):
            archives.unpack(tmp_path / "tar", tmp_path / "into")
        assert not (tmp_path / "into").exists()


def test_no_list_of_a_zip_is_read_into_memory_whatever_its_length(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        for number in range(80):
            entry = zipfile.ZipInfo(str(number))
            entry.comment = b"x" * 60_000
            archive.writestr(entry, b"")
    with pytest.raises(BadArchive, match="the list of files of the archive has more than 4,194,304 bytes"):
        archives.unpack(tmp_path / "zip", tmp_path / "into")


def test_the_longest_list_that_is_read_has_all_files_that_an_archive_may_hold(tmp_path: Path) -> None:
    """With names of three hundred bytes, an archive with as many files as permitted stays below the limit on the length
    of its list."""
    names = [f"{number:05}-{'n' * 240}/{'m' * 60}" for number in range(archives.LIMITS.files)]
    zipped(tmp_path / "zip", [(name, b"") for name in names])
    with packed.zipped(tmp_path / "zip") as archive:
        assert archive.namelist() == names


def test_an_xz_that_needs_much_memory_is_refused(tmp_path: Path) -> None:
    """The header of the archive asks for a dictionary of 1.5 GiB."""
    content = bytearray(lzma.compress(_as_tar(tarfile.GNU_FORMAT)))
    at, size = 12, (content[12] + 1) * 4
    assert content[at + 2 : at + 4] == b"\x21\x01", "the filter LZMA2 with one byte of properties"
    content[at + 4] = 37
    content[at + size - 4 : at + size] = zlib.crc32(content[at : at + size - 4]).to_bytes(4, "little")
    (tmp_path / "xz").write_bytes(content)
    assert archives.is_archive(tmp_path / "xz")
    with pytest.raises(BadArchive, match="more than 128 MiB of memory to be unpacked: compress it"):
        archives.unpack(tmp_path / "xz", tmp_path / "into")


@pytest.mark.parametrize("between", [b"", bytes(8)], ids=["joined", "padded"])
@pytest.mark.parametrize("after", [b"", b"behind the archive"], ids=["nothing", "garbage"])
def test_an_xz_may_have_several_parts(tmp_path: Path, between: bytes, after: bytes) -> None:
    """Programs that compress in parallel write several parts, and may pad them. What follows the last one is
    ignored."""
    content = os.urandom(300_000)
    with tarfile.open(tmp_path / "tar", "w") as archive:
        info = tarfile.TarInfo("a")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    whole = (tmp_path / "tar").read_bytes()
    parts = [lzma.compress(whole[start : start + 100_000]) for start in range(0, len(whole), 100_000)]
    (tmp_path / "xz").write_bytes(between.join(parts) + between + after)
    assert everything(archives.unpack(tmp_path / "xz", tmp_path / "into")) == {"a": content}
    (tmp_path / "xz").write_bytes(b"".join(parts)[:-50_000])
    with pytest.raises(BadArchive, match="damaged"):
        archives.unpack(tmp_path / "xz", tmp_path / "again")


def test_a_zip_that_needs_much_memory_is_refused(tmp_path: Path) -> None:
    """A zip archive that uses LZMA is refused, because LZMA may need gigabytes of memory."""
    with zipfile.ZipFile(tmp_path / "zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a", b"1" * 1000)
    with pytest.raises(BadArchive, match="uses LZMA for 'a': pack it with deflate"):
        archives.unpack(tmp_path / "zip", tmp_path / "into")


def test_a_sparse_file_takes_what_it_claims(tmp_path: Path) -> None:
    """A file of zeros that tar has left out counts in full, so that a tiny archive cannot fill the disk. Parts in
    another order are refused."""
    with (tmp_path / "hole").open("wb") as file:
        file.truncate(64 << 20)
    listed = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(64 << 20), "GNU.sparse.name": "hole"}
    (tmp_path / "tar").write_bytes(_as_tar(tarfile.PAX_FORMAT, pax_headers=listed))
    with pytest.raises(BadArchive, match="more than 2,097,152 bytes"):
        archives.unpack(tmp_path / "tar", tmp_path / "into", ArchiveLimits(bytes=2 << 20))
    listed["GNU.sparse.map"] = "0,512,1024,512"
    (tmp_path / "tar").write_bytes(_as_tar(tarfile.PAX_FORMAT, pax_headers=listed))
    with pytest.raises(BadArchive):
        archives.unpack(tmp_path / "tar", tmp_path / "into")
    assert not (tmp_path / "into").exists()


@pytest.mark.parametrize("write", [zipped, tarred])
def test_a_path_that_no_disk_takes_is_refused(tmp_path: Path, write) -> None:
    """Each name in the path is short enough and the path is not too deep, but the complete path is too long."""
    write(tmp_path / "archive", [("/".join(["n" * 250] * 20), b"")])
    with pytest.raises(BadArchive, match="a path that is too long for the pod's disk: 'nnn"):
        archives.unpack(tmp_path / "archive", tmp_path / "into")
    assert not (tmp_path / "into").exists()


@pytest.mark.parametrize("write", [zipped, tarred])
def test_a_full_disk_is_not_the_archives_fault(tmp_path: Path, write) -> None:
    """A limit of 4 KiB on the size of a file stands for a full disk."""
    write(tmp_path / "archive", [("a", b"1" * 10_000)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(archives.CannotWrite, match="File too large"):
            archives.unpack(tmp_path / "archive", tmp_path / "into")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "into").exists()


def test_names_in_other_encodings_and_cases_are_kept(tmp_path: Path) -> None:
    """Names are bytes on the disk: those that are not UTF-8 stay as they are, and names that differ only in case are
    two files."""
    with tarfile.open(tmp_path / "tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        for name in ("modèle.txt", "Model.json", "model.json"):
            archive.addfile(tarfile.TarInfo(name))
    found = archives.unpack(tmp_path / "tar", tmp_path / "into")
    assert {os.fsencode(name) for name in os.listdir(found)} == {b"mod\xe8le.txt", b"Model.json", b"model.json"}


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
