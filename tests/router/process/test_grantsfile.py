"""Grants in a file that routers follow, from the file to the decisions of each worker."""

import json
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from mesh.access.verbs import Verb
from mesh.telemetry import metrics
from router.access.guard import Guard
from router.process.grantsfile import GrantsFile, GrantsFollower
from tests.support.access import guard_of

KEY = "k" * 40
TOML = """
[grants.fraud-team]
role = "infer"
models = ["fraud/*"]
to = ["key:k"]
"""


def as_json(**grants: object) -> str:
    return json.dumps({"grants": grants})


class Way:
    """A file of grants, its reader in the pod, and a worker that follows the reader."""

    def __init__(self, folder: Path, path: Path | None) -> None:
        self.published = folder / "published.json"
        self.file = GrantsFile(str(path or ""), self.published)
        self.file.begin()
        self.now = self.file.state.read
        self.file._wall = lambda: self.now
        self.worker()

    def worker(self) -> None:
        """Starts a worker, which replaces the former one."""
        self.guard: Guard = guard_of("required", {"k": KEY}, {"team": ("infer", ["team/*"], ["key:k"])})
        self.follower = GrantsFollower(self.published, self.guard.authority, wall=lambda: self.now)
        self.follower.look()

    def look(self) -> None:
        self.file.look()
        self.follower.look()

    def allowed(self, name: str) -> bool:
        caller = self.guard.known([(b"authorization", b"Bearer " + KEY.encode())])
        return self.guard.ruling(caller, Verb.INFER, name).allowed


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "grants"
    path.write_text(TOML)
    return path


def test_the_grants_of_the_file_add_to_those_in_etcd(tmp_path, path):
    """Grants of the file and of etcd both apply, even under one name. A change in one source keeps the grants of the
    other."""
    way = Way(tmp_path, path)
    assert (way.allowed("fraud/de"), way.allowed("team/x"), way.allowed("other")) == (True, True, False)
    path.write_text(as_json(team={"role": "infer", "models": ["other"], "to": ["everyone"]}))
    way.look()
    assert (way.allowed("fraud/de"), way.allowed("team/x"), way.allowed("other")) == (False, True, True)
    way.guard.authority.delta(2, [])
    assert way.allowed("other")
    path.write_text("[grants]\n")
    way.look()
    assert (way.allowed("team/x"), way.allowed("other")) == (True, False)


def test_without_a_file_there_is_nothing_to_follow(tmp_path):
    way = Way(tmp_path, None)
    assert not way.file.is_watched
    assert way.follower.document() is None
    assert way.allowed("team/x")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not valid JSON"),
        ("[grants", "not valid TOML"),
        ("", "must have one table"),
        ("x = 1", "must have one table"),
        ('{"grants": []}', "must have one table"),
        (as_json(a={"role": "infer", "models": ["*"], "to": ["everyone"]}, b={"role": "root"}), "the grant b: models"),
        (as_json(a={"role": "root", "models": ["*"], "to": ["everyone"]}), "the grant a: 'root' is not a role"),
        (as_json(a=7), "the grant a: it must be a table"),
        (as_json(**{"a/b": {}}), "not a valid name for a grant"),
        (as_json(a={"role": "infer", "models": ["*"], "to": ["everyone"], "until": 1}), "a grant has no 'until'"),
        (" " * (5 << 20), "longer than"),
        ("\u00e9" * (3 << 20), "longer than"),
        (None, "No such file"),
    ],
)
def test_a_file_with_a_mistake_keeps_the_former_one(tmp_path, path, content, says):
    """A mistake in one grant makes the router refuse the whole file. The router logs the mistake once, with the age of
    the grants that apply, and reports both. A worker that starts meanwhile has the former grants too."""
    way = Way(tmp_path, path)
    registry = metrics.Registry()
    way.file.follow(registry)
    way.now += 60
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with capture_logs() as logged:
        for _ in range(3):
            way.look()
    assert [line["log_level"] for line in logged] == ["error"]
    assert says in logged[0]["why"]
    assert logged[0]["age_s"] == 60
    way.worker()
    assert way.allowed("fraud/de")
    document = way.follower.document()
    assert says in document["error"]
    assert document["age"] == 60
    assert list(document["grants"]) == ["fraud-team"]
    assert "mesh_grants_file_refused 1" in metrics.render(registry.snapshot()).decode()
    path.write_text(TOML)
    way.look()
    assert (way.follower.document()["error"], way.follower.document()["age"]) == ("", 0)


@pytest.mark.parametrize("content", [None, "{"], ids=["missing", "not JSON"])
def test_a_router_does_not_start_with_a_file_that_cannot_be_used(tmp_path, content):
    """At the start there is no former content, so the router refuses to start and names the file."""
    path = tmp_path / "grants"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=str(path)):
        Way(tmp_path, path)
