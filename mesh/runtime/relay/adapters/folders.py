"""The folders of a server's models: for each model one that the server reads, and one with links to what was pulled.

The two are separate, because a server may search all that it reads, links included, for descriptions of models. Names
follow from the model's id, so that a relay which takes over from a dead one finds them again. A name is a digest,
unless the adapter has another rule, because ids may be long, or have characters that a server would decode. A third
folder has a file for each model, which contains the id.
"""

import asyncio
import contextlib
import hashlib
import os
import re
import shutil
import stat
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mesh.runtime.relay import reported
from mesh.statuses import MeshError, Reason

_Filled = TypeVar("_Filled")

_READ, _FILES, _IDS = "models", "files", "ids"
_PLAIN = re.compile(r"(?![0-9a-f]{32}$)[A-Za-z0-9_][A-Za-z0-9_.@:+=,~-]{0,199}")


def digest(model_id: str) -> str:
    """Returns a digest of a model's id: 32 hexadecimal digits."""
    return hashlib.blake2b(model_id.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def plain(model_id: str, allowed: re.Pattern[str] = _PLAIN) -> str:
    """Returns the id if a server can take it as a name and write it into its log, and otherwise a digest. `allowed`
    matches such ids, and nothing that looks like a digest."""
    return model_id if allowed.fullmatch(model_id) else digest(model_id)


@dataclass(frozen=True, slots=True)
class ModelFolders:
    """The folders of one model."""

    read: Path  # what the server reads
    files: Path  # links, and what was unpacked


class Folders:
    """The folders of all models of one server. The methods that are not coroutines block briefly for the disk, and
    raise OSError."""

    def __init__(self, root: Path, *, named: Callable[[str], str] = digest) -> None:
        """Keeps folders in `root`. `named` returns the name of a model's folders, which no other model has."""
        self._root = root
        self._named = named

    def begin(self, model_id: str) -> ModelFolders:
        """Makes the folders of a model, empty, in place of earlier ones."""
        self.remove(model_id)
        note = self._note(model_id)
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_bytes(model_id.encode("utf-8", "surrogatepass"))
        place = self.of(model_id)
        for folder in (place.read, place.files):
            folder.mkdir(parents=True)
        return place

    async def fill(self, model_id: str, put: Callable[[ModelFolders, threading.Event], _Filled]) -> _Filled:
        """Makes the folders of a model, and has `put` put the model into them, in a thread. Returns what `put` returns.

        If `put` fails, the folders are removed. If this call is cancelled, the event that `put` got is set, and the
        call waits until `put` has ended. Raises MeshError.
        """
        stop = threading.Event()
        work = asyncio.ensure_future(asyncio.to_thread(self._fill, model_id, put, stop))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            stop.set()
            await asyncio.wait({work})
            raise

    def _fill(
        self, model_id: str, put: Callable[[ModelFolders, threading.Event], _Filled], stop: threading.Event
    ) -> _Filled:
        try:
            place = self.begin(model_id)
            try:
                return put(place, stop)
            except BaseException:
                self.remove(model_id)
                raise
        except OSError as error:
            text = f"the pod cannot prepare the model's folder for the model server: {error.strerror or error}"
            raise MeshError(Reason.LOAD_FAILED, text) from error

    async def reported(self, model_id: str) -> reported.Trailers:
        """Returns the trailers of a load: the bytes of the files that were unpacked or copied for it, if there are any,
        which the pod's disk holds in addition to what was pulled."""
        size = await asyncio.to_thread(_own_bytes, self.of(model_id).files)
        return ((reported.DISK, str(size)),) if size else ()

    def of(self, model_id: str) -> ModelFolders:
        """Returns the folders of a model, whether they exist or not."""
        name = self._named(model_id)
        return ModelFolders(self._root / _READ / name, self._root / _FILES / name)

    def remove(self, model_id: str) -> None:
        """Removes the folders of a model, and nothing that their links lead to."""
        place = self.of(model_id)
        for folder in (place.read, place.files):
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(folder)
        self._note(model_id).unlink(missing_ok=True)

    def clear(self) -> None:
        """Removes the folders of all models, also those of an earlier relay."""
        for model_id in list(self.ids()):
            self.remove(model_id)

    def ids(self) -> Iterator[str]:
        """Yields the ids of all models that have folders, also those of an earlier relay."""
        notes = self._root / _IDS
        if notes.is_dir():
            for note in sorted(notes.iterdir()):
                yield note.read_bytes().decode("utf-8", "surrogatepass")

    def _note(self, model_id: str) -> Path:
        return self._root / _IDS / self._named(model_id)


def _own_bytes(folder: Path) -> int:
    """Returns the bytes of the files below a folder that have no other name outside of it. Files that cannot be looked
    at do not count."""
    names: Counter[tuple[int, int]] = Counter()
    found: dict[tuple[int, int], os.stat_result] = {}
    for parent, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):
                info = os.lstat(os.path.join(parent, file))
                names[info.st_dev, info.st_ino] += 1
                found[info.st_dev, info.st_ino] = info
    own = (info for inode, info in found.items() if stat.S_ISREG(info.st_mode) and names[inode] == info.st_nlink)
    return sum(info.st_size for info in own)
