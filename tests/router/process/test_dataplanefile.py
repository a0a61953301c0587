"""The data-plane configuration on its way from a file, as people and Kubernetes change it, to the workers' rules."""

import asyncio
import json
import os
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from mesh.telemetry import metrics
from router.calls.routes import Routes
from router.process import followedfile
from router.process.dataplanefile import DataplaneFile, DataplaneFollower
from tests.support.waiting import until

A, B = b"/some.Predictor/a", b"/some.Predictor/b"


def listing(*methods: bytes) -> str:
    return json.dumps({"rpcConfigs": {method[1:].decode(): {"idExtractionPath": [1]} for method in methods}})


class Way:
    """A configuration file, its reader in the pod, and a worker that follows the reader."""

    def __init__(self, folder: Path, path: Path | None, text: str = "") -> None:
        self.published = folder / "published.json"
        self.file = DataplaneFile(text, str(path or ""), self.published)
        self.file.begin()
        self.worker()

    def worker(self) -> None:
        """Starts a worker, which replaces the former one."""
        self.routes = Routes()
        self.follower = DataplaneFollower(self.published, self.routes)
        self.follower.look()

    def look(self) -> None:
        self.file.look()
        self.follower.look()

    @property
    def allowed(self) -> list[bytes]:
        return [method for method in (A, B) if not self.routes.method(method).refused]

    @property
    def error(self) -> object:
        document = self.follower.document()
        return None if document is None else document["error"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Returns a configuration file that lists the method A."""
    path = tmp_path / "dataplane"
    path.write_text(listing(A))
    return path


def test_without_a_configuration_everything_is_allowed(tmp_path: Path) -> None:
    way = Way(tmp_path, None)
    assert not way.file.is_watched
    assert way.allowed == [A, B]
    assert way.follower.document() is None


def test_a_configuration_in_an_option(tmp_path: Path) -> None:
    """A configuration may be given as text, which is not watched."""
    way = Way(tmp_path, None, listing(B))
    assert not way.file.is_watched
    assert way.allowed == [B]


def test_a_file_that_changes_is_read_again(tmp_path: Path, path: Path) -> None:
    """A changed file takes effect at the next look, whether it is written in place or replaced."""
    way = Way(tmp_path, path)
    assert way.allowed == [A]
    path.write_text(listing(A, B))
    way.look()
    assert way.allowed == [A, B]
    (tmp_path / "new").write_text(listing(B))
    os.replace(tmp_path / "new", path)
    way.look()
    assert way.allowed == [B]


def test_a_config_map_is_replaced_by_its_link(tmp_path: Path) -> None:
    """Kubernetes writes a ConfigMap's new content to a new folder and moves a link to it, in one step."""
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    for version, methods in (("..1", (A,)), ("..2", (B,))):
        (mounted / version).mkdir()
        (mounted / version / "config").write_text(listing(*methods))
    (mounted / "..data").symlink_to("..1")
    (mounted / "config").symlink_to("..data/config")
    way = Way(tmp_path, mounted / "config")
    assert way.allowed == [A]
    (mounted / "..data_tmp").symlink_to("..2")
    os.replace(mounted / "..data_tmp", mounted / "..data")
    way.look()
    assert way.allowed == [B]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param(b"{", "not JSON", id="cut"),
        pytest.param(b"", "not JSON", id="empty"),
        pytest.param(b'{"rpc": {}}', "unknown property", id="unknown property"),
        pytest.param(b"\xff\xfe", "not UTF-8", id="not text"),
        pytest.param(b" " * (1 << 20) + b"{}", "longer than the limit", id="too long"),
        pytest.param(None, "No such file", id="gone"),
    ],
)
def test_a_content_that_cannot_be_used_keeps_the_former_one(tmp_path: Path, path: Path, content, says: str) -> None:
    """A mistake in the file is logged once, counted, and reported by the worker. The former content stays in force,
    also for workers that start later."""
    way = Way(tmp_path, path)
    registry = metrics.Registry()
    way.file.follow(registry)
    if content is None:
        path.rename(tmp_path / "away")
    else:
        path.write_bytes(content)
    with capture_logs() as logged:
        for _ in range(3):
            way.look()
    assert [line["log_level"] for line in logged] == ["error"]
    assert says in logged[0]["why"]
    way.worker()
    assert way.allowed == [A]
    assert says in str(way.error)
    assert "mesh_dataplane_config_refused 1" in metrics.render(registry.snapshot()).decode()
    if content is None:
        (tmp_path / "away").rename(path)  # the same file with the same time
    else:
        path.write_text(listing(A))
    way.look()
    assert (way.allowed, way.error) == ([A], "")
    path.write_text(listing(A, B))
    way.look()
    assert way.allowed == [A, B]


@pytest.mark.parametrize("content", [None, "{"], ids=["missing", "not JSON"])
def test_a_router_does_not_start_with_a_file_that_cannot_be_used(tmp_path: Path, content: str | None) -> None:
    """At the start there is no former content, so the router refuses to start and names the file."""
    path = tmp_path / "dataplane"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=str(path)):
        Way(tmp_path, path)


async def test_the_file_is_watched(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(followedfile, "LOOK", 0.01)
    way = Way(tmp_path, path)
    watching = asyncio.ensure_future(way.file.run())

    def seen() -> bool:
        way.follower.look()
        return way.allowed == [B]

    try:
        path.write_text(listing(B))
        await until(seen, interval=0.01, why="the new content is in force")
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


def test_a_document_for_the_doctor(tmp_path: Path, path: Path) -> None:
    """A worker reports where its configuration comes from, which methods it lists, and whether others are allowed."""
    way = Way(tmp_path, path)
    assert way.follower.document() == {
        "source": str(path),
        "methods": ["some.Predictor/a"],
        "others": False,
        "error": "",
    }
