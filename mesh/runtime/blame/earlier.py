"""What an earlier life of this same pod has left behind: who was at work when all of it was killed at once.

A container that takes too much memory is killed whole on most nodes of Kubernetes (`memory.oom.group`): the agent goes
with its model server and can write nothing down. The use board outlives both, since a pod's /tmp outlives its
containers. So whoever is started next reads it, and writes into the models' records what the former one could not.

Whoever kills a pod by hand leaves the same behind, so nobody is blamed where memory was left at the last looks
(`lastlooks`).

The board knows a model by its record's create revision alone, which finds the record again. It is read only where it is
of the same pod and registry, and of this run of the machine: power that fails is no model's fault. An agent that leaves
in order has no suspects: it disowns the folder first. Nor has one that was stopped from outside and replaced for that
(`mesh up` says so), whatever its models were doing.
"""

import os
from pathlib import Path

from mesh import process
from mesh.etcd import Etcd, EtcdError
from mesh.etcd.ranges import after_prefix
from mesh.runtime.blame import lastlooks
from mesh.runtime.blame.history import History
from mesh.runtime.blame.suspects import working
from mesh.runtime.sharedmemory.board import Board
from mesh.schema.keys import Keys
from mesh.telemetry import logs
from placement.suspects import Cause, suspects

log = logs.get(__name__)

BOARD = "board"
"""The name of its file in the run directory."""


def owner(*, base: str, pod: str, boot: Path = Path("/proc/sys/kernel/random/boot_id")) -> str:
    """What tells lives of one pod from all others. Empty, as nobody's, where the run of the machine is not known."""
    try:
        return f"{boot.read_text().strip()} {base} {pod}"
    except OSError:
        return ""


class Earlier:
    """`read` the folders of former lives, then `accuse` once."""

    def __init__(self, pod: str) -> None:
        self._pod = pod
        self.suspects: dict[int, str] = {}  # create revision of the model's record -> what it was at

    def read(self, folder: Path) -> None:
        """Notes who was at work. A board that cannot be read says nothing."""
        if os.environ.get(process.STOPPED_BEFORE):
            return
        try:
            board = Board.open(folder / BOARD)
        except (OSError, ValueError):
            return
        if not lastlooks.exhausted(folder):
            log.info("a former life of this pod was killed with memory to spare: no model is blamed")
            board.close()
            return
        work = working((use.revision, use) for _, use in board.suspects())
        self.suspects |= {one.model: one.doing.value for one in suspects(Cause.MEMORY, work)}
        board.close()

    async def accuse(self, etcd: Etcd, keys: Keys, history: History) -> None:
        """Has it written into the models' records, those that are still there. Never raises: the pod starts anyway."""
        for revision, doing in self.suspects.items():
            try:
                prefix = keys.registry
                page = await etcd.page(prefix, after_prefix(prefix), limit=1, created=revision, keys_only=True)
            except EtcdError as error:
                log.warning("who was at work when this pod was killed is not written down", error=error.detail)
                return
            for kv in page.kvs:
                model = keys.model_of(kv.key)
                log.warning("suspect of an earlier life of this pod", model=model, doing=doing)
                text = f"the whole pod was killed while it was {doing} this model"
                alone = len(self.suspects) == 1
                history.killed(model, revision, f"{text}, its memory having run out", sure=alone)
