"""Bulk registration: chunks, line numbers, folders."""

import asyncio
import json
import os
from pathlib import Path

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from mesh.cli import bulk, layout
from tests.support import models


def lines(*ids):
    return "".join(json.dumps({"id": i, "type": "onnx", "path": f"/m/{i}"}) + "\n" for i in ids)


def test_a_file_is_registered_and_counted(mesh, run, tmp_path):
    """An import counts new ids and existing ones separately."""
    mesh.models["b"] = {}
    source = tmp_path / "models.ndjson"
    source.write_text(lines("a", "b", "c"))
    result = run("import", str(source))
    assert result.exit_code == 0, result.stderr
    assert "2 created, 1 existing, 0 failed" in result.stdout
    assert set(mesh.models) == {"a", "b", "c"}


def test_bad_lines_are_reported_by_their_number_and_hold_nothing_up(mesh, run, monkeypatch):
    """Bad lines are reported with their line number in the source, despite blank lines and chunks. All other lines are
    registered."""
    monkeypatch.setattr(bulk, "CHUNK_LINES", 2)
    text = lines("a") + "\n" + "not json\n" + lines("b") + '{"no": "id"}\n' + lines("c")
    result = run("import", "-", "--json", stdin=text)
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert sorted(error["line"] for error in document["errors"]) == [3, 5]
    assert (document["created"], document["failed"]) == (3, 2)
    assert "line 3:" in result.stderr
    assert set(mesh.models) == {"a", "b", "c"}


def test_models_of_a_type_that_no_pod_takes_are_noted(mesh, run, monkeypatch):
    """The import succeeds, and notes once, over all chunks, how many models of the type no call can load."""
    monkeypatch.setattr(bulk, "CHUNK_LINES", 2)
    text = "".join(json.dumps({"id": f"m{number}", "type": "odd"}) + "\n" for number in range(5))
    result = run("import", "-", stdin=text + lines("a"))
    assert result.exit_code == 0
    note = "note: 5 of the registered models have type odd, so no call can load them: no pod accepts models of type odd"
    assert result.stderr.count("note:") == 1
    assert note in result.stderr
    untaken = [{"type": "odd", "models": 5, "text": "no pod accepts models of type odd"}]
    assert json.loads(run("import", "-", "--json", stdin=text).stdout)["untaken"] == untaken
    assert "note:" not in run("import", "-", stdin=lines("b")).stderr


def test_many_lines_travel_in_several_requests(mesh, run, monkeypatch):
    monkeypatch.setattr(bulk, "CHUNK_LINES", 100)
    ids = [f"m{number}" for number in range(1050)]
    result = run("import", "-", stdin=lines(*ids))
    assert "1050 created" in result.stdout
    assert set(mesh.models) == set(ids)
    assert len(mesh.requests) == 11


def test_a_folder_is_registered_by_its_files(mesh, run, tmp_path):
    """Models in a folder are registered by their files. An id is the path below the folder without the suffix. Other
    files are ignored."""
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


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def imported(mesh, run, folder: Path, *, code: int = 0) -> dict[str, str]:
    """Imports a folder, and returns the registered ids with their paths below it."""
    result = run("import", str(folder))
    assert result.exit_code == code, result.stderr
    return {name: str(Path(model["path"]).relative_to(folder)) for name, model in mesh.models.items()}


def test_a_model_of_more_than_one_file_is_registered_by_its_folder(mesh, run, tmp_path):
    """A model with tensors in other files, even in subfolders, is registered by its folder. If the files do not exist
    in its folder, the model is registered by its own file."""
    write(
        tmp_path,
        {
            "bert/model.onnx": models.external_data("model.onnx_data"),
            "bert/model.onnx_data": b"1234",
            "deep/net.onnx": models.external_data_in_a_branch("weights/w.bin"),
            "deep/weights/w.bin": b"1234",
            "gone/net.onnx": models.external_data("not-there"),
            "out/net.onnx": models.external_data("../bert/model.onnx_data"),
            "plain/model.onnx": models.constant(1.0),
            "long/net.onnx": models.external_data("d" * 200),
            f"long/{'d' * 200}": b"1234",
        },
    )
    assert imported(mesh, run, tmp_path) == {
        "bert/model": "bert",
        "deep/net": "deep",
        "gone/net": "gone/net.onnx",
        "out/net": "out/net.onnx",
        "plain/model": "plain/model.onnx",
        "long/net": "long",
    }


def test_the_name_of_external_data_is_found_wherever_it_stands(tmp_path, monkeypatch):
    """A reference to external data is found anywhere in the file, even across the boundary of two reads."""
    content = models.external_data("w.bin")
    write(tmp_path, {"m.onnx": content, "w.bin": b"1234"})
    for block in range(1, len(content) + 2):
        monkeypatch.setattr(layout, "_BLOCK", block)
        assert layout.placed(tmp_path / "m.onnx") == (tmp_path, ""), block


