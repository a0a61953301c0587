"""Registering in bulk: chunks, line numbers, folders."""

import asyncio
import json

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from mesh.cli import bulk


def lines(*ids):
    return "".join(json.dumps({"id": i, "type": "onnx", "path": f"/m/{i}"}) + "\n" for i in ids)


def test_a_file_is_registered_and_counted(mesh, run, tmp_path):
    """Ids that exist are told from new ones."""
    mesh.models["b"] = {}
    source = tmp_path / "models.ndjson"
    source.write_text(lines("a", "b", "c"))
    result = run("import", str(source))
    assert result.exit_code == 0, result.stderr
    assert "2 created, 1 existing, 0 failed" in result.stdout
    assert set(mesh.models) == {"a", "b", "c"}


def test_bad_lines_are_reported_by_their_number_and_hold_nothing_up(mesh, run, monkeypatch):
    """Numbers are those of the source, blank lines and chunks notwithstanding."""
    monkeypatch.setattr(bulk, "CHUNK_LINES", 2)
    text = lines("a") + "\n" + "not json\n" + lines("b") + '{"no": "id"}\n' + lines("c")
    result = run("import", "-", "--json", stdin=text)
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert sorted(error["line"] for error in document["errors"]) == [3, 5]
    assert (document["created"], document["failed"]) == (3, 2)
    assert "line 3:" in result.stderr
    assert set(mesh.models) == {"a", "b", "c"}


def test_many_lines_travel_in_several_requests(mesh, run, monkeypatch):
    """Every line once, none twice."""
    monkeypatch.setattr(bulk, "CHUNK_LINES", 100)
    ids = [f"m{number}" for number in range(1050)]
    result = run("import", "-", stdin=lines(*ids))
    assert "1050 created" in result.stdout
    assert set(mesh.models) == set(ids)
    assert len(mesh.requests) == 11


def test_a_folder_is_registered_by_its_files(mesh, run, tmp_path):
    """Ids are paths below the folder, without the ending; other files are left alone."""
    for name in ("a.onnx", "de/b.onnx", "readme.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    result = run("import", str(tmp_path), "--prefix", "fraud/")
    assert result.exit_code == 0, result.stderr
    assert mesh.models["fraud/de/b"] == {
        "id": "fraud/de/b",
        "type": "onnx",
        "path": str(tmp_path / "de/b.onnx"),
    }
    assert set(mesh.models) == {"fraud/a", "fraud/de/b"}


def test_a_manifest_lists_its_models(mesh, run, tmp_path):
    """Files are relative to it; its own types and keys are kept."""
    listed = [{"id": "a", "file": "m/a.onnx", "bytes": 3}, {"id": "b", "path": "s3://b", "type": "x", "key": "k"}]
    (tmp_path / "manifest.json").write_text(json.dumps({"models": listed}))
    assert run("import", str(tmp_path)).exit_code == 0
    assert mesh.models == {
        "a": {"id": "a", "type": "onnx", "path": str(tmp_path / "m/a.onnx")},
        "b": {"id": "b", "type": "x", "path": "s3://b", "key": "k"},
    }
    (tmp_path / "manifest.json").write_text('{"models": [{"id": "a"}]}')
    assert run("import", str(tmp_path / "manifest.json")).exit_code == 2


@pytest.mark.parametrize("source", ["missing", "empty"])
def test_a_source_that_is_none_is_wrong_usage(mesh, run, tmp_path, source):
    """A file that is not there, a folder without models."""
    (tmp_path / "empty").mkdir()
    result = run("import", str(tmp_path / source))
    assert result.exit_code == 2
    assert not mesh.requests


def test_an_import_that_breaks_off_says_how_to_go_on(mesh, run):
    """The mesh is gone in the middle: exit code 4, and the same command goes on."""

    async def broken():
        await asyncio.sleep(0)
        raise ConnectionResetError

    mesh.answer("/mesh/v1/models:import", make=broken)
    result = run("import", "-", stdin=lines("a"))
    assert result.exit_code == 4
    assert "the same command goes on" in result.stderr


def test_an_import_whose_registry_goes_away_ends(mesh, run):
    """What was done until then is counted; the exit code says that trying again is worth it."""
    away = {"error": {"line": None, "id": None, "reason": "REGISTRY_AWAY", "text": "etcd does not answer"}}
    end = {"finished": False, "done": 1, "created": 1, "existing": 0, "failed": 0}
    mesh.answer("/mesh/v1/models:import", make=lambda: web.Response(text=json.dumps(away) + "\n" + json.dumps(end)))
    result = run("import", "-", stdin=lines("a", "b"))
    assert result.exit_code == 6
    assert "etcd does not answer (after 1 lines" in result.stderr


def test_an_answer_without_an_end_is_a_failure(mesh, run):
    """Lines whose outcome nobody knows are not counted as done."""
    mesh.answer("/mesh/v1/models:import", {"done": 1, "created": 1})
    assert run("import", "-", stdin=lines("a")).exit_code == 1


@given(st.lists(st.binary(max_size=40), max_size=60), st.integers(1, 7), st.integers(1, 100))
def test_chunks_hold_every_line_once_in_order(source, most_lines, most_bytes):
    """Whatever the bounds: nothing lost, nothing doubled, each with its number, no chunk too large."""
    before = bulk.CHUNK_LINES, bulk.CHUNK_BYTES
    bulk.CHUNK_LINES, bulk.CHUNK_BYTES = most_lines, most_bytes
    try:
        made = list(bulk.chunks(enumerate((line.replace(b"\n", b"") for line in source), 1)))
    finally:
        bulk.CHUNK_LINES, bulk.CHUNK_BYTES = before
    found = [pair for c in made for pair in zip(c.numbers, c.data.rstrip(b"\n").split(b"\n"), strict=True)]
    cleaned = [(number, line.replace(b"\n", b"").strip()) for number, line in enumerate(source, 1)]
    assert found == [(number, line) for number, line in cleaned if line]
    for chunk in made:
        assert 1 <= len(chunk.numbers) <= most_lines
        assert len(chunk.data) <= most_bytes + 1 + len(chunk.numbers) or len(chunk.numbers) == 1
