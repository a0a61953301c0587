"""`make test-onnx`: runs the suite, or says why it was not run."""

import importlib
import sys
from pathlib import Path

import pytest

WANTED = "onnx.backend.test.case.node"
"""The module of the wheel `onnx` that makes the cases."""


def main() -> int:
    """Runs the suite, and returns its exit code. A missing wheel is not a failure, so the code is then 0."""
    try:
        importlib.import_module(WANTED)
    except ImportError as error:
        print(
            f"make test-onnx: SKIPPED, NO TEST HAS RUN: the wheel onnx is not installed, or has no node tests: {error}"
        )
        return 0
    return int(pytest.main([str(Path(__file__).parent), "-m", "nodes", "-rs", "-s", *sys.argv[1:]]))


if __name__ == "__main__":
    sys.exit(main())
