"""The TorchServe of this machine: its Python, its Java, and what the errors say if a part is missing."""

import sys
from pathlib import Path

import pytest

from mesh.modelservers import availability, torchserve
from mesh.modelservers.torchserve import NotFound


def program(path: Path, text: str) -> Path:
    """Writes an executable script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the only folder on PATH, with a Java 17 and a `torchserve` of this Python."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.delenv(torchserve.VARIABLE, raising=False)
    program(tmp_path / "java", "#!/bin/sh\necho 'openjdk version \"17.0.15\" 2025-04-15' >&2\n")
    program(tmp_path / "torchserve", f"#!{sys.executable}\nimport ts\n")
    return tmp_path


def test_the_program_names_its_python(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the path of Python is long, pip writes the program as a shell script that runs Python. The variable may name a
    program that is not on PATH."""
    assert torchserve.find() == torchserve.Found(Path(sys.executable), machine / "java")
    long = program(machine / "a" / "torchserve", f"#!/bin/sh\n'''exec' \"{sys.executable}\" \"$0\" \"$@\"\n' '''\n")
    monkeypatch.setenv(torchserve.VARIABLE, str(long))
    assert torchserve.find().python == Path(sys.executable)


def test_what_is_missing_is_named(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "lacks what TorchServe needs: ts, torch" in availability.missing("torchserve")
    program(machine / "java", "#!/bin/sh\necho 'java version \"1.8.0_411\"'\n")
    with pytest.raises(NotFound, match=r"needs Java 11 or later, and .*java is version 8"):
        torchserve.find()
    program(machine / "java", "#!/bin/sh\necho hello\n")
    with pytest.raises(NotFound, match="does not print its version"):
        torchserve.find()
    (machine / "java").unlink()
    with pytest.raises(NotFound, match=r"there is none on PATH.*openjdk"):
        torchserve.find()
    monkeypatch.setenv("JAVA_HOME", "/nowhere")
    with pytest.raises(NotFound, match=r"JAVA_HOME \(/nowhere\) has none"):
        torchserve.find()
    program(machine / "torchserve", "#!/bin/sh\nexit 1\n")
    with pytest.raises(NotFound, match="does not name its Python"):
        torchserve.find()
    (machine / "torchserve").unlink()
    assert "there is no torchserve on PATH: install it, or name it in MESH_TORCHSERVE" in availability.missing(
        "torchserve"
    )
    monkeypatch.setenv(torchserve.VARIABLE, "/nowhere/torchserve")
    with pytest.raises(NotFound, match="cannot be read"):
        torchserve.find()
