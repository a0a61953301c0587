"""Requirements of the machine for building and starting the cluster, and how to meet them.

Missing Debian packages are installed if possible. Other missing requirements are only reported. Checking changes
nothing, so tests can check to decide whether to run.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

GO = (1, 26)  # required by CoreDNS' module, the most recent of the versions
_INSTALLING = 600.0

# Program -> Debian package. All are started by name.
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
_PLUGIN_FOLDERS = (Path("/usr/lib/cni"), Path("/opt/cni/bin"))  # the folders of Debian, and of all others
_PLUGIN_PACKAGE = "containernetworking-plugins"


class MissingError(Exception):
    """A missing requirement. The text names it and says how to get it."""


def plugins() -> Path | None:
    """Returns the folder of the network plugins, or None if no folder has all of them."""
    for folder in _PLUGIN_FOLDERS:
        if all((folder / name).exists() for name in _PLUGINS):
            return folder
    return None


def missing_packages() -> list[str]:
    """Returns the Debian packages that would provide the missing programs."""
    packages = {package for program, package in _PACKAGES.items() if shutil.which(program) is None}
    if plugins() is None:
        packages.add(_PLUGIN_PACKAGE)
    return sorted(packages)


def obstacles() -> list[str]:
    """Returns all obstacles that this program cannot remove, each as a line that says what to do."""
    found = []
    if sys.platform != "linux":
        return ["Linux is needed for containers"]
    if os.geteuid() != 0:
        found.append("root is needed, for containers and bridges: sudo make cluster, or run it in a virtual machine")
    if (without := _without_go()) is not None:
        found.append(without)
    packages = missing_packages()
    if packages and not _installs():
        found.append(f"these Debian packages, or their equivalents, are missing: {' '.join(packages)}")
    return found


def obtain() -> None:
    """Installs missing Debian packages. Raises MissingError if a requirement cannot be met."""
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
        raise MissingError(
            f"apt-get succeeded, but programs of these packages are not on PATH: {' '.join(missing_packages())}"
        )


def parse_go_version(text: str) -> tuple[int, int] | None:
    """Returns the major and minor version from the output of `go version`, or None if it has none."""
    match = re.search(r"\bgo(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else None


def _without_go() -> str | None:
    """Returns why this machine has no usable Go, with what to do, or None if it has one."""
    needed = f"{_dotted(GO)} or later"
    if shutil.which("go") is None:
        return f"Go is not on PATH: install {needed}, from go.dev or from your distribution"
    try:
        done = subprocess.run(["go", "version"], capture_output=True, text=True, timeout=30.0)
    except (OSError, subprocess.SubprocessError) as error:
        return f"the version of Go is unknown: {error}. Install {needed}, from go.dev"
    version = parse_go_version(done.stdout)
    if version is None:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1][:200]
        return f"the version of Go is unknown: `go version` ended with {done.returncode} and said: {said}"
    if version < GO:
        return f"Go {_dotted(version)} is too old: {needed} is needed, from go.dev"
    return None


def _installs() -> bool:
    return shutil.which("apt-get") is not None and Path("/etc/debian_version").exists()


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
