"""The machines on which a model server can run: what its binaries need, and what is missing here."""

import ctypes.util
import os
import platform
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

_GLIBC = (2, 35)  # of the wheel of nvidia-pytriton 0.7: manylinux_2_35
_PYTHONS = range(11, 13)  # minor versions of Python 3 that have a stub in this wheel, and NumPy 1, which it needs
_INSTEAD = "start Triton in another way, such as from NVIDIA's container image, and name it with --server"


def lacks(kind: str) -> str:
    """Returns why a server that Mesh installs cannot run on this machine, and what to do, or "" if it can."""
    check = _CHECKS.get(kind)
    return check() if check is not None else ""


def _triton() -> str:
    machine, (library, version) = platform.machine(), platform.libc_ver()
    here = f"{sys.platform} on {machine}" + (f" with {library} {version}" if library else "")
    known = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if sys.platform != "linux" or machine != "x86_64" or library != "glibc" or known < _GLIBC:
        needed = ".".join(str(part) for part in _GLIBC)
        return f"triton needs Linux on x86_64 with glibc {needed} or later, and this is {here}: {_INSTEAD}"
    minor = sys.version_info.minor
    if minor not in _PYTHONS:
        return f"triton's Python backend needs Python 3.11 or 3.12, and this is 3.{minor}: run Mesh with one of these"
    if not _has_library():
        name = sysconfig.get_config_var("INSTSONAME")
        text = f"triton's Python backend needs the shared library of Python 3.{minor}, which this Python lacks"
        return f"{text} ({name}): install it (on Debian and Ubuntu: apt-get install libpython3.{minor})"
    return ""


def _has_library() -> bool:
    name = f"libpython3.{sys.version_info.minor}.so.1.0"
    folder = sysconfig.get_config_var("LIBDIR")
    beside = folder is not None and os.path.exists(Path(folder) / name)
    return beside or ctypes.util.find_library(f"python3.{sys.version_info.minor}") is not None


_CHECKS: dict[str, Callable[[], str]] = {"triton": _triton}
