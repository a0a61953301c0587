"""What the machine must have before anything can be built or started, and how to get it.

Debian packages are installed where that can be done; everything else is only named. Asking
whether something is missing changes nothing, so tests can ask whether there is a point in trying.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

GO = (1, 26)  # what CoreDNS' module wants, the newest of them
_INSTALLING = 600.0

# Program -> Debian package. All of them are started by name.
_PACKAGES = {
    "containerd": "containerd",
    "ctr": "containerd",
    "runc": "runc",
    "iptables": "iptables",
    "ip6tables": "iptables",
    "conntrack": "conntrack",
    "ip": "iproute2",
    "mount": "mount",
    "openssl": "openssl",
    "buildah": "buildah",
    "debootstrap": "debootstrap",
}
_PLUGINS = ("bridge", "host-local", "portmap", "loopback")
_PLUGIN_FOLDERS = (Path("/usr/lib/cni"), Path("/opt/cni/bin"))  # Debian's, and everyone else's
_PLUGIN_PACKAGE = "containernetworking-plugins"


class MissingError(Exception):
    """Something is not there. Says what, and how to get it."""


def plugins() -> Path | None:
    """The folder of the network plugins."""
    for folder in _PLUGIN_FOLDERS:
        if all((folder / name).exists() for name in _PLUGINS):
            return folder
    return None


def missing_packages() -> list[str]:
    """Debian packages that would bring what is not there."""
    packages = {package for program, package in _PACKAGES.items() if shutil.which(program) is None}
    if plugins() is None:
        packages.add(_PLUGIN_PACKAGE)
    return sorted(packages)


def obstacles() -> list[str]:
    """Everything that stands in the way and that this program does not change: a line each, with the way out."""
    found = []
    if sys.platform != "linux":
        return ["Linux is needed: containers are its business"]
    if os.geteuid() != 0:
        found.append("root is needed, for containers and bridges: sudo make cluster, or run it in a virtual machine")
    version = _go_version()
    if version is None:
        found.append("Go is not on PATH: install it from go.dev, or take your distribution's if it is new enough")
    elif version < GO:
        found.append(f"Go {_dotted(version)} is too old: {_dotted(GO)} or later is needed, from go.dev")
    packages = missing_packages()
    if packages and not _installs():
        found.append(f"these Debian packages, or what brings the same elsewhere, are missing: {' '.join(packages)}")
    return found


def obtain() -> None:
    """Sees to it that all is there; installs Debian packages. MissingError tells what it cannot do."""
    found = obstacles()
    if found:
        raise MissingError("The cluster cannot run here:\n" + "\n".join(f"- {line}" for line in found))
    packages = missing_packages()
    if not packages:
        return
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for argv in (
        ["apt-get", "update", "-qq"],
        ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages],
    ):
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=_INSTALLING)
        if done.returncode != 0:
            raise MissingError(f"{' '.join(argv)} failed:\n{(done.stderr or done.stdout)[-2000:]}")
    if missing_packages():
        raise MissingError(f"installed, and still not there: {' '.join(missing_packages())}")


def parse_go_version(text: str) -> tuple[int, int] | None:
    """Major and minor out of what `go version` prints."""
    match = re.search(r"\bgo(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else None


def _go_version() -> tuple[int, int] | None:
    if shutil.which("go") is None:
        return None
    done = subprocess.run(["go", "version"], capture_output=True, text=True, timeout=30.0)
    return parse_go_version(done.stdout)


def _installs() -> bool:
    return shutil.which("apt-get") is not None and Path("/etc/debian_version").exists()


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
