"""The format of backup files: intact files can be read, and damaged files are refused."""

import gzip
import io
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.cli.backup import file
from mesh.cli.backup.file import BackupEntry, BackupError, Header

HEADER = Header(
    base="mm/mesh",
    revision=7,
    cluster="abc",
    schema=1,
    made="2026-01-01T00:00:00+00:00",
    by="1.0",
    counts={"registry": 2, "vmodels": 0, "config": 1},
)
ENTRIES = [
    BackupEntry("registry", b"a", b'{"type":"onnx"}'),
    BackupEntry("registry", b"\xff\xfe", b"\x00\n\xff"),
    BackupEntry("config", b"type_limits", b"{}"),
]


def written(header: Header = HEADER, entries: list[BackupEntry] = ENTRIES) -> bytes:
    stream = io.BytesIO()
    writer = file.Writer(stream, header)
    writer.write(entries)
    writer.finish()
    return stream.getvalue()


def test_what_is_written_is_read() -> None:
    """Reading a backup returns exactly what was written, even bytes that are not UTF-8."""
    raw = written()
    assert file.verify(io.BytesIO(raw)) == HEADER
    assert list(file.entries(io.BytesIO(raw))) == ENTRIES


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=20), st.binary(max_size=50)), max_size=5))
def test_any_record_survives(records: list[tuple[bytes, bytes]]) -> None:
    entries = [BackupEntry("vmodels", name, value) for name, value in records]
    raw = written(replace(HEADER, counts={"registry": 0, "vmodels": len(entries), "config": 0}), entries)
    file.verify(io.BytesIO(raw))
    assert list(file.entries(io.BytesIO(raw))) == entries


def test_an_admin_can_look_into_it() -> None:
    """A backup consists of gzipped lines of JSON, which an admin can inspect with `zcat`."""
    first, *_, last = gzip.decompress(written()).splitlines()
    assert json.loads(first)["base"] == "mm/mesh"
    assert json.loads(last)["end"] is True


@pytest.mark.parametrize("kept", [0, 10, 40, -12, -1])
def test_one_that_is_cut_off_is_refused(kept: int) -> None:
    with pytest.raises(BackupError, match=r"truncated|not a backup|end is missing"):
        file.verify(io.BytesIO(written()[:kept]))


@given(st.data())
def test_no_damage_goes_unnoticed(data: st.DataObject) -> None:
    """If one byte changes, either the backup is invalid, or its content is the same, because some bytes of gzip's
    header are unused."""
    raw = bytearray(written())
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] ^= data.draw(st.integers(1, 255))
    try:
        header = file.verify(io.BytesIO(raw))
    except BackupError:
        return
    assert header == HEADER
    assert list(file.entries(io.BytesIO(raw))) == ENTRIES


def test_a_changed_line_does_not_fit_the_checksum() -> None:
    """The backup's own checksum detects a line that a person has edited, even if gzip's checksum is right."""
    text = gzip.decompress(written()).replace(b'"a"', b'"b"')
    with pytest.raises(BackupError, match="checksum"):
        file.verify(io.BytesIO(gzip.compress(text)))


def test_a_later_version_is_refused() -> None:
    with pytest.raises(BackupError, match=r"version 9.*use a newer program"):
        file.verify(io.BytesIO(written(replace(HEADER, version=9))))


def test_counts_have_to_be_true() -> None:
    with pytest.raises(BackupError, match="header says"):
        file.verify(io.BytesIO(written(entries=ENTRIES[:2])))


@pytest.mark.parametrize("content", [b"[1]\n", b"{}\n", b'{"mesh-backup": "1"}\n', b"not json\n", b"no end"])
def test_something_else_is_no_backup(content: bytes) -> None:
    with pytest.raises(BackupError, match="backup"):
        file.verify(io.BytesIO(gzip.compress(content)))
