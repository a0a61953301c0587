"""The Go programs of the cluster: built once, kept in `.cache/cluster/bin`, built again when their sources change.

Each folder below `programs/` is a module with its own go.mod: Kubernetes, CoreDNS and etcd want different versions of
the same libraries. On two cores the first build takes about 12 minutes, most of them Kubernetes'; Go keeps what it
compiled, so that another tree on the same machine takes seconds.
"""

import hashlib
import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from deploy.cluster import layout

_BUILDING = 3600.0
_SMALL = "-s -w"  # without symbol tables: two thirds of the size


@dataclass(frozen=True, slots=True)
class Program:
    """One program and where it is built from."""

    name: str
    source: str  # a folder below programs/, with the package inside it; or a package with its version
    flags: str = _SMALL  # for the linker

    @property
    def path(self) -> Path:
        """What is run."""
        return layout.BIN / self.name

    @property
    def stamp(self) -> Path:
        """Says what it was built from."""
        return layout.BIN / f".{self.name}"

    @property
    def module(self) -> Path | None:
        """Its module's folder; None for a package that is built as it is published."""
        return None if "@" in self.source else layout.SOURCES / "programs" / self.source.split("/")[0]

    def command(self) -> list[str]:
        """What builds it, in the module's folder."""
        if self.module is None:
            return ["go", "install", "-trimpath", f"-ldflags={self.flags}", self.source]
        package = "./" + "/".join(self.source.split("/")[1:])
        return ["go", "build", "-trimpath", f"-ldflags={self.flags}", "-o", str(self.path), package]

    def sum(self) -> str:
        """Of all it is made from, that this tree decides."""
        return checksum(self.command(), sorted(self.module.rglob("*")) if self.module else [])

    def is_built(self) -> bool:
        """Whether it is there, and of these sources."""
        return self.path.exists() and self.stamp.exists() and self.stamp.read_text() == self.sum()


def _kubernetes_flags() -> str:
    package = "k8s.io/component-base/version"
    major, minor, _ = layout.KUBERNETES.removeprefix("v").split(".")
    values = {"gitVersion": layout.KUBERNETES, "gitMajor": major, "gitMinor": minor}
    return " ".join([_SMALL, *(f"-X {package}.{name}={value}" for name, value in values.items())])


ALL = (
    Program("pause", "pause"),
    Program("etcd", "etcd/server"),
    Program("etcdctl", "etcd/ctl"),
    Program("etcdutl", "etcd/utl"),
    Program("coredns", "dns"),
    Program("helm", f"helm.sh/helm/v3/cmd/helm@{layout.HELM}"),
    Program("kube", "kube", _kubernetes_flags()),
)


def checksum(words: Iterable[str], files: Iterable[Path]) -> str:
    """A short sum of words and of what stands in files."""
    total = hashlib.sha256()
    for word in words:
        total.update(word.encode() + b"\0")
    for path in files:
        if path.is_file():
            total.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()[:16]


def build() -> None:
    """Builds what is not there or not of these sources."""
    layout.BIN.mkdir(parents=True, exist_ok=True)
    for program in ALL:
        if program.is_built():
            continue
        print(f"building {program.name} (minutes, the first time)", flush=True)
        environment = {**os.environ, "CGO_ENABLED": "0", "GOBIN": str(layout.BIN)}
        subprocess.run(
            program.command(), cwd=program.module or layout.BIN, env=environment, check=True, timeout=_BUILDING
        )
        program.stamp.write_text(program.sum())
    kubectl = layout.BIN / "kubectl"  # the program looks at its own name
    kubectl.unlink(missing_ok=True)
    kubectl.symlink_to("kube")
