"""`make test-onnx`: runs the suite, or reports that it was not run and why."""

import importlib
import sys
from pathlib import Path

import pytest

WANTED = "onnx.backend.test.case.node"
"""The module of the wheel `onnx` that makes the cases."""


def main() -> int:
    """Returns the exit code, which is 0 even if the wheel is missing, because nothing is wrong then."""
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
