"""Bridges, routes, iptables and kernel settings of the cluster, and their removal.

A bridge has the node's address, since not every kernel has `dummy` links. The range of services is routed to it too.
Packets to a service address that no rule maps to a pod therefore go to an empty bridge, not to the machine's network.
"""

import json
import re
import subprocess
from pathlib import Path

from deploy.cluster import layout

CHAIN = "MESH-CLUSTER"
# Chains of kubelet, kube-proxy and the portmap plugin, and the cluster's own.
_THEIRS = re.compile(rf"(^:|\s)(KUBE-|CNI-|{CHAIN}\b)|\s{layout.POD_BRIDGE}\b")
# Settings that the cluster needs, and those that kubelet and kube-proxy change. All are restored afterwards.
_SETTINGS = (
    "net/ipv4/ip_forward",
    "net/ipv4/conf/all/route_localnet",
    "net/ipv6/conf/all/forwarding",
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
)
_SYSCTL = Path("/proc/sys")


def make() -> None:
    """Creates the node's bridge and routes, and refuses pods' traffic to other networks. The plugin creates pods'
    routes."""
    if not layout.BEFORE.exists():
        values = {name: (_SYSCTL / name).read_text().strip() for name in _SETTINGS if (_SYSCTL / name).exists()}
        layout.BEFORE.write_text(json.dumps(values))
    (_SYSCTL / "net/ipv4/ip_forward").write_text("1")
    _run("ip", "link", "add", layout.NODE_BRIDGE, "type", "bridge")
    _run("ip", "address", "add", f"{layout.NODE_IP}/32", "dev", layout.NODE_BRIDGE)
    _run("ip", "link", "set", layout.NODE_BRIDGE, "up")
    _run("ip", "route", "add", layout.SERVICE_RANGE, "dev", layout.NODE_BRIDGE, "src", layout.NODE_IP)
    _run("iptables", "-w", "-N", CHAIN)
    _run("iptables", "-w", "-A", CHAIN, "-i", layout.POD_BRIDGE, "!", "-o", layout.POD_BRIDGE, "-j", "REJECT")
    _run("iptables", "-w", "-A", CHAIN, "-i", layout.POD_BRIDGE, "-j", "ACCEPT")
    _run("iptables", "-w", "-I", "FORWARD", "-j", CHAIN)


def remove() -> None:
    """Removes everything that this or an earlier run created, and restores settings."""
    for link in (layout.NODE_BRIDGE, layout.POD_BRIDGE):
        subprocess.run(["ip", "link", "delete", link], capture_output=True, timeout=10.0)
    for family in ("iptables", "ip6tables"):
        saved = subprocess.run([f"{family}-save"], capture_output=True, text=True, timeout=30.0)
        kept = without_ours(saved.stdout)
        if saved.returncode == 0 and kept != saved.stdout:
            subprocess.run(
                [f"{family}-restore", "-w"], input=kept, text=True, check=True, capture_output=True, timeout=30.0
            )
    if layout.BEFORE.exists():
        for name, value in json.loads(layout.BEFORE.read_text()).items():
            setting = _SYSCTL / name
            if setting.read_text().strip() != value:
                setting.write_text(value)
        layout.BEFORE.unlink()


def without_ours(saved: str) -> str:
    """Returns the output of `iptables-save` without the cluster's chains and rules, in the same order."""
    return "".join(line for line in saved.splitlines(keepends=True) if not _THEIRS.search(line))


def _run(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30.0)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip()}")
