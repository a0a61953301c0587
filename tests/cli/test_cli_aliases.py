"""Aliases and versions from the command line: `alias`, `register --version`, `rollback`, `versions`."""

import asyncio
import json
import os
import signal
import subprocess
import sys

import pytest
from aiohttp import web

from mesh.cli import top
from mesh.process import tethered
from tests.cli.conftest import failure
from tests.support.waiting import until

FRAUD = "/mesh/v1/aliases/fraud"


def alias(active="fraud@7", target=None, status=None, **more):
    """Returns an alias in the mesh's format."""
    target = target or active
    return {
        "id": "fraud",
        "owner": "",
        "status": status or ("DEFINED" if active == target else "TRANSITIONING"),
        "active": active,
        "target": target,
        "version": active.partition("@")[2],
        "target_version": target.partition("@")[2],
        "versions": {"7": "fraud@7", "8": "fraud@8"},
        "keep": 2,
        "weights": {},
        "sticky": "",
        "mirror": None,
        "models": [{"id": active, "status": "LOADED", "errors": [], "copies": 1}],
    } | more


def answers(mesh, path, *documents):
    """Sets the answers for a path. Each document is sent once, in order; the last one is repeated."""
    rest = list(documents)

    def answer():
        document = rest.pop(0) if len(rest) > 1 else rest[0]
        return document() if callable(document) else web.json_response(document)

    mesh.answer(path, make=answer)


def registered(mesh, *models):
    for model in models:
        mesh.models[model] = {"type": "onnx", "path": f"/models/{model}.onnx", "key": ""}


def missing():
    """Returns the answer for an alias that does not exist."""
    return failure(404, "UNKNOWN_MODEL", "there is no alias fraud")


def sent(mesh, method, path):
    return [body for verb, raw, body in mesh.requests if (verb, raw) == (method, path)]


@pytest.mark.parametrize(
    ("arguments", "body"),
    [
        (["fraud@8"], {"target": "fraud@8", "weights": {}}),
        (["fraud@8", "--force"], {"target": "fraud@8", "weights": {}, "force": True}),
        (["a=b@8"], {"target": "a=b@8", "weights": {}}),
        (["fraud@7=90", "fraud@8=10"], {"weights": {"fraud@7": 90, "fraud@8": 10}}),
        (["a=1=2"], {"weights": {"a=1": 2}}),
        (["--sticky", "X-User"], {"sticky": "x-user"}),
        (["--sticky", "none"], {"sticky": ""}),
        (["--mirror", "fraud@9=2.5"], {"mirror": {"target": "fraud@9", "share": 2.5}}),
        (["--mirror", "a=b"], {"mirror": {"target": "a=b", "share": 100}}),
        (["--mirror", "none"], {"mirror": None}),
        (["fraud@8", "--version", "8", "--keep", "0"], {"target": "fraud@8", "weights": {}, "version": "8", "keep": 0}),
    ],
)
def test_alias_set_sends_what_is_asked_for(mesh, run, arguments, body):
    """`mesh alias set` sends targets, weights, header and mirror in REST's format. Ids may contain `=`."""
    mesh.answer(FRAUD, alias())
    result = run("alias", "set", "fraud", *arguments)
    assert result.exit_code == 0, result.stderr
    assert sent(mesh, "PUT", FRAUD) == [{"force": False, "ready": True, "load": False} | body]
    assert "fraud@7 (version 7)" in result.stdout


@pytest.mark.parametrize("arguments", [[], ["a=1", "b"], ["a=1", "a=2"]], ids=["nothing", "no-weight", "twice"])
def test_alias_set_refuses_half_a_split(mesh, run, arguments):
    """`mesh alias set` refuses a call that sets nothing, a target without a weight, and a target that is named
    twice."""
    result = run("alias", "set", "fraud", *arguments)
    assert result.exit_code == 2
    assert mesh.requests == []


