"""Runs the README as a newcomer would: `make up`, then every shell block under "Try it", then Ctrl-C.

Needs only the standard library, because it runs before anything is installed.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
INSTALL_AND_START = 1200.0  # seconds: a slow network, a slow disk
EACH = 120.0
UP = "The mesh is up"
DOWN = "everything is down"
PORT = 8033


def blocks(heading: str) -> list[str]:
    """Returns the `sh` blocks under a heading. Exits if the README has no such heading."""
    section = re.search(rf"^## {heading}$(.*?)(?=^## |\Z)", README.read_text(), re.MULTILINE | re.DOTALL)
    if section is None:
        sys.exit(f"the README has no heading {heading!r}")
    return re.findall(r"^```sh\n(.*?)^```$", section[1], re.MULTILINE | re.DOTALL)


class Up:
    """The running `make up`, whose output is passed on."""

    def __init__(self, command: str) -> None:
        print(f"$ {command}", flush=True)
        self.process = subprocess.Popen(
            command,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.up = threading.Event()
        self.down = False
        self.ended = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            print(f"  {line}", end="", flush=True)
            if UP in line:
                self.up.set()
            self.down = self.down or DOWN in line
        self.ended.set()
        self.up.set()  # nothing needs to wait for it now

    def interrupt(self) -> None:
        """Sends Ctrl-C as a terminal does: to every process in the foreground."""
        os.killpg(self.process.pid, signal.SIGINT)


def main() -> None:
    """Runs the README's commands, and exits with an error if one of them fails or the mesh does not start and stop."""
    first, second = blocks("Two commands")
    if second.strip() != "make test":
        sys.exit("the README's second command is not `make test`, which .ci/run runs")
    up = Up(first.strip())
    try:
        if not up.up.wait(INSTALL_AND_START):
            sys.exit(f"`{first.strip()}` has not printed {UP!r} within {INSTALL_AND_START:.0f} s")
        if up.ended.is_set():
            sys.exit(f"`{first.strip()}` has ended by itself")
        for block in blocks("Try it"):
            print("".join(f"$ {line}\n" for line in block.splitlines()), end="", flush=True)
            done = subprocess.run(["bash", "-euo", "pipefail", "-c", block], timeout=EACH)
            print(flush=True)
            if done.returncode != 0:
                sys.exit(f"this block of the README failed with status {done.returncode}")
        up.interrupt()
        if not up.ended.wait(EACH):
            sys.exit(f"`{first.strip()}` still runs {EACH:.0f} s after Ctrl-C")
        if not up.down:
            sys.exit(f"`{first.strip()}` has ended after Ctrl-C without printing {DOWN!r}")
    finally:
        if up.process.poll() is None:
            up.interrupt()
            up.process.wait(EACH)
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", PORT)) == 0:
            sys.exit(f"after Ctrl-C, a process still listens on port {PORT}")
    print("the README's commands work exactly as written", flush=True)


if __name__ == "__main__":
    main()
