"""The limit on open files."""

import subprocess
import sys

SCRIPT = """
import resource
from mesh.host import openfiles
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
print(openfiles.raise_limit() == hard, resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard))
"""


def test_a_process_raises_its_limit_to_the_hard_one():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]
