"""The data-plane configuration on its way from an option or a followed file to the workers (`followedfile`)."""

from pathlib import Path

from mesh.telemetry import metrics
from router.calls import dataplane
from router.calls.dataplane import Dataplane
from router.calls.routes import Routes
from router.process.followedfile import FollowedFile, Follower


class DataplaneFile(FollowedFile):
    """The configuration of a router pod, from an option or from a file that is watched."""

    def __init__(self, text: str, path: str, published: Path) -> None:
        """Makes a configuration from `text`, or from the file at `path`. If both are empty, there is no configuration.
        `published` is the file for the workers."""
        super().__init__(
            "the data-plane configuration",
            path,
            published,
            dataplane.parse,
            limit=dataplane.MAX_BYTES,
            text=text,
            option="--dataplane-config",
        )

    def follow(self, registry: metrics.Registry) -> None:
        """Adds the metric `mesh_dataplane_config_refused`, by which an alert notices an unusable file."""
        text = "1 if the file of the data-plane configuration cannot be used and its previous content applies."
        registry.gauge("mesh_dataplane_config_refused", text, merge="max").follow(lambda: int(bool(self.state.error)))


class DataplaneFollower:
    """The configuration of one worker."""

    def __init__(self, published: Path, routes: Routes) -> None:
        self._routes = routes
        self._config: Dataplane | None = None
        self._follower = Follower(published, self._adopt)

    def look(self) -> None:
        """Applies a content that the pod has published since the last call."""
        self._follower.look()

    def document(self) -> dict[str, object] | None:
        """Returns the state of the configuration for `mesh doctor`, or None if there is no configuration."""
        if self._config is None:
            return None
        return {
            "source": self._follower.state.source,
            "methods": sorted(name[1:].decode() for name in self._config.methods),
            "others": self._config.others,
            "error": self._follower.state.error,
        }

    def _adopt(self, text: str) -> None:
        self._config = dataplane.parse(text) if text else None
        self._routes.adopt(self._config)
