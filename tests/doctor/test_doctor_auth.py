"""The doctor's findings about tokens, based on what a router reports."""

import pytest

from mesh.cli.doctor import authchecks

FINE = {
    "kind": "tokens",
    "issuer": "https://login.example.com",
    "audiences": ["mesh"],
    "keys": 2,
    "age": 30.0,
    "trouble": "",
    "clock_ahead": 0.2,
}
REVIEWED = {"kind": "tokens", "issuer": "kubernetes", "audiences": ["mesh"], "trouble": "", "verdicts": 3}


def found(*tokens, mode="required", endpoint="https://mesh.example.com"):
    """Returns the level, the check and the text of each finding; the text includes what to do."""
    stats = {"auth": {"mode": mode, "callers": [{"kind": "keys"}, *tokens]}}
    return [(one.level.value, one.check, f"{one.what}; {one.todo}") for one in authchecks.check(stats, endpoint)]


@pytest.mark.parametrize("stats", [{}, {"auth": None}, {"auth": {}}, {"auth": {"mode": "off", "callers": [FINE]}}])
def test_an_open_mesh_has_no_findings(stats):
    assert list(authchecks.check(stats, "http://mesh.example.com")) == []


@pytest.mark.parametrize("tokens", [FINE, REVIEWED])
def test_tokens_that_work_are_ok(tokens):
    ((level, check, text),) = found(tokens)
    assert (level, check) == ("ok", "tokens")
    assert "are accepted if they are for mesh" in text


@pytest.mark.parametrize(
    ("changed", "level", "check", "part"),
    [
        (
            {"keys": 0, "age": None, "trouble": "https://x/keys answers 404"},
            "FAIL",
            "tokens",
            "refused: https://x/keys",
        ),
        (
            {"age": 1200.0, "trouble": "no answer"},
            "FAIL",
            "tokens",
            "the keys of 20 minutes ago stay in use: no answer",
        ),
        ({"keys": 0, "age": None}, "warn", "tokens", "have not been read yet"),
        ({"clock_ahead": 300.0}, "FAIL", "clock", "a router's clock is 300 s ahead of that of https://login"),
        ({"clock_ahead": -300.0}, "FAIL", "clock", "300 s behind"),
    ],
)
def test_what_is_wrong_with_an_issuer_is_said(changed, level, check, part):
    assert any((level, check) == one[:2] and part in one[2] for one in found({**FINE, **changed}))


def test_what_is_wrong_with_reviews_is_said():
    ((level, _, text),) = found({**REVIEWED, "trouble": "bind its ServiceAccount to system:auth-delegator"})
    assert level == "FAIL"
    assert "auth-delegator" in text
    assert ("warn", "audience") in [one[:2] for one in found({**REVIEWED, "audiences": []})]


@pytest.mark.parametrize(
    ("endpoint", "warned"),
    [("http://mesh.example.com:8033", True), ("http://127.0.0.1:8033", False), ("http://[::1]:8033", False)],
)
def test_keys_that_travel_without_tls_are_a_warning(endpoint, warned):
    assert (("warn", "auth") in [one[:2] for one in found(endpoint=endpoint)]) is warned
