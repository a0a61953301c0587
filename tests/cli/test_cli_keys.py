"""`mesh keys`, `mesh grants`, `mesh whoami`, and the API key that every command sends."""

import json

import pytest

KEY = "mesh_" + "k" * 43


@pytest.fixture
def asked(mesh):
    """Returns a function that lists the method, path and body of each request that the fake mesh has received."""
    return lambda: mesh.requests


def test_create_prints_the_key_alone_on_standard_output(run, mesh, asked):
    mesh.answer("/mesh/v1/keys/ci", {"name": "ci", "key": KEY, "expires": 1_900_000_000_000, "former_until": None})
    result = run("keys", "create", "ci", "--role", "register", "--models", "fraud/*", "--expires", "90d")
    assert result.exit_code == 0, result.output
    assert result.stdout == KEY + "\n"
    assert "shown only once" in result.stderr
    body = {"groups": [], "expires_in": 90 * 86400, "role": "register", "models": ["fraud/*"]}
    assert asked() == [("PUT", "/mesh/v1/keys/ci", body)]


def test_rotate_says_until_when_the_former_key_works(run, mesh, asked):
    answer = {"name": "ci", "key": KEY, "expires": None, "former_until": 1_900_000_000_000}
    mesh.answer("/mesh/v1/keys/ci/rotate", answer)
    result = run("keys", "rotate", "ci", "--overlap", "0")
    assert result.stdout == KEY + "\n"
    assert "valid until 2030" in result.stderr
    assert asked() == [("POST", "/mesh/v1/keys/ci/rotate", {"overlap": 0})]


@pytest.mark.parametrize("span", ["90", "d", "0d", "1w", "-1d", "1.5h"])
def test_a_bad_time_is_refused(run, span):
    result = run("keys", "create", "ci", f"--expires={span}")
    assert result.exit_code == 2
    assert "is not a duration: write one such as" in result.stderr


def test_keys_are_listed_without_secrets(run, mesh):
    secrets = [{"id": "0123abcd", "created": 1_700_000_000_000, "expires": None}]
    mesh.answer("/mesh/v1/keys", {"keys": [{"name": "ci", "groups": ["team-a"], "secrets": secrets}]})
    result = run("keys", "ls")
    for text in ("ci", "team-a", "0123abcd", "never"):
        assert text in result.stdout


@pytest.mark.parametrize("what", ["keys", "grants"])
def test_what_does_not_exist_is_not_removed(run, mesh, what):
    mesh.answer(f"/mesh/v1/{what}/ci", {"name": "ci", "existed": False})
    result = run(what, "revoke" if what == "keys" else "rm", "ci")
    assert result.exit_code == 3
    assert "there is no" in result.stderr


def test_grants_are_added_and_applied_from_a_file(run, mesh, asked, tmp_path):
    mesh.answer("/mesh/v1/grants/g", {"name": "g"})
    assert run("grants", "add", "g", "--role", "infer", "--models", "m", "--to", "key:ci").exit_code == 0
    mesh.answer("/mesh/v1/grants", {"written": ["a"], "removed": ["b"]})
    one = {"role": "read", "models": ["*"], "to": ["everyone"]}
    (tmp_path / "g.json").write_text(json.dumps({"grants": {"a": one}}))
    (tmp_path / "g.toml").write_text('[grants.a]\nrole = "read"\nmodels = ["*"]\nto = ["everyone"]\n')
    for name in ("g.json", "g.toml"):
        result = run("grants", "apply", "-f", str(tmp_path / name))
        assert "written: a" in result.stdout
        assert "removed: b" in result.stdout
    applied = ("PUT", "/mesh/v1/grants", {"grants": {"a": one}})
    given = {"role": "infer", "models": ["m"], "to": ["key:ci"]}
    assert asked() == [("PUT", "/mesh/v1/grants/g", given), applied, applied]


@pytest.mark.parametrize("text", ["", "grants = 7", "[other]\n[grants]", "[grants", "\x00"])
def test_a_bad_file_of_grants_is_refused(run, asked, tmp_path, text):
    (tmp_path / "g.toml").write_text(text)
    result = run("grants", "apply", "-f", str(tmp_path / "g.toml"))
    assert result.exit_code == 2
    assert "g.toml" in result.stderr
    assert not asked()


def test_whoami_shows_the_callers_grants(run, mesh):
    one = {"role": "infer", "models": ["m"], "to": ["key:ci"]}
    mesh.answer("/mesh/v1/whoami", {"name": "key:ci", "subjects": [], "grants": {"g": one}, "everything": False})
    result = run("whoami")
    assert "you are key:ci\n" in result.stdout
    assert "infer" in result.stdout


def test_whoami_shows_the_groups_of_a_token(run, mesh):
    subjects = ["everyone", "group:team-a", "group:x", "user:anna"]
    mesh.answer("/mesh/v1/whoami", {"name": "user:anna", "subjects": subjects, "grants": {}, "everything": False})
    assert "you are user:anna, and also group:team-a, group:x\n" in run("whoami").stdout


# -- the key that is sent


@pytest.fixture
def sent(mesh, run, monkeypatch):
    """Returns a function that runs `mesh whoami` with options and returns the key that was sent."""
    for name in ("MESH_API_KEY", "MESH_API_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    mesh.answer("/mesh/v1/whoami", {"name": "x", "everything": True})

    def command(*options):
        result = run(*options, "whoami")
        assert result.exit_code == 0, result.output
        return mesh.headers[-1].get("authorization", "").removeprefix("Bearer ")

    return command


def test_no_key_is_sent_without_one(sent):
    assert sent() == ""


def test_a_file_of_the_command_line_takes_precedence_over_the_environment(sent, tmp_path, monkeypatch):
    for name in ("given", "other"):
        (tmp_path / name).write_text(f"{name}-key\n")
    assert sent("--api-key-file", str(tmp_path / "given")) == "given-key"
    monkeypatch.setenv("MESH_API_KEY_FILE", str(tmp_path / "other"))
    assert sent() == "other-key"
    monkeypatch.setenv("MESH_API_KEY", "plain-key")
    assert sent() == "plain-key"
    assert sent("--api-key-file", str(tmp_path / "given")) == "given-key"


def test_the_last_line_of_a_file_is_sent(sent, tmp_path):
    (tmp_path / "key").write_text("former\nnewer\n")
    assert sent("--api-key-file", str(tmp_path / "key")) == "newer"


@pytest.mark.parametrize("content", [None, "", "ä-key"])
def test_a_bad_file_is_refused_before_anything_is_sent(run, mesh, tmp_path, content):
    file = tmp_path / "key"
    if content is not None:
        file.write_text(content)
    result = run("--api-key-file", str(file), "whoami")
    assert result.exit_code == 2
    assert str(file) in result.output
    assert not mesh.requests


def test_grants_of_the_routers_file_are_listed(run, mesh):
    """Grants from the file that routers follow are marked as such, and a file that cannot be used is reported."""
    grant = {"role": "infer", "models": ["*"], "to": ["key:ci"]}
    filed = {"source": "/etc/mesh/grants", "grants": {"b": grant}, "error": "it is not valid TOML", "age": 60.0}
    mesh.answer("/mesh/v1/grants", {"grants": {"a": grant}, "file": filed})
    result = run("grants", "ls")
    assert "a " in result.stdout
    assert "b (file)" in result.stdout
    assert "its previous content applies (60 s old): it is not valid TOML" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("content", "why"), [("[grants", "not valid TOML"), ("{", "not valid JSON"), ("x = 1", "must have one table")]
)
def test_a_file_with_grants_that_cannot_be_read_is_refused(run, tmp_path, content, why):
    (tmp_path / "grants").write_text(content)
    result = run("grants", "apply", "-f", str(tmp_path / "grants"))
    assert result.exit_code == 2
    assert why in " ".join(result.stderr.split())
