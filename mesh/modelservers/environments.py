"""Environments of model servers, each made by pip from a lock file with hashes.

A server's dependencies contradict Mesh's, so a server has an environment of its own: a folder below
`$XDG_DATA_HOME/mesh/servers`, or below `MESH_SERVERS_DIR`. Its name contains a checksum of the lock and the version of
Python, so that a new lock leads to a new environment. A folder without the file `made` is unfinished, and made again.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from mesh.modelservers import machines

VARIABLE = "MESH_SERVERS_DIR"
_MADE = "made"
_LAST = 8  # lines of pip's output in an error
_PACKAGE = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==", re.MULTILINE)


class CannotInstall(Exception):
    """The failure to make an environment. The text says why."""


@dataclass(frozen=True, slots=True)
class InstallProgress:
    """The progress of an installation."""

    done: int  # packages fetched
    total: int
    line: str  # pip's last line


def lock_of(kind: str) -> Path:
    """Returns the path of a server's lock file."""
    return Path(str(resources.files("mesh.modelservers"))) / "locks" / f"{kind}.txt"


def launcher_of(kind: str) -> Path:
    """Returns the path of the program that starts a server."""
    return Path(str(resources.files("mesh.modelservers"))) / "launchers" / f"{kind}_app.py"


def companions_of(kind: str) -> list[Path]:
    """Returns the paths of the modules that a server imports from the folder of its launcher."""
    launcher = launcher_of(kind)
    return sorted(path for path in launcher.parent.glob(f"{kind}_*.py") if path != launcher)


def handlers() -> Path:
    """Returns the folder of the modules that are copied beside models, for servers that import them."""
    return Path(str(resources.files("mesh.modelservers"))) / "handlers"


def root() -> Path:
    """Returns the folder of all environments."""
    if given := os.environ.get(VARIABLE):
        return Path(given).absolute()
    data = os.environ.get("XDG_DATA_HOME", "")
    return (Path(data) if os.path.isabs(data) else Path.home() / ".local" / "share") / "mesh" / "servers"


def folder_of(kind: str) -> Path:
    """Returns the folder of a server's environment, whether it is installed or not."""
    digest = hashlib.sha256(lock_of(kind).read_bytes()).hexdigest()[:12]
    return root() / f"{kind}-{sys.version_info.major}.{sys.version_info.minor}-{digest}"


def installed(kind: str) -> Path | None:
    """Returns the folder of a server's environment, or None if it is not installed."""
    folder = folder_of(kind)
    return folder if (folder / _MADE).is_file() else None


def python_of(folder: Path) -> Path:
    """Returns the interpreter of an environment."""
    return folder / "bin" / "python"


def version(kind: str) -> str:
    """Returns the version of a server in its lock: that of the package with its name, or the one in a comment, or "" if
    the lock has neither."""
    found = re.search(rf"^(?:# )?{re.escape(kind)}==([^\s;\\]+)", lock_of(kind).read_text(), re.MULTILINE)
    return found[1] if found else ""


def install(kind: str, on_progress: Callable[[InstallProgress], None] = lambda progress: None) -> Path:
    """Makes a server's environment unless it is there, and returns its folder. When it makes one, removes those that
    this version of Python made from former locks. Waits while another process does the same. `on_progress` is called
    for each line of pip's output. May block for minutes. Raises CannotInstall."""
    folder = folder_of(kind)
    if (why := machines.lacks(kind)) != "":
        raise CannotInstall(why)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / f"{kind}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if installed(kind) is None:
                _make(folder, lock_of(kind), on_progress)
                for former in folder.parent.glob(f"{kind}-{sys.version_info.major}.{sys.version_info.minor}-*"):
                    if former != folder:
                        shutil.rmtree(former, ignore_errors=True)
    except OSError as error:
        why = error.strerror or str(error)
        raise CannotInstall(f"{folder.parent} cannot be used ({why}): set {VARIABLE} to another folder") from error
    return folder


def size(folder: Path) -> int:
    """Returns the size of all files of an environment, in bytes."""
    return sum(os.lstat(os.path.join(parent, name)).st_size for parent, _, names in os.walk(folder) for name in names)


def remove(kind: str) -> bool:
    """Removes a server's environments. Returns whether there was one."""
    found = list(root().glob(f"{kind}-*"))
    for folder in found:
        shutil.rmtree(folder, ignore_errors=True)
    return bool(found)


def _make(folder: Path, lock: Path, on_progress: Callable[[InstallProgress], None]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    total = len(set(_PACKAGE.findall(lock.read_text())))
    pip = [sys.executable, "-P", "-m", "pip", "--disable-pip-version-check", "--python", str(python_of(folder))]
    options = ["--no-input", "--progress-bar=off", "--no-deps", "--require-hashes", "--requirement", str(lock)]
    last: deque[str] = deque(maxlen=_LAST)
    done = 0
    for argv in ([sys.executable, "-P", "-m", "venv", "--without-pip", str(folder)], [*pip, "install", *options]):
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
            assert child.stdout is not None
            try:
                for line in child.stdout:
                    last.append(line.rstrip())
                    done += line.startswith(("Collecting ", "Processing "))
                    on_progress(InstallProgress(done, total, line.strip()))
            except BaseException:
                child.kill()
                shutil.rmtree(folder, ignore_errors=True)
                raise
        if child.returncode:
            shutil.rmtree(folder, ignore_errors=True)
            raise CannotInstall(f"{lock.stem} could not be installed. The last lines of output:\n" + "\n".join(last))
    (folder / _MADE).touch()
