"""A run without the wheel `onnx`, in which the suite is skipped and says so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["tests.nodes"], "SKIPPED, NO TEST HAS RUN: the wheel onnx is not installed"),
        (["pytest", "-m", "nodes", "-rs", "tests/nodes"], "the wheel onnx is not installed"),
    ],
    ids=["make test-onnx", "pytest"],
)
def test_the_suite_is_skipped_loudly(tmp_path, argv, says):
    (tmp_path / "onnx.py").write_text("raise ImportError('there is none')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", *argv],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": path},
    )
    assert says in done.stdout
    assert "Error" not in done.stdout + done.stderr
    assert argv[0] == "pytest" or done.returncode == 0