def test_a_version_is_registered_and_waited_for(mesh, run):
    """`mesh register --version` registers the version, says once which model gets the calls meanwhile, and at the end
    shows the moved alias."""
    moving = alias("fraud@7", "fraud@8")
    answers(mesh, FRAUD, alias(), moving, moving, moving, alias("fraud@8"))
    registered(mesh, "fraud@8")
    result = run("register", "fraud", "/new.onnx", "--version", "8", "--keep", "3", "--sha256", "ab")
    assert result.exit_code == 0, result.stderr
    model = {"type": "onnx", "path": "/new.onnx", "key": "", "sha256": "ab"}
    assert sent(mesh, "PUT", FRAUD) == [{"version": "8", "model": model, "keep": 3}]
    assert result.stderr.count("calls go to fraud@7 until fraud@8 is loaded") == 1
    assert "fraud@8 (version 8)" in result.stdout
    assert sent(mesh, "POST", "/mesh/v1/models/fraud%408/load") == [{"sync": True}]


def test_a_registered_model_becomes_the_first_version(mesh, run):
    """If a model is registered without versions, `mesh register --version` first makes it a version, so it keeps its
    calls until the new version is loaded."""
    registered(mesh, "fraud", "fraud@8")
    mesh.models["fraud"]["path"] = "/models/fraud/3/model.onnx"
    answers(mesh, FRAUD, missing, alias("fraud"), alias("fraud@8"))
    result = run("register", "fraud", "/new.onnx", "--version", "8", "--json")
    assert result.exit_code == 0, result.stderr
    first, second = sent(mesh, "PUT", FRAUD)
    assert first == {"target": "fraud", "version": "3", "expected_target": "fraud"}
    assert second["version"] == "8"
    assert json.loads(result.stdout)["active"] == "fraud@8"


def test_the_version_of_a_registered_model_is_not_given_away(mesh, run):
    """`mesh register --version` refuses a version number under which the registered model already answers, and changes
    nothing."""
    registered(mesh, "fraud")
    answers(mesh, FRAUD, missing)
    result = run("register", "fraud", "/new.onnx", "--version", "1")
    assert result.exit_code == 1
    assert "answers as version 1: give the new one another version" in result.stderr
    assert {method for method, _, _ in mesh.requests} == {"GET"}


def test_keep_needs_a_version(mesh, run):
    assert run("register", "fraud", "/new.onnx", "--keep", "1").exit_code == 2
    assert mesh.requests == []


def test_a_new_alias_whose_model_cannot_be_loaded_is_an_error(mesh, run):
    """`mesh register --version` reports the load's error if an alias's first version cannot be loaded."""
    broken = [{"id": "fraud@8", "status": "LOADING_FAILED", "errors": ["no such file"], "copies": 0}]
    answers(mesh, FRAUD, missing, alias("fraud@8", models=broken))
    mesh.answer("/mesh/v1/models/fraud%408/load", make=lambda: failure(500, "LOAD_FAILED", "no such file"))
    result = run("register", "fraud", "/new.onnx", "--version", "8")
    assert result.exit_code == 5
    assert "fraud is set, but fraud@8 is not loaded: no such file" in result.stderr


def test_a_move_whose_target_cannot_be_loaded_says_so(mesh, run):
    """A command that waits for a move says why the target could not be loaded, and how to give up the move."""
    failed = alias("fraud@7", "fraud@8", "TRANSITION_FAILED", why="no such file: /new.onnx")
    answers(mesh, FRAUD, alias("fraud@7", "fraud@8"), failed)
    result = run("alias", "set", "fraud", "fraud@8", "--json")
    assert result.exit_code == 5
    assert "calls of fraud still go to fraud@7, because fraud@8 could not be loaded: no such file" in result.stderr
    assert "`mesh alias set fraud fraud@7` cancels the move" in result.stderr
    assert json.loads(result.stdout)["status"] == "TRANSITION_FAILED"  # one document only


def test_a_move_that_takes_long_goes_on(mesh, run):
    """A command that times out before a move has ended says that the mesh continues the move. With --no-wait, it
    succeeds at once."""
    mesh.answer(FRAUD, alias("fraud@7", "fraud@8"))
    result = run("alias", "set", "fraud", "fraud@8", "--timeout", "0.01")
    assert result.exit_code == 6
    assert "the mesh continues the move" in result.stderr
    assert run("alias", "set", "fraud", "fraud@8", "--no-wait").exit_code == 0


def test_a_move_to_elsewhere_ends_the_wait(mesh, run):
    """A command stops waiting for a move if another request moves the alias to a different model."""
    answers(mesh, FRAUD, alias("fraud@7", "fraud@8"), alias("fraud@7", "fraud@9"))
    result = run("alias", "set", "fraud", "fraud@8")
    assert result.exit_code == 1
    assert "fraud now moves to fraud@9: another request has changed it" in result.stderr


