"""A separate environment for each peer, which pip makes once, by hash, from the peer's lock in requirements/.

They are in `.cache/peers` and take 0.5 GB each. A changed lock leads to a new environment. If one cannot be made, the
benchmark says so and continues without that peer.
"""

import hashlib
import re
import shutil
import subprocess
import sys
from collections import deque
from pathlib import Path

from rich.progress import Progress

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / ".cache" / "peers"
_NAME = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==", re.MULTILINE)


class CannotMake(Exception):
    """The failure to make an environment. The text says why."""


def lock_of(peer: str) -> Path:
    """Returns the path of a peer's lock."""
    return ROOT / "requirements" / f"peer-{peer}.txt"


def environment(peer: str, progress: Progress) -> Path:
    """Returns the folder of a peer's environment, and makes it if it does not exist. Raises CannotMake."""
    lock = lock_of(peer)
    text = lock.read_text()
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    folder = FOLDER / f"{peer}-{version}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    made = folder / "made"
    if made.exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    for former in FOLDER.glob(f"{peer}-{version}-*"):
        shutil.rmtree(former, ignore_errors=True)
    total = len(set(_NAME.findall(text)))
    task = progress.add_task(f"environment of {peer} (once; a minute or two)", total=total + 10)
    if not progress.console.is_terminal:
        progress.console.print(f"making the environment of {peer}, once: {total} packages, a minute or two")
    last: deque[str] = deque(maxlen=8)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(folder / "bin" / "python")]
    for argv in (
        [sys.executable, "-m", "venv", "--without-pip", str(folder)],
        [*pip, "install", "--no-input", "--progress-bar=off", "--require-hashes", "--requirement", str(lock)],
    ):
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
            assert child.stdout is not None
            for line in child.stdout:
                last.append(line.rstrip())
                if line.startswith("Collecting "):
                    progress.advance(task)
        if child.returncode:
            progress.remove_task(task)
            shutil.rmtree(folder, ignore_errors=True)
            raise CannotMake(f"{lock.name} could not be installed:\n" + "\n".join(last))
    made.touch()
    progress.remove_task(task)
    return folder
