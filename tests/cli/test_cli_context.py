"""Named meshes (contexts): their precedence, the contents of their file, and safe writes."""

import json
import os
import stat
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from mesh.cli import contexts
from mesh.cli.app import build

NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which this test's contexts are stored."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in ("MESH_ENDPOINT", "MESH_CONTEXT", "MESH_CA", "MESH_CERT", "MESH_KEY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "config" / "mesh" / "contexts.toml"


def run(*arguments: str):
    return CliRunner().invoke(build(), list(arguments))


def reached(*arguments: str) -> str:
    """Runs a command, and returns the endpoint that it tried. Nothing answers at any endpoint here."""
    result = run(*arguments)
    assert result.exit_code == 4, result.output
    return result.stderr.partition(" at ")[2].partition(": is the mesh")[0]


def test_a_context_is_made_listed_used_and_removed(file: Path) -> None:
    assert "and the current one" in run("context", "set", "prod", "--endpoint", "mesh.example:8033").stdout
    assert run("context", "set", "test", "-e", "https://test.example").exit_code == 0
    answer = json.loads(run("context", "ls", "--json").stdout)
    assert (answer["current"], [one["name"] for one in answer["contexts"]]) == ("prod", ["prod", "test"])
    assert answer["contexts"][0]["endpoint"] == "http://mesh.example:8033"
    assert run("context", "use", "test").exit_code == 0
    assert "*  test" in run("context", "ls").stdout
    assert run("context", "rm", "test").exit_code == 0
    assert json.loads(run("context", "ls", "--json").stdout)["current"] is None
    assert tomllib.loads(file.read_text()) == {"contexts": {"prod": {"endpoint": "http://mesh.example:8033"}}}


def test_the_file_is_its_owners_alone(file: Path) -> None:
    run("context", "set", "prod", "--endpoint", NOBODY)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert os.listdir(file.parent) == [file.name]


def test_what_is_said_comes_before_what_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The endpoint comes from the option, the variable, the context or the default, in this order. --context on the
    command line counts as an option."""
    for name, port in (("one", 11), ("two", 12)):
        run("context", "set", name, "--endpoint", f"http://127.0.0.1:{port}")
    assert reached("pods") == "http://127.0.0.1:11"
    monkeypatch.setenv("MESH_CONTEXT", "two")
    assert reached("pods") == "http://127.0.0.1:12"
    monkeypatch.setenv("MESH_ENDPOINT", "http://127.0.0.1:13")
    assert reached("pods") == "http://127.0.0.1:13"
    assert reached("--context", "one", "pods") == "http://127.0.0.1:11"
    assert reached("--context", "one", "--endpoint", "http://127.0.0.1:14", "pods") == "http://127.0.0.1:14"
    assert reached("--context", "one", "pods", "--endpoint", "http://127.0.0.1:15") == "http://127.0.0.1:15"


def test_without_contexts_nothing_changes(file: Path) -> None:
    run("context", "set", "one", "--endpoint", "http://127.0.0.1:11")
    assert run("context", "use", "--none").exit_code == 0
    result = run("pods", "--endpoint", NOBODY)
    assert NOBODY in result.stderr


def test_files_of_a_context_are_used(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that a context names are found from any current folder. Options override them."""
    monkeypatch.chdir(tmp_path)
    Path("ca.crt").write_text("no certificate")
    assert run("context", "set", "one", "--endpoint", "https://127.0.0.1:9", "--ca", "ca.crt").exit_code == 0
    monkeypatch.chdir("/")
    assert str(tmp_path / "ca.crt") in run("pods").stderr
    other = tmp_path / "other.crt"
    other.write_text("none either")
    assert str(other) in run("--ca", str(other), "pods").stderr
    assert run("context", "set", "one", "--ca", "").exit_code == 0
    assert "ca" not in tomllib.loads(file.read_text())["contexts"]["one"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["context", "set", "new"], "give --endpoint to create it"),
        (["context", "set", "a b", "--endpoint", NOBODY], "not a valid name for a context"),
        (["context", "set", "a", "--endpoint", "ftp://x"], "is not an endpoint"),
        (["context", "set", "a", "--endpoint", "ftp://u:secret@x"], "the text given is not an endpoint"),
        (["context", "set", "a", "--endpoint", NOBODY, "--ca", "/no/such"], "there is no file /no/such"),
        (["context", "use", "nowhere"], "there is no context 'nowhere'"),
        (["context", "use"], "either the name of a context or --none"),
        (["context", "use", "prod", "--none"], "either the name of a context or --none"),
        (["context", "rm", "nowhere"], "there is no context 'nowhere'"),
        (["--context", "nowhere", "pods"], "there is no context 'nowhere'"),
        (["--context", "nowhere", "doctor", "--only", "mesh"], "there is no context 'nowhere'"),
    ],
)
def test_what_cannot_be_is_said(file: Path, arguments: list[str], said: str) -> None:
    """Wrong usage is refused, and no file is written."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert not file.exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("current = x\n", "line 1"),
        ("\x00", "cannot be used"),
        ("[contexts]\na = 1", "table of strings"),
        ("[contexts.a]\nendpoint = 1", "table of strings"),
        ('[contexts.a]\nendpoint = "ftp://x"', "not an endpoint"),
        ("[contexts.a]\nca = 'x'", "not an endpoint"),
        ('[contexts.a]\nendpont = "x"', "'endpont' in the context 'a' is unknown"),
        ('curent = "a"', "'curent' is unknown"),
        ('current = "a"', "not among its contexts"),
        ("current = 1", "`current` must be a name"),
    ],
)
def test_a_bad_file_is_named_with_the_fault(file: Path, content: str, said: str) -> None:
    """Commands report a broken file of contexts with its path and its fault, and leave it unchanged. The help still
    works."""
    file.parent.mkdir(parents=True)
    file.write_text(content)
    for arguments in (["pods"], ["context", "ls"], ["context", "set", "b", "--endpoint", NOBODY]):
        result = run(*arguments)
        assert result.exit_code == 2, result.output
        assert str(file) in result.stderr
        assert said in result.stderr
    assert file.read_text() == content
    assert run("--help").exit_code == 0, "the help needs no contexts"


def test_a_file_that_is_a_link_stays_one(file: Path, tmp_path: Path) -> None:
    """If the file of contexts is a symbolic link, it stays one, because some users keep their settings elsewhere."""
    kept = tmp_path / "kept.toml"
    kept.write_text("")
    file.parent.mkdir(parents=True)
    file.symlink_to(kept)
    assert run("context", "set", "a", "--endpoint", NOBODY).exit_code == 0
    assert file.is_symlink()
    assert NOBODY in kept.read_text()


def test_a_user_without_a_home_has_no_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user may have no home directory, as in containers. Commands then work without contexts."""

    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    assert run("pods", "--endpoint", NOBODY).exit_code == 4


@given(st.text(st.characters(blacklist_categories=["Cs"])))
def test_any_path_is_read_as_it_was_written(text: str) -> None:
    written = contexts.Contexts("a", {"a": contexts.Context(NOBODY, ca=text)})
    found = tomllib.loads(contexts._text(written))["contexts"]["a"]
    assert found.get("ca", "") == text