async def test_ctrl_c_says_that_the_move_goes_on(mesh, tmp_path):
    mesh.answer(FRAUD, alias("fraud@7", "fraud@8"))
    argv = ["env", "--default-signal=INT"]  # tests that run in a shell's background ignore it
    argv += [sys.executable, "-P", "-m", "mesh", "-e", mesh.endpoint, "alias", "set", "fraud", "fraud@8"]
    environment = os.environ | {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    with subprocess.Popen(
        tethered(argv), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        await until(lambda: len(mesh.requests) > 3, timeout=60, why="the command waits")
        process.send_signal(signal.SIGINT)
        _, said = await asyncio.to_thread(process.communicate, timeout=30)
    assert process.returncode == 130
    assert "only this command ends, and the mesh continues moving fraud to fraud@8: `mesh alias show fraud`" in said


def test_rollback_goes_back(mesh, run):
    """`mesh rollback` requests the previous version, or the version that the command line names, and shows the
    alias."""
    mesh.answer(f"{FRAUD}/rollback", alias("fraud@7"))
    result = run("rollback", "fraud")
    assert result.exit_code == 0, result.stderr
    assert "fraud@7 (version 7)" in result.stdout
    run("rollback", "fraud", "--version", "6", "--force")
    assert sent(mesh, "POST", f"{FRAUD}/rollback") == [{"force": False}, {"force": True, "version": "6"}]


def test_versions_are_listed_with_who_gets_the_calls(mesh, run):
    """`mesh versions` lists the versions with the status of their models and their shares of the calls."""
    registered(mesh, "fraud@7")
    mesh.answer(FRAUD, alias("fraud@7", "fraud@8"))
    rows = [line.split() for line in run("versions", "fraud").stdout.splitlines()]
    assert rows[1:] == [["7", "fraud@7", "NOT_LOADED", "all"], ["8", "fraud@8", "NOT_FOUND", "next"]]
    mesh.answer(FRAUD, alias("fraud@7", weights={"fraud@7": 3, "fraud@8": 1}))
    listed = json.loads(run("versions", "fraud", "--json").stdout)
    assert [one["calls"] for one in listed["versions"]] == ["75 %", "25 %"]


def test_versions_of_what_is_no_alias(mesh, run):
    """`mesh versions` shows a plain model's only version, says that an alias has no versions, and exits with 3 if the
    name is unknown."""
    answers(mesh, FRAUD, missing)
    assert run("versions", "fraud").exit_code == 3
    registered(mesh, "fraud")
    assert "1        fraud  NOT_LOADED  all" in run("versions", "fraud").stdout
    mesh.answer(FRAUD, alias(versions={}))
    assert "fraud has no versions; its calls go to fraud@7" in run("versions", "fraud").stderr


def test_aliases_are_listed_page_by_page(mesh, run):
    """`mesh alias ls` reads all pages, and lists aliases with their splits, mirrors and stuck moves. Without any alias,
    it says so."""
    stuck = alias("fraud@7", "fraud@8", "TRANSITION_FAILED", why="no such file")
    split = alias(id="g", weights={"a": 90, "b": 10}, sticky="x-user", mirror={"target": "c", "share": 5.0})
    answers(mesh, "/mesh/v1/aliases", {"aliases": [stuck], "next": "fraud"}, {"aliases": [split], "next": None})
    result = run("alias", "ls", "f")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[1].split() == ["fraud", "fraud@7", "(version", "7)", "fraud@8", "no", "such", "file"]
    assert "90 % a, 10 % b, by x-user" in lines[2]
    assert "5 % c" in lines[2]
    assert mesh.requests[-1][1] == "/mesh/v1/aliases?prefix=f&after=fraud&limit=1000"
    answers(mesh, "/mesh/v1/aliases", {"aliases": [], "next": None})
    assert "no aliases whose names begin with x" in run("alias", "ls", "x").stderr


def test_an_alias_is_shown_and_deleted(mesh, run):
    """`mesh alias show` shows why a move is stuck and exits with 5. `mesh alias rm` exits with 3 if the alias does not
    exist."""
    mesh.answer(FRAUD, alias("fraud@7", "fraud@8", "TRANSITION_FAILED", why="no such file"))
    shown = run("alias", "show", "fraud")
    assert shown.exit_code == 5
    assert "no such file" in shown.stdout
    mesh.answer(FRAUD, {"id": "fraud", "existed": True})
    assert "deleted alias fraud" in run("alias", "rm", "fraud").stdout
    mesh.answer(FRAUD, {"id": "fraud", "existed": False})
    assert run("alias", "rm", "fraud").exit_code == 3
    assert run("alias", "rm", "fraud", "--missing-ok").exit_code == 0


def test_status_and_explain_know_aliases(mesh, run):
    """For an alias, `mesh status` and `mesh explain` show where its calls go, and that a move is stuck. `mesh explain`
    also explains the alias's models, even a missing one."""
    stuck = alias("fraud@7", "fraud@8", "TRANSITION_FAILED", why="no such file", mirror={"target": "x", "share": 5.0})
    mesh.answer(FRAUD, stuck)
    mesh.answer(
        "/mesh/v1/models/fraud%407/explain", {"id": "fraud@7", "lines": ["It is loaded in pod-1."], "ranking": []}
    )
    mesh.answer("/mesh/v1/models/fraud%408/explain", make=lambda: failure(404, "UNKNOWN_MODEL", "model not found"))
    mesh.answer("/mesh/v1/models/x/explain", {"id": "x", "lines": [], "ranking": [{"pod": "pod-2", "why": "free"}]})
    status = run("status", "fraud")
    assert status.exit_code == 5
    assert "5 % also to x" in status.stdout
    assert "fraud@8 cannot be loaded; calls still go to fraud@7" in status.stderr
    explained = run("explain", "fraud")
    assert explained.exit_code == 0, explained.stderr
    assert explained.stdout.splitlines()[:8] == [
        "fraud is an alias: its calls go to fraud@7 (version 7).",
        "It has not moved to fraud@8 (version 8), because that model could not be loaded: no such file.",
        "The mesh tries again; `mesh alias set fraud fraud@7` cancels the move.",
        "A copy of 5 % of its calls goes to x, as a shadow.",
        "It has the versions 7, 8, and keeps 2 before the present one.",
        "It names fraud@8 (target, version 8), which is not registered.",
        "",
        "fraud@7",
    ]
    document = json.loads(run("explain", "fraud", "--json").stdout)
    assert [model["id"] for model in document["models"]] == ["fraud@7", "x"]
    mesh.answer(FRAUD, alias("fraud@7", "fraud@8"))
    assert "moves to" in run("status", "fraud").stdout
    moving = "It moves to fraud@8 (version 8) when that model has as many loaded copies as fraud@7."
    assert moving in run("explain", "fraud").stdout


def test_ls_names_the_aliases_of_models(mesh, run):
    """`mesh ls` has a column of aliases if an alias names any listed model. If too many aliases exist to show them, the
    command says so."""
    registered(mesh, "a", "fraud@7")
    assert "ALIASES" not in run("ls").stdout
    mesh.answer("/mesh/v1/aliases", {"aliases": [alias(), alias(id="other")], "next": None})
    rows = [line.split()[:4] for line in run("ls").stdout.splitlines()]
    assert rows == [
        ["MODEL", "TYPE", "PODS", "ALIASES"],
        ["a", "onnx", "-", "-"],
        ["fraud@7", "onnx", "-", "fraud,other"],
    ]
    assert "fraud,other" in run("ls", "--all").stdout
    mesh.answer("/mesh/v1/aliases", {"aliases": [alias()], "next": "fraud"})
    many = run("ls")
    assert "ALIASES" not in many.stdout
    assert "more than 1000 aliases" in many.stderr


def test_top_shows_aliases_by_model():
    """`mesh top` shows calls and errors of aliases by model, the busiest first."""
    pairs = [{"alias": "f", "model": model, "calls": 10, "errors": 0} for model in ("a", "b", "idle")]
    later = [
        {**one, "calls": calls, "errors": errors}
        for one, calls, errors in zip(pairs, (20, 50, 10), (5, 0, 0), strict=True)
    ]
    frame = top.compare(top.Sample(0.0, {"aliases": pairs}, ()), top.Sample(2.0, {"aliases": later}, ()))
    assert frame.aliases == (("f", "b", 20.0, 0.0), ("f", "a", 5.0, 2.5))
