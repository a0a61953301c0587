"""Foreign programs that must be compiled or fetched first: clients of a mesh, and gRPC servers behind its relay. They
are kept in `.cache/clients`.

    python -m tests.doors.clients     (`make test-clients` does it)

The machine's own tools fetch Java's libraries from Maven Central, Go's and grpcurl from the module proxy, and Node's
from npm. Without caches that takes some minutes, so `make test` does not do it: it runs the programs that exist, and
says which are missing.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_MAKING = 900.0  # seconds
_SOURCES = Path(__file__).parent / "programs"
_FOLDER = Path(__file__).resolve().parents[2] / ".cache" / "clients"
_GRPCURL = "github.com/fullstorydev/grpcurl/cmd/grpcurl@v1.9.3"


@dataclass(frozen=True, slots=True)
class Program:
    """A client or a server. `argv` is the command that runs it, to which arguments are appended."""

    name: str
    tools: tuple[str, ...]  # programs on PATH that make or run it
    argv: tuple[str, ...]
    making: Callable[[Path], None]

    @property
    def _done(self) -> Path:
        return _FOLDER / f"{self.name}.made"

    def _sum(self) -> str:
        """Returns the program's sources, by which `missing` notices that they have changed."""
        folder = _SOURCES / self.name
        texts = [path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()] if folder.exists() else []
        return "\0".join([_GRPCURL, *texts])

    def missing(self) -> str:
        """Returns the reason why the program cannot be run, with the way out, or "" if it can be run."""
        absent = [tool for tool in self.tools if shutil.which(tool) is None]
        if absent:
            return f"the programs in {self.name} need {' and '.join(absent)} on PATH"
        if self._done.exists() and self._done.read_text() == self._sum():
            return ""
        return f"the programs in {self.name} are not built: run `make test-clients`"

    def make(self) -> None:
        """Makes the program. Raises OSError or subprocess.SubprocessError if that fails."""
        folder = _FOLDER / self.name
        folder.mkdir(parents=True, exist_ok=True)
        self.making(folder)
        self._done.write_text(self._sum())


def _run(*argv: str, cwd: Path, **environment: str) -> None:
    subprocess.run(argv, check=True, timeout=_MAKING, cwd=cwd, env={**os.environ, **environment})


def _java(folder: Path) -> None:
    shutil.copy(_SOURCES / "java" / "pom.xml", folder)
    _run("mvn", "-q", "-B", "dependency:copy-dependencies", "-DoutputDirectory=lib", cwd=folder)
    sources = [str(path) for path in (_SOURCES / "java").glob("*.java")]
    _run("javac", "-cp", "lib/*", "-d", "classes", *sources, cwd=folder)


def _go(folder: Path) -> None:
    _run("go", "build", "-o", str(folder / "calls"), ".", cwd=_SOURCES / "go")
    _run("go", "build", "-o", str(folder / "server"), "./server", cwd=_SOURCES / "go")


def _grpcurl(folder: Path) -> None:
    _run("go", "install", _GRPCURL, cwd=folder, GOBIN=str(folder), GOFLAGS="-mod=mod")


def _node(folder: Path) -> None:
    for path in (_SOURCES / "node").iterdir():
        shutil.copy(path, folder)
    _run("npm", "install", "--silent", "--no-fund", "--no-audit", "--ignore-scripts", cwd=folder)


_CLASSES = f"{_FOLDER / 'java' / 'lib'}/*:{_FOLDER / 'java' / 'classes'}"
JAVA = Program("java", ("java", "javac", "mvn"), ("java", "-cp", _CLASSES, "Calls"), _java)
GO = Program("go", ("go",), (str(_FOLDER / "go" / "calls"),), _go)
GRPCURL = Program("grpcurl", ("go",), (str(_FOLDER / "grpcurl" / "grpcurl"), "-plaintext"), _grpcurl)
NODE = Program("node", ("node", "npm"), ("node", str(_FOLDER / "node" / "calls.mjs")), _node)
NODE_GRPC = Program("node", ("node", "npm"), ("node", str(_FOLDER / "node" / "grpc.mjs")), _node)
ALL = (JAVA, GO, GRPCURL, NODE)

JAVA_SERVER = Program("java", JAVA.tools, ("java", "-cp", _CLASSES, "Methods"), _java)
GO_SERVER = Program("go", GO.tools, (str(_FOLDER / "go" / "server"),), _go)
NODE_SERVER = Program("node", NODE.tools, ("node", str(_FOLDER / "node" / "server.mjs")), _node)


def main() -> None:
    """Makes all programs that can be made, and reports the others."""
    for program in ALL:
        if not (why := program.missing()):
            print(f"{program.name}: is there", flush=True)
        elif "on PATH" in why:
            print(f"SKIPPED: {why}", file=sys.stderr, flush=True)
        else:
            print(f"{program.name}: making it (a minute or more)", flush=True)
            try:
                program.make()
            except (subprocess.SubprocessError, OSError) as error:
                print(f"SKIPPED: {program.name} could not be made: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
