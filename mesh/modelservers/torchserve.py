"""The TorchServe of this machine, which Mesh can start but does not install.

PyPI has no build of torch for CPUs on Linux, and the one for CUDA takes several GB. So users install TorchServe
themselves: Mesh takes the program `torchserve` on PATH, or the one that `MESH_TORCHSERVE` names. The program's
first lines name the Python that has the packages `ts` and `torch`. TorchServe itself is written in Java.
"""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "MESH_TORCHSERVE"
OLDEST_JAVA = 11
_PROGRAM = "torchserve"
_ANSWER = 20.0  # seconds for `java -version` and for Python
_VERSION = re.compile(r'version "(?:1\.)?(\d+)')
_INTERPRETER = re.compile(r"""^(?:#!\s*|'''exec'\s+)"?([^"\s]*python[^"\s]*)"?""")
_DOC = "docs/torchserve.md says how to install it"


class NotFound(ValueError):
    """A TorchServe that cannot be started here. The text says what is missing."""


@dataclass(frozen=True, slots=True)
class Found:
    """A TorchServe on this machine."""

    python: Path
    java: Path


def find() -> Found:
    """Returns this machine's TorchServe. Runs `java -version`. Raises NotFound."""
    program = os.environ.get(VARIABLE) or shutil.which(_PROGRAM)
    if not program:
        raise NotFound(f"there is no {_PROGRAM} on PATH: install it, or name it in {VARIABLE} ({_DOC})")
    return Found(_python(Path(program)), _java())


def missing() -> str:
    """Returns why TorchServe cannot be started here, or "" if it can. Runs Java and TorchServe's Python to find out."""
    try:
        found = find()
        _check_packages(found.python)
    except NotFound as error:
        return str(error)
    return ""


def _python(program: Path) -> Path:
    """Returns the interpreter of a program that pip has installed. Raises NotFound."""
    try:
        with program.open("rb") as file:
            lines = file.read(1024).decode(errors="replace").splitlines()[:2]
    except OSError as error:
        raise NotFound(f"{program} cannot be read ({error.strerror}): name another {_PROGRAM} in {VARIABLE}") from error
    for line in lines:
        if (found := _INTERPRETER.match(line)) is not None and Path(found[1]).is_file():
            return Path(found[1])
    raise NotFound(f"{program} does not name its Python in its first line: name another {_PROGRAM} in {VARIABLE}")


def _java() -> Path:
    """Returns the Java of JAVA_HOME, or else the one on PATH. Raises NotFound."""
    home = os.environ.get("JAVA_HOME")
    program = shutil.which("java", path=os.path.join(home, "bin") if home else None)
    needed = f"TorchServe needs Java {OLDEST_JAVA} or later"
    if program is None:
        where = f"JAVA_HOME ({home}) has none" if home else "there is none on PATH"
        raise NotFound(f"{needed}, and {where}: install one, such as Debian's openjdk-17-jre-headless")
    said = _run([program, "-version"])
    found = _VERSION.search(said)
    if found is None or int(found[1]) < OLDEST_JAVA:
        version = f"is version {found[1]}" if found else "does not print its version"
        raise NotFound(f"{needed}, and {program} {version}: install one, or set JAVA_HOME")
    return Path(program)


def _check_packages(python: Path) -> None:
    """Raises NotFound if a Python lacks what TorchServe's processes import."""
    names = ("ts", "torch", "yaml", "packaging", "PIL", "psutil")
    program = f"import importlib.util as u; print(*(n for n in {names!r} if u.find_spec(n) is None), sep=', ')"
    lacking = _run([str(python), "-I", "-c", program]).strip()
    if lacking:
        raise NotFound(f"{python} lacks what TorchServe needs: {lacking[-500:]} ({_DOC})")


def _run(argv: list[str]) -> str:
    """Returns what a command prints on both outputs. Raises NotFound."""
    try:
        return subprocess.run(
            argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=_ANSWER, check=False
        ).stdout
    except OSError as error:
        raise NotFound(f"{argv[0]} cannot be run: {error.strerror or error}") from error
    except subprocess.TimeoutExpired as error:
        raise NotFound(f"{argv[0]} did not end within {_ANSWER:g} s") from error
