"""Programs that run in a server's environment, which has the libraries that train its models."""

import subprocess
from pathlib import Path

from mesh.modelservers import environments


def run_there(environment: Path, program: str, *arguments: str) -> None:
    """Runs a program of this folder in a server's environment."""
    argv = [str(environments.python_of(environment)), "-I", str(Path(__file__).with_name(program)), *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr
