"""`mesh prefix`: commands for the keys that a removed mesh has left in a shared etcd."""

import json

import pytest

from mesh.schema import owner
from mesh.schema.keys import Keys
from tests.backup.conftest import Admin

FIRST = {"install": "team-a/mesh", "schema": owner.SCHEMA}


@pytest.fixture
def two(admin: Admin, request: pytest.FixtureRequest) -> tuple[Admin, Keys, Keys]:
    """Two meshes in one etcd. The first's prefix is the beginning of the second's."""
    keys = Keys(f"prefix/{request.node.name}"), Keys(f"prefix/{request.node.name}2")
    for one, who in zip(keys, ("team-a/mesh", "team-b/mesh"), strict=True):
        admin.put(
            {
                one.owner: owner.record(who),
                **{one.registry + b"m%d" % number: b'{"type":"onnx"}' for number in range(3)},
                one.vmodels + b"v": b"{}",
                one.setting("type_constraints"): b"{}",
                one.wanted + b"m1": b"",
                one.life("pod-1", "abc"): b"{}",
            }
        )
    return admin, *keys


def test_what_there_is_is_shown(two: tuple[Admin, Keys, Keys]) -> None:
    admin, keys, _ = two
    admin.put({keys.router("r1"): b"{}"})
    result = admin.run("prefix", "show", "--base", keys.base)
    assert result.exit_code == 0, result.stderr
    assert "'team-a/mesh'" in result.stdout
    assert "3 models, 1 vmodel, 1 setting" in result.stdout
    assert "running: router r1" in result.stdout
    assert "may still answer: pod-1" in result.stdout
    shown = json.loads(admin.run("prefix", "show", "--base", keys.base, "--json").stdout)
    assert (shown["owner"], shown["models"], shown["running"]) == ("team-a/mesh", 3, ["router r1"])


def test_a_prefix_is_removed_and_nothing_beside_it(two: tuple[Admin, Keys, Keys]) -> None:
    """Only keys below the given prefix are removed. A dry run and a missing confirmation remove nothing. A second run
    finds nothing to remove."""
    admin, keys, other = two
    before, theirs = admin.all(keys), admin.all(other)
    told = admin.run("prefix", "remove", "--base", keys.base, "--dry-run")
    assert told.exit_code == 0, told.stderr
    assert "would be removed: 3 models" in told.stdout
    refused = admin.run("prefix", "remove", "--base", keys.base)
    assert refused.exit_code == 2
    assert "use --yes" in refused.stderr
    assert admin.all(keys) == before
    done = admin.run("prefix", "remove", "--base", keys.base, "--yes")
    assert done.exit_code == 0, done.stderr
    assert "3 models, 1 vmodel, 1 setting" in done.stdout
    assert admin.all(keys) == {}
    assert admin.all(other) == theirs
    again = admin.run("prefix", "remove", "--base", keys.base, "--yes")
    assert again.exit_code == 3
    assert "no keys below" in again.stderr


@pytest.mark.parametrize("command", [["remove"], ["transfer", "--to", "team-c/mesh"]], ids=["remove", "transfer"])
@pytest.mark.parametrize("what", ["router", "pod"])
def test_a_mesh_that_runs_is_left_alone(two: tuple[Admin, Keys, Keys], command: list[str], what: str) -> None:
    """The prefix of a running mesh is removed or handed over only with --force."""
    admin, keys, _ = two
    key = keys.router("r1") if what == "router" else keys.pod("pod-9")
    admin.put({key: b"{}"})
    before = admin.all(keys)
    argv = ("prefix", *command, "--base", keys.base, "--yes")
    refused = admin.run(*argv, "--wait", "0.2", "--json")
    assert refused.exit_code == 1
    assert json.loads(refused.stdout)["reason"] == "IN_USE"
    assert ("router r1" if what == "router" else "runtime pod pod-9") in refused.stderr
    assert admin.all(keys) == before
    forced = admin.run(*argv, "--force")
    assert forced.exit_code == 0, forced.stderr
    assert admin.all(keys) != before


def test_a_prefix_is_handed_over(two: tuple[Admin, Keys, Keys]) -> None:
    """A prefix is handed over to a named mesh or, if the name is empty, left without an owner. All other keys stay."""
    admin, keys, _ = two
    before = admin.all(keys)
    done = admin.run("prefix", "transfer", "--to", "team-c/mesh", "--base", keys.base, "--yes", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["owner"] == "team-a/mesh"
    assert json.loads(done.stdout)["to"] == "team-c/mesh"
    assert admin.all(keys) == {**before, b"owner": owner.record("team-c/mesh")}
    done = admin.run("prefix", "transfer", "--to", "", "--base", keys.base, "--yes")
    assert done.exit_code == 0, done.stderr
    del before[b"owner"]
    assert admin.all(keys) == before


def test_an_owner_who_comes_meanwhile_stops_it(two: tuple[Admin, Keys, Keys], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command changes nothing if another mesh takes over the prefix between the question and the answer."""
    admin, keys, _ = two
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    for command in (["remove"], ["transfer", "--to", "x"]):
        admin.put({keys.owner: owner.record("team-a/mesh")})

        def answer(*_: object, **__: object) -> bool:
            admin.put_aside({keys.owner: owner.record("team-d/mesh")})
            return True

        monkeypatch.setattr("mesh.cli.prefix._ask", lambda question, yes: answer())
        result = admin.run("prefix", *command, "--base", keys.base)
        assert result.exit_code == 1
        assert "another owner now" in result.stderr
        assert admin.all(keys)[b"owner"] == owner.record("team-d/mesh")
        assert len(admin.all(keys)) == 8


def test_the_whole_etcd_is_no_prefix(admin: Admin) -> None:
    result = admin.run("prefix", "remove", "--base", "/", "--yes")
    assert result.exit_code == 2
    assert "set it with --base" in result.stderr
