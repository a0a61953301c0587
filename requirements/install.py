"""Installs a lock file with pip, and shows how many of its packages have been fetched.

    python requirements/install.py LOCK PIP_COMMAND...

Runs before anything is installed, so it uses the standard library only. On a terminal the count is one line that
changes; elsewhere, each 25th package is a line. pip's own output is shown only if pip fails.
"""

import re
import subprocess
import sys
from collections import deque
from pathlib import Path

_PACKAGE = re.compile(r"^([A-Za-z0-9._-]+)==", re.M)
_FETCHED = ("Collecting ", "Requirement already satisfied: ")
_EACH = 25  # packages between two lines of a log
_KEPT = 30  # lines of pip's output to show after a failure


def main(lock: Path, command: list[str]) -> int:
    """Runs pip, and returns its exit status."""
    total = len(set(_PACKAGE.findall(lock.read_text())))
    argv = [*command, "--progress-bar=off", "--require-hashes", "--requirement", str(lock)]
    last: deque[str] = deque(maxlen=_KEPT)
    done = 0
    live = sys.stdout.isatty()
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
        assert pip.stdout is not None
        for line in pip.stdout:
            last.append(line.rstrip())
            if line.startswith(_FETCHED):
                done += 1
                if live:
                    print(f"\r  {min(done, total)} of {total} packages", end="", flush=True)
                elif done % _EACH == 0:
                    print(f"  {done} of {total} packages", flush=True)
            elif line.startswith("Installing collected packages"):
                print("\r" * live + "  all packages fetched, unpacking them", flush=True)
    if pip.returncode:
        print("\n".join(last), file=sys.stderr)
    return pip.returncode


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
    except KeyboardInterrupt:
        sys.exit(130)
