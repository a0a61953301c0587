"""What processes pay for at their start, which pods do while callers wait for them."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module", ["mesh.runtime.__main__", "mesh.runtime.server.process", "router.pod", "router.worker"]
)
def test_what_only_logs_does_not_import_rich(module: str) -> None:
    """The command line draws tables with it; here it would cost a tenth of the start, and 4.7 MB."""
    program = f"import sys, {module}; sys.exit('imported' if 'rich' in sys.modules else 0)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
