"""The node's containers: requests to containerd, and cleanup after pods once the kubelet has stopped.

Pods are killed rather than shut down, since tests that need an orderly end wait for it. A stopped cluster is therefore
cleaned up in the same way as one whose parts were killed.
"""

import contextlib
import os
import shutil
import signal
import subprocess
from pathlib import Path

from deploy.cluster import layout, parts

_CGROUPS = Path("/sys/fs/cgroup")
_RESULTS = Path("/var/lib/cni/results")
_DEVICES = Path("/var/lib/kubelet/device-plugins")
_OURS = (layout.RUN, layout.CONTAINERS)


def ctr(*argv: str, timeout: float = 300.0) -> str:
    """Runs a command of containerd's client, in the namespace that the kubelet uses, and returns its output. Raises
    RuntimeError if it fails."""
    done = subprocess.run(
        ["ctr", "--address", str(layout.CONTAINERD_SOCKET), "--namespace", "k8s.io", *argv],
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if done.returncode != 0:
        raise RuntimeError(f"ctr {' '.join(argv)}: {done.stderr.strip()}")
    return done.stdout


def images() -> set[str]:
    """Returns the names of the images that containerd has."""
    return set(ctr("images", "list", "--quiet").split())


def kill_pods() -> None:
    """Kills every process that runs in a pod."""
    pids: set[int] = set()
    for folder in _pod_cgroups():
        for file in folder.rglob("cgroup.procs"):
            with contextlib.suppress(OSError):
                pids |= {int(line) for line in file.read_text().split()}
    parts.end(sorted(pids), signal.SIGKILL)


def forget_pods() -> None:
    """Removes all pods from containerd, which then starts without pods the next time. Images stay."""
    for name in ctr("tasks", "list", "--quiet").split():
        with contextlib.suppress(RuntimeError):  # it has ended and was removed
            ctr("tasks", "delete", "--force", name)
    for name in ctr("containers", "list", "--quiet").split():
        ctr("containers", "delete", name)


def clean() -> None:
    """Removes what pods leave on the machine: mounts, network namespaces, cgroups, links to logs."""
    unmount(*_OURS)
    for network in Path("/run/netns").glob("cni-*"):
        subprocess.run(["ip", "netns", "delete", network.name], capture_output=True, timeout=30.0)
    for folder in _pod_cgroups():
        for inner, _, _ in os.walk(folder, topdown=False):
            with contextlib.suppress(OSError):  # busy: its processes are ending
                os.rmdir(inner)
    for link in Path("/var/log/containers").glob("*.log"):
        if link.is_symlink() and link.readlink().is_relative_to(layout.RUN):
            link.unlink()
    for note in _RESULTS.glob("mesh-pods-*"):  # the plugins' records of each pod's address and loopback
        pod = note.name.removeprefix("mesh-pods-").rpartition("-")[0]
        for other in (note, _RESULTS / f"cni-loopback-{pod}-lo"):
            other.unlink(missing_ok=True)
    for folder in (_DEVICES, _DEVICES.parent):  # the kubelet's only folder that cannot be configured
        with contextlib.suppress(OSError):  # in use by something else
            (folder / "kubelet.sock").unlink(missing_ok=True)
            folder.rmdir()
    shutil.rmtree(layout.RUN, ignore_errors=True)


def unmount(*folders: Path) -> None:
    """Unmounts all file systems that are mounted below these folders. Does not fail if one is still in use."""
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for point in reversed(mounts):  # the innermost first
        if any(Path(point).is_relative_to(folder) for folder in folders):
            subprocess.run(["umount", "--lazy", point], capture_output=True, timeout=30.0)


def _pod_cgroups() -> list[Path]:
    """Returns the kubelet's cgroup folders: one for each controller in version 1, a single one in version 2."""
    return [folder for folder in (*_CGROUPS.glob("*/kubepods"), _CGROUPS / "kubepods") if folder.is_dir()]
