"""Building of fleets: real models, reproducible bytes, no repeated work, reported failures."""

import hashlib
import stat
import sys

import onnx
import pytest

from mesh.demo import fleet
from mesh.demo.fleet import building
from mesh.demo.fleet.recipes import recipe

pytestmark = pytest.mark.timeout(300)  # the first test also pays for training the small fleet


def test_the_models_are_what_the_manifest_says(small):
    """Each file in the manifest is an ONNX model with the recorded input, size and checksum."""
    assert [sample.id for sample in small.models] == sorted(recipe(number).id for number in range(12))
    for sample in small.models:
        content = sample.path.read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (sample.bytes, sample.sha256)
        model = onnx.load_from_string(content)
        onnx.checker.check_model(model)
        (given,) = model.graph.input
        (tensor,) = sample.inputs
        assert given.name == tensor.name
        assert given.type.tensor_type.shape.dim[1].dim_value == tensor.shape[1]
        expected = onnx.TensorProto.DOUBLE if tensor.datatype == "FP64" else onnx.TensorProto.FLOAT
        assert given.type.tensor_type.elem_type == expected
        assert sample.licence
        assert sample.source


def test_two_processes_make_the_same_bytes(two_fleets):
    first, second = ({sample.id: sample.sha256 for sample in one.models} for one in two_fleets)
    assert second.items() <= first.items()
    assert len(second) == 6


def test_what_is_there_is_kept(copied, monkeypatch):
    """If the fleet exists, a second build starts no process, even for a smaller fleet, and the manifest can still be
    loaded."""
    monkeypatch.setattr(building.subprocess, "Popen", None)
    again = fleet.build(copied, 12)
    assert again == fleet.Fleet.load(copied)
    assert len(fleet.build(copied, 6).models) == 6
    assert len(fleet.Fleet.load(copied).models) == 6


def trained(monkeypatch) -> list[str]:
    """Replaces the training: models that would be trained are noted in the returned list and written as dummy files."""
    made: list[str] = []

    def fake(directory, todo, rows, jobs):
        for item in todo:
            (directory / "models" / f"{item.id}.onnx").write_bytes(b"new")
            made.append(item.id)
            yield item

    monkeypatch.setattr(building, "_trained", fake)
    return made


@pytest.mark.parametrize("damage", ["changed", "removed", "another recipe", "no manifest"])
def test_what_is_damaged_is_made_again(copied, small, monkeypatch, damage):
    """Only damaged models are rebuilt. Without a manifest, all models are."""
    made = trained(monkeypatch)
    sample = small.models[3]
    match damage:
        case "changed":
            (copied / "models" / f"{sample.id}.onnx").write_bytes(b"old")
        case "removed":
            (copied / "models" / f"{sample.id}.onnx").unlink()
        case "another recipe":
            manifest = copied / "manifest.json"
            manifest.write_text(manifest.read_text().replace('\\"seed\\": 3,', '\\"seed\\": 4,'))
            sample = next(s for s in small.models if s.id == recipe(3).id)
        case "no manifest":
            (copied / "manifest.json").unlink()
    fleet.build(copied, 12)
    assert made == ([recipe(n).id for n in range(12)] if damage == "no manifest" else [sample.id])
    assert {s.id: s.bytes for s in fleet.Fleet.load(copied).models}[sample.id] == 3


def test_an_interrupted_build_goes_on_where_it_was(copied, monkeypatch):
    """The manifest lists the models that were finished before Ctrl-C interrupts a build. The next build continues from
    there."""

    def interrupted(directory, todo, rows, jobs):
        for item in todo[:2]:
            (directory / "models" / f"{item.id}.onnx").write_bytes(b"new")
            yield item
        raise KeyboardInterrupt

    monkeypatch.setattr(building, "_trained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fleet.build(copied, 20)
    made = trained(monkeypatch)
    assert len(fleet.build(copied, 20).models) == 20
    assert made == [recipe(number).id for number in range(14, 20)]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        pytest.param("#!/bin/sh\necho no such library >&2\n", "no such library", id="ends"),
        pytest.param(
            '#!/bin/sh\nread x\necho \'{"error": "ValueError: bad"}\'\nread x\n', "ValueError: bad", id="error"
        ),
        pytest.param("#!/bin/sh\nread x\necho nonsense\n", "a training process failed", id="nonsense"),
    ],
)
def test_a_worker_that_fails_is_told(tmp_path, monkeypatch, script, said):
    """If a worker fails, the build ends with an error, which quotes the worker's error if there is one."""
    path = tmp_path / "python"
    path.write_text(script)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(path))
    with pytest.raises(fleet.BuildError, match=said):
        fleet.build(tmp_path / "fleet", 20, jobs=2)


def test_a_folder_without_a_manifest_is_no_fleet(tmp_path):
    """Loading a folder without a manifest, or with a broken one, raises ValueError."""
    for content in (None, "{", "{}", '{"models": [{}]}', "[]"):
        if content is not None:
            (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(ValueError, match=r"manifest\.json"):
            fleet.Fleet.load(tmp_path)


def test_capacity_for_a_share_of_the_fleet(small):
    """The capacity for a share of the fleet is divided among the pods, but a pod always has room for the largest
    model."""
    largest = max(sample.memory for sample in small.models)
    assert small.capacity_bytes(1, share=0.9) == pytest.approx(small.memory_bytes * 0.9, abs=1)
    assert small.capacity_bytes(50) > largest
    assert small.chosen([small.models[0].id]).models == small.models[:1]
