"""Larger models that come from packages, tested without a network: the files in a wheel, and the warning about a
missing wheel."""

import zipfile

import numpy as np
import pytest

from mesh.demo.fleet import building, wheels
from mesh.demo.fleet.catalogue import Fleet
from mesh.demo.fleet.requests import sample_inputs


def make_wheels(folder, *, licences=True, members=True):
    for wheel in wheels.WHEELS:
        with zipfile.ZipFile(folder / f"{wheel.package}-1.0-py3-none-any.whl", "w") as archive:
            name, said = wheel.evidence
            archive.writestr(f"{wheel.package}-1.0.dist-info/{name}", said if licences else "all rights reserved")
            if members:
                archive.writestr(wheel.member, f"onnx of {wheel.id}")


@pytest.fixture
def downloads(monkeypatch):
    """Returns a function that replaces pip with a download that makes the given wheels."""

    def set_up(make=make_wheels, failure="", **how):
        def download(folder):
            make(folder, **how)
            return failure

        monkeypatch.setattr(wheels, "_download", download)

    return set_up


def test_what_is_taken_from_wheels(tmp_path, downloads):
    """Models are taken from wheels, with their licences. Nothing is downloaded a second time."""
    downloads()
    samples, missing = wheels.fetch(tmp_path, {})
    assert not missing
    assert {sample.id: sample.path.read_text() for sample in samples} == {
        "magika": "onnx of magika",
        "silero-vad": "onnx of silero-vad",
    }
    assert {sample.licence for sample in samples} == {"Apache-2.0", "MIT"}
    downloads(make=lambda folder: pytest.fail("downloaded again"))
    again, missing = wheels.fetch(tmp_path, {sample.id: sample for sample in samples})
    assert again == samples


@pytest.mark.parametrize(
    ("how", "said"),
    [
        pytest.param(
            {"make": lambda folder: None, "failure": "pip could not fetch it: no route"}, "no route", id="net"
        ),
        pytest.param({"licences": False}, "licence", id="licence"),
        pytest.param({"members": False}, "its wheel no longer contains", id="member"),
    ],
)
def test_what_cannot_be_had_is_said_loudly(tmp_path, downloads, capfd, how, said):
    """If a wheel cannot be used, the fleet is built without its model, records the reason, and prints a warning."""
    downloads(**{**how, **({"make": make_wheels} if "make" not in how else {})})
    fleet = building.build(tmp_path, 0, with_wheels=True)
    assert len(fleet.missing) == 2
    assert all(said in sentence for sentence in fleet.missing)
    assert fleet.models == ()
    assert Fleet.load(tmp_path).missing == fleet.missing
    assert "WARNING" in capfd.readouterr().err


def test_the_pins_name_a_version_and_a_hash_of_each():
    """Every pinned package has a version and a hash, as pip requires."""
    text = wheels.PINS.read_text()
    for wheel in wheels.WHEELS:
        name = wheel.package.replace("_", "-")
        assert f"{name}==" in text
    assert text.count("--hash=sha256:") == len(wheels.WHEELS)


def test_requests_have_the_shapes_that_the_models_take(tmp_path, downloads):
    """Requests have the shapes that the models require: bytes for magika; sound, state and a scalar rate for
    silero-vad."""
    downloads()
    samples, _ = wheels.fetch(tmp_path, {})
    rng = np.random.default_rng(0)
    for sample in samples:
        for _ in range(20):
            inputs = sample_inputs(sample, rng)
            if sample.id == "magika":
                (given,) = inputs.values()
                assert given.dtype == np.int32
                assert given.shape[1] == 2048
                assert 0 <= given.min() <= given.max() <= 256
            else:
                batch = inputs["input"].shape[0]
                assert {name: array.shape for name, array in inputs.items()} == {
                    "input": (batch, 512),
                    "state": (2, batch, 128),
                    "sr": (),
                }
                assert inputs["sr"] == 16_000
                assert np.abs(inputs["input"]).max() <= 1.5
