"""Runs of programs in a server's environment, which has the libraries that train the server's models."""

import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from mesh.modelservers import environments

_CACHE = Path(__file__).resolve().parents[2] / ".cache" / "servers"


def run_there(environment: Path, program: str, *arguments: str) -> None:
    """Runs a program of this folder in a server's environment."""
    argv = [str(environments.python_of(environment)), "-I", str(Path(__file__).with_name(program)), *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr


def bank(environment: Path, types: Sequence[str], count: int) -> Path:
    """Returns the folder of a bank of `count` trained models of each type, which `bank_app.py` makes once."""
    program = Path(__file__).with_name("bank_app.py")
    made_from = [environment.name, *types, str(count), program.read_text()]
    digest = hashlib.sha256("\n".join(made_from).encode()).hexdigest()[:12]
    folder = _CACHE / digest / "bank"
    if not (folder / "answers.json").exists():  # written last
        shutil.rmtree(_CACHE, ignore_errors=True)
        run_there(environment, program.name, str(folder), ",".join(types), str(count))
    return folder
