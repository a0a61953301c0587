"""The commands of the docs exactly as written, and a shell that runs them.

The commands are the lines with a prompt in fenced `console` blocks, and all lines of `sh` blocks, found by page and
heading. A test replaces the placeholders of the examples, such as an endpoint or a file. The table `RUN_BY` says which
test runs which block, and what else the test omits or changes. Another test compares the table with the pages, so every
command added to a page must be run by a test. (`.ci/readme.py` does the same for the README.)
"""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mesh.process import tethered

DOCS = Path(__file__).parents[2] / "docs"


@dataclass(frozen=True, slots=True)
class By:
    test: str  # the file
    but: str = ""  # what the test omits or changes, and why


LOCAL = "tests/system/test_documented.py"
CHANGING = "tests/system/test_changing_models.py"
ACCESS = "tests/system/test_access.py"
SIZING = "tests/cli/test_docs_sizing.py"
INSTALL = "tests/cluster/test_install.py"
THREE = "tests/cluster/test_three_etcd.py"

RUN_BY = {
    ("admin.md", "Administration"): By(
        LOCAL, but="only what follows `kubectl exec ... --`, with a router's environment"
    ),
    ("admin.md", "When a pod is cut off"): By(LOCAL, but="no pod is cut off; tests/chaos cuts some off"),
    ("admin.md", "Doctor"): By(LOCAL, but="--namespace needs a cluster; tests/doctor has a fake kubectl"),
    ("admin.md", "Back up and restore"): By(LOCAL),
    ("admin.md", "Snapshots of etcd"): By(LOCAL),
    ("admin.md", "Contexts"): By(LOCAL),
    ("changing-models.md", "A new version"): By(CHANGING),
    ("changing-models.md", "Roll back"): By(CHANGING),
    ("changing-models.md", "Try a version on a tenth of the calls"): By(CHANGING),
    ("changing-models.md", "Compare a version as a shadow"): By(CHANGING),
    ("changing-models.md", "When a move is stuck"): By(CHANGING, but="the move is to a file that is no model"),
    ("changing-models.md", "Delete an alias"): By(CHANGING),
    ("gpu.md", "Two memories"): By(LOCAL, but="the pods that it shows have no GPU; tests/gpu has one"),
    ("gpu.md", "Which models run on GPUs"): By(LOCAL),
    ("admin.md", "A prefix in an etcd that others use"): By(LOCAL),
    ("kubernetes.md", "On this machine, without a registry"): By(
        "tests/cluster/test_trial.py", but="cluster and image exist already, and the namespace is the test's"
    ),
    ("kubernetes.md", "A user of etcd for each mesh"): By("tests/system/test_etcd_secret.py"),
    ("kubernetes.md", "Secrets"): By("tests/cluster/test_authority.py"),
    ("kubernetes.md", "Install with Helm"): By(INSTALL, but="with values for a node of a few CPUs"),
    ("kubernetes.md", "Install with kustomize"): By("tests/cluster/test_kustomize.py"),
    ("kubernetes.md", "Who may do what"): By("tests/cluster/test_auth.py"),
    ("kubernetes.md", "Scale"): By(INSTALL, but="other numbers: the node has room for no more"),
    ("kubernetes.md", "Monitor"): By(INSTALL, but="the Prometheus operator's kinds exist, but no operator runs"),
    ("kubernetes.md", "Upgrade"): By(INSTALL),
    ("kubernetes.md", "Back up"): By(THREE),
    ("kubernetes.md", "Restore from a snapshot"): By(THREE),
    ("kubernetes.md", "Uninstall"): By(INSTALL, but="what stays in an external etcd: tests/cluster/test_one_etcd.py"),
    ("placement.md", "How many copies"): By(LOCAL),
    ("placement.md", "Where a type may run"): By(LOCAL),
    ("placement.md", "Trying it without a mesh"): By(LOCAL, but="a tenth of the requests"),
    ("security.md", "Switch it on"): By(ACCESS, but="a mesh that runs already stands in for `mesh up`"),
    ("security.md", "Keys"): By(ACCESS),
    ("security.md", "Tokens of an identity provider"): By(ACCESS, but="the router runs already, with other URLs"),
    ("security.md", "Kubernetes service accounts"): By(
        ACCESS, but="against a fake API server, which makes the token without kubectl"
    ),
    ("security.md", "Grants"): By(ACCESS),
    ("security.md", "The first key without a router"): By(ACCESS),
    ("sizing.md", "How much memory"): By(SIZING, but="a tenth of requests and models"),
    ("storage.md", "Paths"): By(LOCAL, but="models on the hub are only registered: no test uses the internet"),
    ("storage.md", "Keys"): By(LOCAL),
    ("storage.md", "Checksums"): By(LOCAL),
    ("tls.md", "For clients"): By(LOCAL),
    ("tls.md", "Inside the mesh"): By(LOCAL, but="with a router's and a pod's options in place of `...`"),
}
"""The test of each block, by page and heading."""


