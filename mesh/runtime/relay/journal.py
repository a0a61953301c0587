"""The record that a relay leaves for the next relay of its pod: the server's status, and the copies in the server.

A server must drop all its models before it reports that it is ready. A relay that takes over from a dead one must
therefore not ask for that report, and reads this file instead. Each change is appended as one line, which the kernel
keeps even if the writer is killed. The file is removed once the server is lost.

A copy is identified by its model's id and its token. The token alone is not enough: models that were registered in one
transaction have equal tokens.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from mesh.pb import modelruntime_pb2 as pb


@dataclass(frozen=True, slots=True)
class Held:
    """A copy in the server."""

    model_id: str
    token: str
    slot: int  # of the use board; -1: none
    concurrency: int = 0  # maximum calls at once; 0: no limit


class Journal:
    """The journal of one relay. Without a path, nothing is recorded. All methods except `read` raise OSError."""

    def __init__(self, path: Path | None) -> None:
        self.former = False  # the server speaks the SPI only under the former name of its service
        self._path = path
        self._descriptor = -1

    def read(self) -> tuple[pb.RuntimeStatusResponse, list[Held]] | None:
        """Returns the status and the copies that the former relay recorded, or None if it left no valid record."""
        if self._path is None:
            return None
        held: dict[tuple[str, str], Held] = {}
        try:
            first, *lines = self._path.read_text().splitlines()
            begun = json.loads(first)
            status = pb.RuntimeStatusResponse.FromString(bytes.fromhex(begun["status"]))
            former = bool(begun["former"])
            for line in lines:
                entry = json.loads(line)
                if "gone" in entry:
                    held.pop((entry["gone"], entry["token"]), None)
                else:
                    held[entry["model_id"], entry["token"]] = Held(**entry)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        self.former = former
        return status, list(held.values())

    def begin(self, status: pb.RuntimeStatusResponse, held: list[Held]) -> None:
        """Begins the file, with the server's status and copies."""
        if self._path is None:
            return
        fresh = self._path.with_name(self._path.name + ".new")
        begun = {"status": status.SerializeToString().hex(), "former": self.former}
        lines = [json.dumps(begun), *(json.dumps(asdict(one)) for one in held)]
        fresh.write_text("".join(f"{line}\n" for line in lines))
        self._descriptor = os.open(fresh, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        fresh.replace(self._path)

    def add(self, copy: Held) -> None:
        """Records a loaded copy."""
        self._append(asdict(copy))

    def remove(self, model_id: str, token: str) -> None:
        """Records that the server no longer has a copy."""
        self._append({"gone": model_id, "token": token})

    def discard(self) -> None:
        """Removes the file, because the server is lost."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _append(self, entry: dict[str, object]) -> None:
        if self._descriptor >= 0:
            os.write(self._descriptor, f"{json.dumps(entry)}\n".encode())
