"""`mesh set` and `mesh settings`: their requests, their output, and wrong usage."""

import json

import pytest


def test_set_sends_what_was_said_and_nothing_else(run, mesh):
    """`mesh set` sends only the limits that are given. `none` removes a limit."""
    mesh.models["a"] = {"type": "t", "path": "/m", "key": ""}
    mesh.answer("/mesh/v1/models/a", mesh._status("a", {}) | {"min_copies": 2, "max_copies": 4, "pinned": True})
    result = run("set", "a", "--min", "2", "--max", "none", "--pinned", "yes")
    assert result.exit_code == 0, result.stderr
    assert mesh.requests[-1] == ("PATCH", "/mesh/v1/models/a", {"min_copies": 2, "max_copies": None, "pinned": True})
    assert "at least 2, at most 4, pinned" in result.stdout


@pytest.mark.parametrize("words", [(), ("--min", "x"), ("--max", "-1"), ("--pinned", "maybe")])
def test_what_cannot_be_set(run, mesh, words):
    """An invalid limit is wrong usage, and nothing is sent."""
    assert run("set", "a", *words).exit_code == 2
    assert mesh.requests == []


def test_settings_are_shown_set_and_cleared(run, mesh, tmp_path):
    """Settings are shown as text and as JSON, set from a file, and cleared. Unknown names and bad values are wrong
    usage."""
    mesh.answer("/mesh/v1/settings", {"settings": {"type_limits": '{"a": {"max": 1}}', "type_constraints": ""}})
    mesh.answer("/mesh/v1/settings/type_limits", {"name": "type_limits", "value": ""})
    assert '{"a": {"max": 1}}' in run("settings").stdout
    assert json.loads(run("settings", "--json").stdout) == {"type_limits": {"a": {"max": 1}}, "type_constraints": None}
    (tmp_path / "l.json").write_text('{"b": {"min": 1}}')
    assert run("settings", "type_limits", f"@{tmp_path}/l.json").exit_code == 0
    assert mesh.requests[-1][2] == {"b": {"min": 1}}
    assert run("settings", "type_limits", "--clear").exit_code == 0
    assert mesh.requests[-1][2] == {}
    for words in (("other",), ("type_limits", "{"), ("type_limits", "[]"), ("type_limits", "@/nowhere"), ("--clear",)):
        assert run("settings", *words).exit_code == 2, words
