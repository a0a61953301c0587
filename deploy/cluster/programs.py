"""The Go programs of the cluster. They are built once into `.cache/cluster/bin`, and again when their sources change.

Each folder below `programs/` is a module with its own go.mod: Kubernetes, CoreDNS and etcd need different versions of
the same libraries. On two idle cores the first build takes about 12 minutes, most of it for Kubernetes. Go caches its
results, so building for another tree on the same machine takes seconds.
"""

import collections
import hashlib
import os
import subprocess
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from deploy.cluster import layout
from deploy.cluster.progress import Steps

_BUILDING = 3600.0
_SMALL = "-s -w"  # without symbol tables: two thirds of the size


@dataclass(frozen=True, slots=True)
class Program:
    """One program and its source."""

    name: str
    source: str  # a folder below programs/, with the package inside it; or a package with its version
    flags: str = _SMALL  # for the linker

    @property
    def path(self) -> Path:
        """The path of the executable."""
        return layout.BIN / self.name

    @property
    def stamp(self) -> Path:
        """The file that records the sources of the built executable."""
        return layout.BIN / f".{self.name}"

    @property
    def module(self) -> Path | None:
        """The module's folder, or None for a package that is built as published."""
        return None if "@" in self.source else layout.SOURCES / "programs" / self.source.split("/")[0]

    def command(self) -> list[str]:
        """Returns the command that builds the program in the module's folder."""
        if self.module is None:
            return ["go", "install", "-trimpath", f"-ldflags={self.flags}", self.source]
        package = "./" + "/".join(self.source.split("/")[1:])
        return ["go", "build", "-trimpath", f"-ldflags={self.flags}", "-o", str(self.path), package]

    def sum(self) -> str:
        """Returns a checksum of the command that builds the program, and of the files of its module if the module is in
        this tree."""
        return checksum(self.command(), sorted(self.module.rglob("*")) if self.module else [])

    def is_built(self) -> bool:
        """Returns whether the program was built from these sources."""
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
    """Returns a short checksum of words and of files' contents."""
    total = hashlib.sha256()
    for word in words:
        total.update(word.encode() + b"\0")
    for path in files:
        if path.is_file():
            total.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()[:16]


def unbuilt() -> list[Program]:
    """Returns the programs that are missing or outdated."""
    return [program for program in ALL if not program.is_built()]


def build(steps: Steps) -> None:
    """Builds missing and outdated programs, each in a step."""
    layout.BIN.mkdir(parents=True, exist_ok=True)
    for program in unbuilt():
        with steps.step(f"building {program.name}") as tell:
            _go(program.command(), program.module or layout.BIN, tell)
        program.stamp.write_text(program.sum())
    kubectl = layout.BIN / "kubectl"  # the program's behaviour depends on its name
    kubectl.unlink(missing_ok=True)
    kubectl.symlink_to("kube")


def _go(argv: list[str], folder: Path, tell: Callable[[str], None]) -> None:
    """Runs Go, and reports how many packages it has compiled. Raises RuntimeError with the end of Go's output if it
    fails."""
    environment = {**os.environ, "CGO_ENABLED": "0", "GOBIN": str(layout.BIN)}
    environment["GOFLAGS"] = f"{os.environ.get('GOFLAGS', '')} -v".strip()  # names each package on standard error
    with subprocess.Popen(
        argv, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stderr is not None
        ending = threading.Timer(_BUILDING, child.kill)
        ending.start()
        try:
            said, downloads, packages = collections.deque[str](maxlen=30), 0, 0
            for line in child.stderr:
                said.append(line.rstrip())
                if line.startswith("go: downloading"):
                    downloads += 1
                    tell(f"{downloads} modules downloaded")
                elif " " not in line.strip():
                    packages += 1
                    tell(f"{packages} packages compiled")
        finally:
            ending.cancel()
    if child.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)}:\n" + "\n".join(said))
