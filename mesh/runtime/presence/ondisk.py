"""The models with files on this pod's disk, as a text for the mesh that is only rebuilt when it is read.

Every load changes the set, and every removal may. But the pod's figures are read only once a second, and written every
few seconds. A change therefore only marks the text as outdated.
"""

from collections.abc import Callable, Sequence

from mesh.schema.idset import MAX_IDS, IdSet


class OnDisk:
    """The models on one pod's disk. `remembered` returns the ids, least recently used first."""

    def __init__(self, remembered: Callable[[], Sequence[str]]) -> None:
        self._remembered = remembered
        self._text = ""
        self._stale = False

    def changed(self, model_id: str, here: bool) -> None:
        """Marks the text as outdated, because the files of a model are now on the disk or no longer there."""
        self._stale = True

    @property
    def text(self) -> str:
        """The encoded set of models whose files are on the disk, at most `MAX_IDS` of them, the most recently used
        ones."""
        if self._stale:
            self._stale = False
            self._text = IdSet.of(self._remembered()[-MAX_IDS:]).encode()
        return self._text
