"""The manifests of TorchServe's archives."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.modelfiles import mar
from mesh.modelfiles.mar import BadManifest


def written(folder: Path, text: str | bytes) -> Path:
    (folder / mar.FOLDER).mkdir(exist_ok=True)
    (folder / mar.FOLDER / mar.MANIFEST).write_bytes(text.encode() if isinstance(text, str) else text)
    return folder


def test_a_manifest_names_the_handler(tmp_path: Path) -> None:
    """A manifest is read with the name of its handler, and everything else in it is kept."""
    assert not mar.is_unpacked(tmp_path)
    (tmp_path / "w.pt").touch()
    content = {"runtime": "python3", "model": {"handler": "own.py", "serializedFile": "w.pt", "more": [1]}, "x": 1}
    folder = written(tmp_path, json.dumps(content))
    assert mar.is_unpacked(folder)
    assert mar.read(folder) == mar.Manifest("own.py", content)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        (b"\xff\xfe\0", "not valid JSON"),
        ("[]", "has no object `model`"),
        ('{"model": 3}', "has no object `model`"),
        ('{"model": {}}', "names no handler"),
        ('{"model": {"handler": ""}}', "names no handler"),
        ('{"model": {"handler": "h", "modelFile": 3}}', "must be a string"),
        ('{"model": {"handler": "h", "serializedFile": "/etc/passwd"}}', "leads out of the archive"),
        ('{"model": {"handler": "h", "serializedFile": "../x"}}', "leads out of the archive"),
        ('{"model": {"handler": "h", "serializedFile": "no.pt"}}', "'no.pt', which .* names, is missing"),
        ('{"model": {"handler": "h", "serializedFile": "%s"}}' % ("x" * 5000), "cannot be used as a file's name"),
        (" " * (2 << 20), "more than 1048576 bytes"),
    ],
)
def test_a_bad_manifest_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(BadManifest, match=says):
        mar.read(written(tmp_path, text))


def test_an_archive_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadManifest, match=r"lacks MAR-INF/MANIFEST.json"):
        mar.read(tmp_path)


values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(("model", "runtime", "x")),
        values | st.dictionaries(st.sampled_from(("handler", "serializedFile", "modelFile")), values, max_size=3),
    )
)
def test_no_manifest_does_anything_but_read_or_refuse(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, object]
) -> None:
    """Any JSON in a manifest is read or refused. A file that an accepted manifest names lies inside the archive's
    folder."""
    folder = written(tmp_path_factory.mktemp("mar"), json.dumps(content))
    try:
        read = mar.read(folder)
    except BadManifest:
        return
    for name in ("serializedFile", "modelFile"):
        named = read.content["model"].get(name)
        assert named is None or (folder / named).resolve().is_relative_to(folder.resolve())
