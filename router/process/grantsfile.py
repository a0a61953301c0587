"""Grants in a followed file, besides those in etcd, for meshes that are configured from version control.

The file is used as a whole or not at all: with a mistake in one grant, the old content stays in use. If the file
disappears, its last content also stays in use, because Kubernetes sometimes mounts volumes late. An empty table
`grants` removes all grants.
"""

import time
from collections.abc import Callable
from pathlib import Path

from mesh.schema import auth, grantsfile
from mesh.telemetry import metrics
from router.access.authority import Authority
from router.process.followedfile import FollowedFile, Follower


class GrantsFile(FollowedFile):
    """The file with grants, which the pod's main process follows."""

    def __init__(self, path: str, published: Path) -> None:
        """Follows the file at `path`, or no file if `path` is empty. `published` is the file for the workers."""
        super().__init__("the file with grants", path, published, grantsfile.parse, limit=grantsfile.MAX_BYTES, text="")

    def follow(self, registry: metrics.Registry) -> None:
        """Adds the metric `mesh_grants_file_refused`, by which an alert notices an unusable file."""
        text = "1 if the file with grants cannot be used and its previous content applies."
        registry.gauge("mesh_grants_file_refused", text, merge="max").follow(lambda: int(bool(self.state.error)))


class GrantsFollower:
    """The file's grants in one process."""

    def __init__(self, published: Path, authority: Authority, *, wall: Callable[[], float] = time.time) -> None:
        """Makes a follower that adds the file's grants to those of the authority. `wall` returns seconds since the
        epoch."""
        self._authority = authority
        self._wall = wall
        self._follower = Follower(published, self._adopt)

    def look(self) -> None:
        """Applies a content that the pod has published since the last call."""
        self._follower.look()

    def document(self) -> dict[str, object] | None:
        """Returns the file's grants and their source. If a newer content cannot be used, also returns the reason, and
        the age of the grants in use. Returns None without a file."""
        state = self._follower.state
        if not state.source:
            return None
        return {
            "source": state.source,
            "grants": {name: auth.document_of(one) for name, one in self._authority.filed.items()},
            "error": state.error,
            "age": round(self._wall() - state.read, 1) if state.error else 0.0,
        }

    def _adopt(self, text: str) -> None:
        self._authority.adopt(grantsfile.parse(text) if text else {})
