"""The etcd of a mesh on one machine: finding the program, its command line, and a check of its version.

This etcd has one member, on loopback, and no administrator. It is started with automatic compaction, because its
history grows with every change of a pod's presence, and with a quota, because a full disk would end it. `mesh up` and
the tests start and supervise the process; they share this command line.
"""

import os
import re
import subprocess

from mesh.process import find_binary

RETENTION = "10m"
"""The time for which history is kept. A watch that was interrupted for longer reads everything again, which is
cheap."""

QUOTA_BYTES = 4 * 2**30
"""Quota of the database: enough for a million records of 1 KB, each rewritten once within the retention. etcd advises
at most 8 GiB."""


class NoEtcd(Exception):
    """An etcd that is missing or does not run. The text says what to do."""


def find() -> str:
    """Returns the path of the etcd to run. Raises NoEtcd."""
    try:
        return find_binary("etcd")
    except FileNotFoundError as error:
        raise NoEtcd(str(error)) from error


def version(binary: str) -> str:
    """Runs the binary and returns the version that it prints, or "unknown" if it prints none. Raises NoEtcd."""
    try:
        done = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        if isinstance(error, OSError):
            why = error.strerror or str(error)
        elif isinstance(error, subprocess.CalledProcessError):
            why = f"it ended with status {error.returncode}"
        else:
            why = "it did not end within 10 s"
        raise NoEtcd(
            f"`{binary} --version` failed ({why}): install etcd again, or put another first on PATH"
        ) from error
    match = re.search(r"etcd Version:\s*(\S+)", done.stdout)
    return match[1] if match else "unknown"


def etcd_argv(
    binary: str, data_dir: str | os.PathLike[str], client_port: int, peer_port: int, name: str = "mesh"
) -> list[str]:
    """Returns the command line of a single member on loopback, which logs warnings and worse as JSON to stderr."""
    client, peer = f"http://127.0.0.1:{client_port}", f"http://127.0.0.1:{peer_port}"
    return [
        binary,
        f"--name={name}",
        f"--data-dir={os.fspath(data_dir)}",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster={name}={peer}",
        # A single member has no others to wait for: up in 0.1 s instead of 0.5, after a crash in 0.3 instead of 1.6.
        "--heartbeat-interval=20",
        "--election-timeout=200",
        "--auto-compaction-mode=periodic",
        f"--auto-compaction-retention={RETENTION}",
        f"--quota-backend-bytes={QUOTA_BYTES}",
        "--logger=zap",
        "--log-outputs=stderr",
        "--log-level=warn",
    ]


def version_warning(version: str) -> str:
    """Returns the reason why this version of etcd is not for production, or "".

    3.5.0 to 3.5.2 can leave a member's data inconsistent after a crash under load (etcd-io/etcd#13766).
    """
    match = re.match(r"3\.5\.(\d+)(?!\d)", version)
    if match and int(match[1]) <= 2:
        return (
            f"etcd {version} has a known data corruption bug: use it for trials only, and put a current etcd on "
            "PATH for anything else"
        )
    return ""
