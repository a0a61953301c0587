"""Environments of model servers, made from the lock of one tiny package that is on the disk."""

import base64
import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from mesh.modelservers import environments, kinds
from mesh.modelservers.environments import CannotInstall


def wheel(folder: Path) -> str:
    """Writes a wheel of a package `tiny`, and returns its SHA-256."""
    folder.mkdir()
    files = {
        "tiny.py": b"ANSWER = 42\n",
        "tiny-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
        "tiny-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b'=').decode()},{len(content)}\n"
        for name, content in files.items()
    )
    path = folder / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr("tiny-1.0.dist-info/RECORD", f"{record}tiny-1.0.dist-info/RECORD,,\n")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the lock of the server `tiny`, whose environments are in the test's folder."""
    digest = wheel(tmp_path / "wheels")
    file = tmp_path / "tiny.txt"
    file.write_text(f"--no-index\n--find-links {tmp_path / 'wheels'}\ntiny==1.0 \\\n    --hash=sha256:{digest}\n")
    monkeypatch.setattr(environments, "lock_of", lambda kind: file)
    monkeypatch.setenv(environments.VARIABLE, str(tmp_path / "servers"))
    return file


def test_an_environment_is_made_once_and_again_for_another_lock(lock: Path, tmp_path: Path) -> None:
    """An environment contains the packages of its lock, and replaces the environment of a former lock. Progress is
    reported."""
    said: list[environments.InstallProgress] = []
    assert environments.installed("tiny") is None
    folder = environments.install("tiny", said.append)
    asked = [str(environments.python_of(folder)), "-I", "-c", "import tiny; print(tiny.ANSWER)"]
    assert subprocess.check_output(asked, text=True).strip() == "42"
    assert (said[-1].done, said[-1].total) == (1, 1)
    assert environments.installed("tiny") == folder
    assert environments.version("tiny") == "1.0"
    assert environments.size(folder) > 1000
    said.clear()
    assert environments.install("tiny", said.append) == folder
    assert not said
    lock.write_text(lock.read_text() + "# another lock\n")
    assert environments.installed("tiny") is None
    assert environments.install("tiny") != folder
    assert not folder.exists()
    assert environments.remove("tiny")
    assert environments.installed("tiny") is None


def test_a_package_with_another_digest_is_refused(lock: Path) -> None:
    """If the digest of a package is not the one in the lock, nothing is installed."""
    lock.write_text(lock.read_text().replace("sha256:", "sha256:00")[:-3] + "\n")
    with pytest.raises(CannotInstall, match="could not be installed"):
        environments.install("tiny")
    assert environments.installed("tiny") is None
    assert not environments.folder_of("tiny").exists()


def test_a_folder_that_cannot_be_used_is_named(lock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the folder cannot be used, the error names the variable that chooses another folder."""
    (tmp_path / "file").touch()
    monkeypatch.setenv(environments.VARIABLE, str(tmp_path / "file" / "servers"))
    with pytest.raises(CannotInstall, match="set MESH_SERVERS_DIR"):
        environments.install("tiny")


@pytest.mark.parametrize("kind", [kind for kind in kinds.KINDS.values() if kind.installs])
def test_each_server_has_a_lock_and_a_launcher(kind: kinds.ServerKind) -> None:
    """Each server that `mesh servers install` can install has a launcher, and a lock that pins the server's version."""
    assert environments.version(kind.name)
    assert environments.launcher_of(kind.name).is_file()
