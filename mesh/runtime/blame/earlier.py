"""Evidence left by an earlier agent of this pod: the models at work when the whole pod was killed.

On most Kubernetes nodes, a container that takes too much memory is killed with all its processes (`memory.oom.group`):
the agent dies with its model server and cannot write anything down. The use board outlives both, since a pod's /tmp
outlives its containers. So the next agent reads the board, and writes into the models' records what the former agent
could not.

A pod killed by hand leaves the same traces, so no model is blamed if the last measurement shows that memory was left
(`lastlooks`).

The board identifies a model only by its record's create revision, which is enough to find the record again. A board is
read only if it belongs to the same pod and registry and to the same boot of the machine: no model is to blame for a
power failure. An agent that leaves in order leaves no suspects, because it first disowns the folder. No model is blamed
either if a signal had stopped the agent, which was then killed and replaced (`mesh up` tells the next agent so).
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
from placement.suspects import EndCause, suspects

log = logs.get(__name__)

BOARD = "board"
"""The name of the board's file in the run directory."""


def owner(*, base: str, pod: str, boot: Path = Path("/proc/sys/kernel/random/boot_id")) -> str:
    """Returns the owner's mark for a run directory: this pod, in this boot of the machine. Returns "", for no owner, if
    the id of the boot cannot be read."""
    try:
        return f"{boot.read_text().strip()} {base} {pod}"
    except OSError:
        return ""


class Earlier:
    """The suspects of earlier agents. Call `read` for each folder that such an agent has left, then `accuse` once."""

    def __init__(self, pod: str) -> None:
        self._pod = pod
        self.suspects: dict[int, str] = {}  # create revision of the model's record -> what it was doing

    def read(self, folder: Path) -> None:
        """Notes the models that were at work when the pod was killed, unless the board cannot be read, a signal had
        stopped that agent, or no measurement shows that the pod ran out of memory."""
        if os.environ.get(process.STOPPED_BEFORE):
            return
        try:
            board = Board.open(folder / BOARD)
        except (OSError, ValueError):
            return
        if not lastlooks.exhausted(folder):
            log.info(
                "an earlier agent of this pod was killed, but no measurement shows a lack of memory: no model is blamed"
            )
            board.close()
            return
        work = working((use.revision, use) for _, use in board.suspects())
        self.suspects |= {one.model: one.doing.value for one in suspects(EndCause.MEMORY, work)}
        board.close()

    async def accuse(self, etcd: Etcd, keys: Keys, history: History) -> None:
        """Adds blames to the records of these models in the background, if the records still exist. If etcd fails, logs
        this and gives up, because the pod must start anyway."""
        for revision, doing in self.suspects.items():
            try:
                prefix = keys.registry
                page = await etcd.page(prefix, after_prefix(prefix), limit=1, created=revision, keys_only=True)
            except EtcdError as error:
                log.warning(
                    "models that may have killed an earlier agent of this pod are not recorded", error=error.detail
                )
                return
            for kv in page.kvs:
                model = keys.model_of(kv.key)
                log.warning("this model may have killed an earlier agent of this pod", model=model, doing=doing)
                text = f"the whole pod was killed for lack of memory while it was {doing} this model"
                alone = len(self.suspects) == 1
                history.killed(model, revision, text, sure=alone)
