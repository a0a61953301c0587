"""Which models this pod has the files of, as the mesh is told: text that is made anew only when it is asked for.

Every load changes the set and every removal may, while the pod's figures are looked at each second and written every
few: so a change only leaves a mark.
"""

from collections.abc import Callable, Sequence

from mesh.schema.idset import MAX_IDS, IdSet


class OnDisk:
    """See the module's text. `remembered` gives the ids, longest unused first."""

    def __init__(self, remembered: Callable[[], Sequence[str]]) -> None:
        self._remembered = remembered
        self._text = ""
        self._stale = False

    def changed(self, model_id: str, here: bool) -> None:
        """All files of that model are on disk now, or no longer."""
        self._stale = True

    @property
    def text(self) -> str:
        """What is published."""
        if self._stale:
            self._stale = False
            self._text = IdSet.of(self._remembered()[-MAX_IDS:]).encode()
        return self._text