def test_a_repository_of_versions_is_a_model_each(mesh, run, tmp_path):
    """Each model of a version repository in Triton's layout is registered once. The imported folder itself is not a
    model, even if its subfolders are numbers. A folder is not a model either if its numbered subfolders contain no
    models."""
    write(
        tmp_path,
        {
            "dense/config.pbtxt": b"",
            "dense/1/model.onnx": models.constant(1.0),
            "dense/2/model.onnx": models.constant(2.0),
            "external/1/model.onnx/model.onnx": models.external_data("weights"),
            "external/1/model.onnx/weights": bytes(64),
            "team/sparse/10/net.onnx": models.constant(1.0),
            "team/sparse/9/README": b"",
            "101/model.onnx": models.constant(1.0),
            "years/2024/notes.txt": b"",
            "years/2024/a/b.onnx": models.constant(1.0),
            "mixed/1/model.onnx": models.constant(1.0),
            "mixed/own.onnx": models.constant(1.0),
        },
    )
    assert imported(mesh, run, tmp_path) == {
        "dense": "dense",
        "external": "external",
        "team/sparse": "team/sparse",
        "101/model": "101/model.onnx",
        "years/2024/a/b": "years/2024/a/b.onnx",
        "mixed/1/model": "mixed/1/model.onnx",
        "mixed/own": "mixed/own.onnx",
    }


def test_a_folder_of_versions_that_is_imported_itself_is_a_model_where_it_says_so(mesh, run, tmp_path):
    """Triton's configuration file in an imported folder says that the folder itself is a model."""
    write(tmp_path, {"dense/1/model.onnx": models.constant(1.0), "dense/config.pbtxt": b""})
    result = run("import", str(tmp_path / "dense"))
    assert result.exit_code == 0
    assert {name: model["path"] for name, model in mesh.models.items()} == {"dense": str(tmp_path / "dense")}


def test_what_no_pod_could_tell_apart_fails_at_once(mesh, run, tmp_path):
    """If two models share a folder and one of them has external data, pods could not tell them apart. The model with
    external data is reported and the other one is registered."""
    write(tmp_path, {"a.onnx": models.external_data("w"), "w": b"1234", "b.onnx": models.constant(1.0)})
    assert imported(mesh, run, tmp_path, code=1) == {"b": "b.onnx"}
    document = json.loads(run("import", str(tmp_path), "--json").stdout)
    assert (document["failed"], document["errors"][0]["id"]) == (1, "a")
    assert "a folder of their own" in document["errors"][0]["text"]


def test_what_is_no_model_is_left_alone(mesh, run, tmp_path):
    """Hidden files, hidden folders and dangling links are ignored. The suffix may be in upper or lower case."""
    write(tmp_path, {"a.ONNX": b"", "._a.onnx": b"", ".nfs000.onnx": b"", ".git/b.onnx": b"", "c.onnx/readme": b""})
    (tmp_path / "gone.onnx").symlink_to(tmp_path / "nowhere")
    assert imported(mesh, run, tmp_path) == {"a": "a.ONNX"}


def test_a_folder_that_may_not_be_read_is_skipped_and_told(tmp_path, monkeypatch):
    write(tmp_path, {"a.onnx": b"", "lost+found/b.onnx": b""})
    scandir = os.scandir

    def refused(path):
        if Path(path).name == "lost+found":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    told = []
    found = list(layout.models(tmp_path, lambda path, why: told.append((path.name, why))))
    assert [model.id for model in found] == ["a"]
    assert told == [("lost+found", "Permission denied")]


def test_a_manifest_names_files_and_their_folders_follow(mesh, run, tmp_path):
    write(tmp_path, {"m/a.onnx": models.external_data("w"), "m/w": b"1234", "b.onnx": models.constant(1.0)})
    listed = [{"id": "a", "file": "m/a.onnx"}, {"id": "b", "file": "b.onnx"}]
    (tmp_path / "manifest.json").write_text(json.dumps({"models": listed}))
    assert imported(mesh, run, tmp_path) == {"a": "m", "b": "b.onnx"}


def test_a_manifest_lists_its_models(mesh, run, tmp_path):
    """A manifest lists models with their own types and keys. Files are relative to the manifest. A model without a file
    or path is wrong usage."""
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
    """Importing a missing file, or a folder without models, is wrong usage."""
    (tmp_path / "empty").mkdir()
    result = run("import", str(tmp_path / source))
    assert result.exit_code == 2
    assert not mesh.requests


def test_an_import_that_breaks_off_says_how_to_go_on(mesh, run):
    """If the connection breaks during an import, the exit code is 4, and the error says to run the same command
    again."""

    async def broken():
        await asyncio.sleep(0)
        raise ConnectionResetError

    mesh.answer("/mesh/v1/models:import", make=broken)
    result = run("import", "-", stdin=lines("a"))
    assert result.exit_code == 4
    assert "run the same command again to continue" in result.stderr


def test_an_import_whose_registry_goes_away_ends(mesh, run):
    """If the registry becomes unavailable, an import reports how many lines are done, and its exit code says to try
    again."""
    away = {"error": {"line": None, "id": None, "reason": "REGISTRY_AWAY", "text": "etcd does not answer"}}
    end = {"finished": False, "done": 1, "created": 1, "existing": 0, "failed": 0}
    mesh.answer("/mesh/v1/models:import", make=lambda: web.Response(text=json.dumps(away) + "\n" + json.dumps(end)))
    result = run("import", "-", stdin=lines("a", "b"))
    assert result.exit_code == 6
    assert "etcd does not answer (after 1 lines" in result.stderr


def test_an_answer_without_an_end_is_a_failure(mesh, run):
    mesh.answer("/mesh/v1/models:import", {"done": 1, "created": 1})
    assert run("import", "-", stdin=lines("a")).exit_code == 1


@given(st.lists(st.binary(max_size=40), max_size=60), st.integers(1, 7), st.integers(1, 100))
def test_chunks_hold_every_line_once_in_order(source, most_lines, most_bytes):
    """For any limits, chunks contain every line once, in order and with its number. No chunk is too large."""
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