@dataclass(frozen=True, slots=True)
class Command:
    page: str
    heading: str
    text: str  # the command as in the page, with continued lines joined

    def put(self, words: Mapping[str, str]) -> str:
        """Returns the text with the placeholders in `words` replaced. If several match at a place, the longest is
        replaced."""
        pattern = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
        return re.sub(pattern, lambda found: words[found[0]], self.text) if words else self.text


def commands(page: str) -> list[Command]:
    """Returns all commands of a page, in order."""
    found, heading, fence, block = [], "", "", list[str]()
    for line in (DOCS / page).read_text().splitlines():
        if fence:
            if line == "```":
                if fence != "other":
                    found += [Command(page, heading, text) for text in _split(fence, block)]
                fence, block = "", []
            else:
                block.append(line)
        elif line.startswith("#"):
            heading = line.lstrip("# ")
        elif line in ("```console", "```sh"):
            fence = line.removeprefix("```")
        elif line.startswith("```"):
            fence = "other"
    return found


def block(page: str, heading: str) -> list[Command]:
    """Returns the commands below one heading, at least one."""
    found = [command for command in commands(page) if command.heading == heading]
    assert found, f"{page} has no commands below {heading!r}"
    return found


def _split(fence: str, block: list[str]) -> list[str]:
    """Returns the commands of one block. In a `console` block only lines with a prompt are commands; the others are
    output."""
    if fence == "sh" and any("<<" in line for line in block):
        return ["\n".join(block)]
    found, quoted, going_on = list[str](), False, False
    for line in block:
        if quoted or going_on:
            found[-1] += f"\n{line}" if quoted else line.lstrip()
        elif line.startswith("$ ") or (fence == "sh" and line):
            found.append(line.removeprefix("$ "))
        else:
            continue
        quoted, going_on = found[-1].count("'") % 2 == 1, line.endswith("\\")
        found[-1] = found[-1].removesuffix("\\")
    return found


class Shell:
    """Bash in a given folder, with the programs of this environment and without the caller's settings for other meshes
    and clusters."""

    def __init__(self, folder: Path, **environment: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("MESH_", "KUBE"))}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = {**kept, "PATH": path, "HOME": str(folder), "XDG_CONFIG_HOME": str(folder / "config")}
        self.environment |= environment

    def run(self, text: str, *, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Runs a command. Variables that it exports stay set for the next command, as in a reader's terminal."""
        mark = "--environment--"
        script = f"set -e\n{text}\nprintf '%s\\0' '{mark}'\nenv -0"
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        said, _, environment = done.stdout.partition(f"{mark}\0")
        if environment:
            pairs = (entry.partition("=") for entry in environment.split("\0") if entry)
            self.environment = {name: value for name, _, value in pairs}
        return subprocess.CompletedProcess(done.args, done.returncode, said, done.stderr)

    @contextlib.contextmanager
    def running(self, text: str, **environment: str) -> Iterator[Callable[[], str]]:
        """Runs a command as long as the block lasts. Yields a function that returns what the command has printed so
        far, and that fails if the command has ended."""
        log = self.folder / f"{len(list(self.folder.glob('*.log')))}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                tethered(["bash", "-c", f"exec {text}"]),
                cwd=self.folder,
                env=self.environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

        def said() -> str:
            printed = log.read_text(errors="replace")
            assert process.poll() is None, f"{text} has ended with {process.returncode}:\n{printed}"
            return printed

        try:
            yield said
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise
