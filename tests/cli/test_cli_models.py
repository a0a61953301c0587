"""Registering, listing and loading models from the command line, and showing their status."""

import asyncio
import json
import pickle

import pytest
from aiohttp import web

from mesh.cli import servers
from mesh.modelservers import environments
from tests.cli.conftest import failure
from tests.support import models


def register(mesh, *models):
    for model in models:
        mesh.models[model] = {"type": "onnx", "path": f"/models/{model}.onnx", "key": ""}


def test_register_sends_the_model_and_shows_its_status(mesh, run):
    """The id is percent-encoded in the path of the request, including its slashes."""
    result = run("register", "fraud/de ä", "/models/a.onnx", "--key", '{"storage_key": "x"}', "--load", "--wait")
    assert result.exit_code == 0, result.stderr
    method, path, body = mesh.requests[-1]
    assert (method, path) == ("PUT", "/mesh/v1/models/fraud%2Fde%20%C3%A4")
    assert body == {
        "type": "onnx",
        "path": "/models/a.onnx",
        "key": {"storage_key": "x"},
        "load": True,
        "sync": True,
    }
    assert "LOADED" in result.stdout
    assert "pod-1" in result.stdout


def test_register_makes_a_local_file_absolute(mesh, run, tmp_path, monkeypatch):
    """The path of a local file becomes absolute, because pods have another current folder. URLs stay unchanged, and so
    do all paths with a storage key."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.onnx").touch()
    run("register", "a", "m.onnx")
    assert mesh.requests[-1][2]["path"] == str(tmp_path / "m.onnx")
    run("register", "b", "https://store.example/m.onnx")
    assert mesh.requests[-1][2]["path"] == "https://store.example/m.onnx"
    for key in ('{"storage_key": "minio"}', "minio"):
        run("register", "c", "m.onnx", "--key", key)
        assert mesh.requests[-1][2]["path"] == "m.onnx"
        assert mesh.requests[-1][2]["key"] == {"storage_key": "minio"}


def test_register_says_what_a_file_is_that_is_no_onnx_model(mesh, run, tmp_path):
    """`mesh register` warns about a local file that clearly does not have the given type. The model is registered
    nevertheless, because the file may still be replaced."""
    booster, net = tmp_path / "model.json", tmp_path / "net.onnx"
    booster.write_bytes(b'{"learner":{}}')
    net.write_bytes(models.constant(1.0))
    result = run("register", "trees", str(booster), "--type", "onnx")
    assert (result.exit_code, mesh.requests[-1][0]) == (0, "PUT")
    assert "model.json is an XGBoost model in JSON, not an ONNX model" in result.stderr
    assert "--type xgboost" in result.stderr
    for arguments in ((str(booster), "--type", "xgboost"), (str(net),), ("/models/elsewhere.onnx",)):
        assert run("register", "m", *arguments).stderr == ""


def test_register_guesses_the_type_and_says_so(mesh, run, tmp_path):
    """Without `--type`, the file's content or name decides the type, and a remark says on what the guess is based.
    Otherwise the type is onnx."""
    (tmp_path / "churn.joblib").write_bytes(pickle.dumps("sklearn.pipeline"))
    result = run("register", "churn", str(tmp_path / "churn.joblib"))
    assert mesh.requests[-1][2]["type"] == "sklearn"
    assert "type sklearn: it is a pickle of a scikit-learn model (--type names another one)" in result.stderr
    result = run("register", "trees", "s3://models/trees.ubj")
    assert mesh.requests[-1][2]["type"] == "xgboost"
    assert "its name ends in .ubj" in result.stderr
    run("register", "net", "s3://models/net")
    assert mesh.requests[-1][2]["type"] == "onnx"


@pytest.fixture
def no_pod(mesh, monkeypatch, tmp_path):
    """Makes a mesh without a pod for scikit-learn models, on a machine without MLServer."""
    monkeypatch.setenv(environments.VARIABLE, str(tmp_path / "servers"))
    register(mesh, "churn")
    note = {"notes": ["no pod accepts models of type sklearn: the pods of this mesh accept onnx"]}
    mesh.answer("/mesh/v1/models/churn", mesh._status("churn", {}) | note)


def test_register_names_the_commands_for_a_server_that_is_missing(mesh, run, no_pod, monkeypatch):
    """Without a terminal, a remark names the commands for the missing server. The command asks nothing and installs
    nothing."""
    monkeypatch.setattr(servers, "shown", lambda kind: pytest.fail("installed without a question"))
    result = run("register", "churn", "/models/churn.joblib")
    assert result.exit_code == 0, result.stderr
    assert "mesh servers install mlserver, then mesh up --server mlserver=1 --allow-code" in result.stderr


@pytest.mark.parametrize(("answer", "installs"), [("y", True), ("n", False), ("", False)])
def test_register_offers_to_install_a_server(mesh, run, no_pod, monkeypatch, answer, installs):
    """On a terminal, the command asks, and installs the server only if the answer is yes. With --json it does not ask,
    because that output is for programs."""
    installed = []
    monkeypatch.setattr(servers, "_interactive", lambda: True)
    monkeypatch.setattr(servers, "shown", lambda kind: installed.append(kind.name))
    result = run("register", "churn", "/models/churn.joblib", stdin=answer + "\n")
    assert result.exit_code == 0, result.stderr
    assert "Install mlserver" in result.stderr
    assert installed == (["mlserver"] if installs else [])
    assert "Install mlserver" not in run("register", "churn", "/models/churn.joblib", "--json", stdin="y\n").stderr


@pytest.mark.parametrize("key", ['{"not": json', "@/no/such/file"], ids=["json", "file"])
def test_a_bad_key_is_wrong_usage(mesh, run, key):
    result = run("register", "a", "/a", "--key", key)
    assert result.exit_code == 2
    assert not mesh.requests


def test_register_with_wait_fails_where_the_load_failed(mesh, run):
    """`mesh register --wait` exits with the code for a failed load, and prints only one JSON document."""
    register(mesh, "a")
    status = mesh._status("a", {}) | {"status": "LOADING_FAILED", "errors": ["no such file: /a"]}
    mesh.answer("/mesh/v1/models/a", status)
    result = run("register", "a", "/a", "--wait", "--json")
    assert result.exit_code == 5
    assert json.loads(result.stdout)["errors"] == ["no such file: /a"]  # one document only


@pytest.mark.parametrize(
    ("http", "reason", "code"),
    [
        pytest.param(409, "CONFLICT", 1, id="conflict"),
        pytest.param(404, "UNKNOWN_MODEL", 3, id="unknown"),
        pytest.param(500, "LOAD_FAILED", 5, id="load-failed"),
        pytest.param(503, "QUARANTINED", 5, id="quarantined"),
        pytest.param(503, "NOWHERE", 5, id="nowhere"),
        pytest.param(429, "NO_ROOM", 6, id="no-room"),
        pytest.param(503, "NOT_IN_TIME", 6, id="not-in-time"),
        pytest.param(503, "FROM_A_LATER_VERSION", 1, id="unknown-reason"),
    ],
)
def test_each_reason_has_its_exit_code(mesh, run, http, reason, code):
    """An error's reason decides the exit code. Its text is on standard error; with --json, standard output has it in a
    document."""
    mesh.answer("/mesh/v1/models/a", make=lambda: failure(http, reason, "because [of] this", retry_after=2.5))
    result = run("status", "a")
    assert result.exit_code == code
    assert "because [of] this (try again in 2.5 s)" in result.stderr
    assert result.stdout == ""
    document = json.loads(run("status", "a", "--json").stdout)
    assert document == {"error": "because [of] this (try again in 2.5 s)", "reason": reason, "exit": code}


def test_unregister_says_which_were_not_there(mesh, run):
    """`mesh unregister` names models that were not registered and unregisters the others. With --missing-ok a missing
    model is not a failure."""
    register(mesh, "a")
    result = run("unregister", "a", "b")
    assert result.exit_code == 3
    assert "unregistered a" in result.stdout
    assert "not registered: b" in result.stderr
    assert mesh.models == {}
    again = run("unregister", "a", "--missing-ok", "--json")
    assert again.exit_code == 0
    assert json.loads(again.stdout) == {"unregistered": [], "missing": ["a"]}


def test_many_are_unregistered_after_they_are_counted(mesh, run, monkeypatch):
    """`mesh unregister` with `--prefix` and `--all-of-type` counts the matching models. Without a terminal to ask, it
    unregisters them only with --yes. Models that stay are named, with exit code 1."""
    register(mesh, "a/1", "a/2", "a/3", "b")
    mesh.models["a/3"]["type"] = "other"
    refused = run("unregister", "--prefix", "a/")
    assert refused.exit_code == 2
    assert "Unregister 3 models whose ids begin with a/? There is no terminal to ask: use --yes" in refused.stderr
    assert len(mesh.models) == 4
    monkeypatch.setattr("mesh.cli.removal.CHUNK", 1)
    done = run("unregister", "--prefix", "a/", "--all-of-type", "onnx", "--yes")
    assert done.exit_code == 0, done.stderr
    assert done.stdout == "unregistered 2 of 2 models of type onnx whose ids begin with a/\n"
    assert list(mesh.models) == ["a/3", "b"]
    mesh.models["b"]["named"] = True
    stays = run("unregister", "--all-of-type", "onnx", "--yes", "--json")
    assert stays.exit_code == 1
    error = {"id": "b", "reason": "PRECONDITION", "text": "Model b has referents"}
    assert json.loads(stays.stdout) == {"unregistered": 0, "missing": 0, "failed": 1, "errors": [error]}
    assert "b: Model b has referents" in run("unregister", "--all-of-type", "onnx", "--yes").stderr
    nothing = run("unregister", "--prefix", "x")
    assert (nothing.exit_code, nothing.stdout) == (0, "unregistered 0 of 0 models whose ids begin with x\n")


@pytest.mark.parametrize("arguments", [[], ["a", "--prefix", "b"]], ids=["nothing", "both"])
def test_unregister_takes_ids_or_what_they_have_alike(mesh, run, arguments):
    """`mesh unregister` without ids or options, or with both, is wrong usage."""
    assert run("unregister", *arguments).exit_code == 2
    assert mesh.requests == []


@pytest.mark.parametrize("command", ["import", "unregister"])
def test_batches_wait_for_a_busy_worker(mesh, run, monkeypatch, command):
    """`mesh import` and `mesh unregister --prefix` retry a batch if a worker is too busy. If the worker stays busy,
    they end with its refusal."""
    monkeypatch.setattr("mesh.cli.parallel._PAUSE", 0.0)
    register(mesh, "a")
    path, outcome = ("/mesh/v1/models:" + command), {"import": "created", "unregister": "unregistered"}[command]
    arguments = {"import": ["-"], "unregister": ["--prefix", "a", "--yes"]}[command]
    answers = ["busy", "busy", json.dumps({"finished": True, outcome: 1})]

    def busy():
        return failure(429, "OVERLOADED", "2 imports are under way in this worker", retry_after=5)

    mesh.answer(path, make=lambda: busy() if (said := answers.pop(0)) == "busy" else web.Response(text=said))
    result = run(command, *arguments, stdin='{"id": "a", "type": "t"}')
    assert result.exit_code == 0, result.stderr
    assert f"1 {outcome}" in result.stdout or f"{outcome} 1 of 1" in result.stdout
    assert answers == []
    monkeypatch.setattr("mesh.cli.parallel.BUSY_SECONDS", -1.0)
    mesh.answer(path, make=busy)
    assert run(command, *arguments, stdin='{"id": "a", "type": "t"}').exit_code == 6


def test_a_removal_that_breaks_off_says_how_to_go_on(mesh, run):
    register(mesh, "a")
    text = '{"error": {"line": null, "reason": "REGISTRY_AWAY", "text": "etcd is away"}}\n{"finished": false}\n'
    mesh.answer("/mesh/v1/models:unregister", make=lambda: web.Response(text=text))
    result = run("unregister", "--prefix", "a", "--yes")
    assert result.exit_code == 6
    assert "etcd is away (after 0 models; run the same command again to continue)" in result.stderr


def test_a_relative_path_becomes_absolute_or_is_refused(mesh, run, tmp_path, monkeypatch):
    """A relative path becomes absolute if the file exists here. Otherwise it is refused unless a storage key is given,
    because pods have another current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/m.onnx").touch()
    here = str(tmp_path / "sub/m.onnx")
    for given, sent in (
        ("sub/m.onnx", here),
        ("./sub/../sub/m.onnx", here),
        ("file:sub/m.onnx", here),
        ("sub", str(tmp_path / "sub")),
        ("/no/such/m.onnx", "/no/such/m.onnx"),
        ("file:///no/such", "file:///no/such"),
        ("s3://bucket/m", "s3://bucket/m"),
        ("hf:owner/repo", "hf:owner/repo"),
    ):
        assert run("register", "m", given).exit_code == 0, given
        assert mesh.requests[-1][2]["path"] == sent
    count = len(mesh.requests)
    for given in ("other/m.onnx", "./m.onnx", "../m.onnx", "m.onnx", "file:m.onnx", ""):
        result = run("register", "m", given)
        assert result.exit_code == 2, given
        assert "--key" in result.stderr
    assert len(mesh.requests) == count
    assert run("register", "m", "other/m.onnx", "--key", "minio").exit_code == 0
    assert mesh.requests[-1][2]["path"] == "other/m.onnx"


def test_ls_says_why_a_model_cannot_be_loaded(mesh, run):
    """If a model could not be loaded, `mesh ls` says why in the last column, shortened if necessary. Without failures
    it omits the column."""
    register(mesh, "a", "b", "c", "d")
    assert "WHY" not in run("ls").stdout
    mesh.models["b"] |= {"errors": ["s3://bucket/b: not found\nreally", "older"], "quarantined": False}
    mesh.models["c"] |= {"errors": ["quarantined, a server died of it: SIGSEGV"], "quarantined": True}
    mesh.models["d"] |= {"errors": ["x" * 1000], "pods": ["pod-1"]}
    lines = run("ls").stdout.splitlines()
    assert len(lines) == 5
    assert lines[0].endswith("WHY")
    assert lines[1].split()[:3] == ["a", "onnx", "-"]
    assert "failed: s3://bucket/b: not found" in lines[2]
    assert lines[2].split()[2] == "failed"
    assert "older" not in lines[2]
    assert "quarantined" in lines[3].split()[2]
    assert "SIGSEGV" in lines[3]
    assert lines[4].split()[2] == "pod-1"
    assert len(lines[4]) < 300


def test_ls_shows_a_page_and_how_to_go_on(mesh, run):
    """`mesh ls` shows one page and says how to list the rest. Its argument is a prefix of ids."""
    register(mesh, "a/1", "a/2", "a/3", "b")
    mesh.models["a/1"] |= {"pods": ["pod-2"], "resident": True}
    result = run("ls", "a/", "--limit", "2")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["MODEL", "a/1", "a/2"]
    assert "pod-2" in result.stdout
    assert "--after a/2" in result.stderr
    rest = run("ls", "a/", "--after", "a/2", "--json")
    assert [model["id"] for model in json.loads(rest.stdout)["models"]] == ["a/3"]


@pytest.mark.parametrize("count", [0, 1, 2500], ids=["none", "one", "pages"])
def test_ls_all_lists_every_page(mesh, run, count):
    ids = [f"model-{number:05d}" for number in range(count)]
    register(mesh, *ids)
    result = run("ls", "--all", "--json")
    assert [model["id"] for model in json.loads(result.stdout)["models"]] == ids
    table = run("ls", "-a")
    assert sum(line.startswith("model-") for line in table.stdout.splitlines()) == count


def test_ids_do_not_move_the_terminal(mesh, run):
    """Control characters in ids are printed as escapes, because a terminal would obey them."""
    register(mesh, "a\x1b[2Jb")
    assert "a\\x1b[2Jb" in run("ls").stdout


def test_nothing_is_cut_in_a_pipe(mesh, run):
    long = "x" * 500
    register(mesh, long)
    assert f"/models/{long}.onnx" in run("ls").stdout


def test_status_shows_why_a_model_may_not_be_loaded(mesh, run):
    """`mesh status` shows why a model may not be loaded, with errors, server deaths and what to do. The exit code shows
    this too."""
    register(mesh, "a")
    status = mesh._status("a", {}) | {
        "quarantined": True,
        "killed": ["pod-1: SIGSEGV in its load"],
        "errors": ["[x] y"],
    }
    mesh.answer("/mesh/v1/models/a", status)
    result = run("status", "a")
    assert result.exit_code == 5
    for text in ("SIGSEGV in its load", "[x] y", "mesh release"):
        assert text in result.stdout


def test_status_shows_how_far_a_pull_is(mesh, run):
    """For a copy that is being loaded, `mesh status` shows the bytes, total and rate of the pull, as far as they are
    known."""
    register(mesh, "a")
    for pull, text in (
        ({"bytes": 3 << 20, "of": 1 << 30, "rate": 2 << 20}, "LOADING 3.0 MiB of 1.0 GiB, 2.0 MiB/s"),
        ({"bytes": 0, "of": None, "rate": 0}, "LOADING 0 B"),
    ):
        copy = {"pod": "pod-1", "status": "LOADING", "pull": pull}
        mesh.answer("/mesh/v1/models/a", mesh._status("a", {}) | {"copies": [copy]})
        assert text in run("status", "a").stdout


@pytest.mark.parametrize(
    ("load", "text"),
    [
        ({"state": "waiting", "ahead": 3, "expected_ms": 2500}, "LOADING waits for 3 others, about 2.5 s"),
        ({"state": "waiting", "ahead": 1, "expected_ms": 0}, "LOADING waits for 1 other"),
        ({"state": "waiting", "ahead": 0, "expected_ms": 0}, "LOADING waits"),
        ({"state": "loading", "ahead": 0, "expected_ms": 300}, "LOADING about 300 ms"),
        ({"state": "loading", "ahead": 0, "expected_ms": 0}, "LOADING"),
    ],
)
def test_status_shows_where_a_load_stands_in_the_queue(mesh, run, load, text):
    """For a copy that is not loaded yet, `mesh status` shows how many loads are before it, and when its load should be
    done, as far as that is known."""
    register(mesh, "a")
    copy = {"pod": "pod-1", "status": "LOADING", "load": load}
    mesh.answer("/mesh/v1/models/a", mesh._status("a", {}) | {"copies": [copy]})
    assert text in run("status", "a").stdout


def test_load_waits_unless_told_otherwise(mesh, run):
    """`mesh load` asks the mesh to wait (`sync`) unless --no-wait is given. For an unknown model, it exits with 3."""
    register(mesh, "a")
    assert run("load", "a").exit_code == 0
    assert mesh.requests[-1] == ("POST", "/mesh/v1/models/a/load", {"sync": True})
    assert run("load", "a", "--no-wait").exit_code == 0
    assert mesh.requests[-1][2] == {"sync": False}
    assert run("load", "b").exit_code == 3


def test_release_and_explain(mesh, run):
    """`mesh release` confirms the release. `mesh explain` prints the mesh's texts unchanged, and the ranking of
    pods."""
    register(mesh, "a")
    assert "released a" in run("release", "a").stdout
    lines = ["a is in no pod.", "It would go to pod-2 [it has room]."]
    mesh.answer(
        "/mesh/v1/models/a/explain",
        {"id": "a", "lines": lines, "ranking": [{"pod": "pod-2", "why": "most room"}], "copies": []},
    )
    result = run("explain", "a")
    for text in [*lines, "pod-2", "most room"]:
        assert text in result.stdout
    assert json.loads(run("explain", "a", "--json").stdout)["lines"] == lines


def moving(why: str = "", *, generation: int = 3) -> dict[str, object]:
    """Returns a model whose copies are being replaced."""
    copies = [
        {"pod": "pod-1", "status": "LOADED", "bytes": 5, "generation": generation - 1, "digest": "a" * 64},
        {"pod": "pod-2", "status": "LOADED", "bytes": 5, "generation": generation, "digest": "b" * 64},
    ]
    return {
        "id": "a",
        "status": "LOADED",
        "generation": generation,
        "digest": "b" * 64,
        "copies": copies,
        "reload": {"generation": generation, "why": why},
    }


def test_reload_waits_until_all_copies_have_moved(mesh, run):
    """`mesh reload` polls until all copies are replaced, and marks the old ones in its output."""
    looks = iter([moving(), moving(), {**moving(), "reload": None}])
    mesh.answer("/mesh/v1/models/a/reload", moving())
    mesh.answers["/mesh/v1/models/a"] = lambda: web.json_response(next(looks))
    result = run("reload", "a")
    assert result.exit_code == 0
    assert [request[0] for request in mesh.requests] == ["POST", "GET", "GET", "GET"]
    for text in ("a" * 12, "b" * 12, "before the reload"):
        assert text in result.stdout


def test_reload_that_is_not_waited_for_and_one_that_does_not_come(mesh, run):
    """With --no-wait, a reload returns at once. A reload that fails or takes too long exits with the code for a failed
    load, and a failure is shown with its reason."""
    mesh.answer("/mesh/v1/models/a/reload", moving())
    assert run("reload", "a", "--no-wait").exit_code == 0
    mesh.answer("/mesh/v1/models/a", moving("pod-1: this is no model"))
    result = run("reload", "a")
    assert result.exit_code == 5
    assert "pod-1: this is no model" in result.stderr
    assert "this is no model" in result.stdout
    mesh.answer("/mesh/v1/models/a", moving())
    result = run("reload", "a", "--timeout", "0.4")
    assert result.exit_code == 5
    assert "within 0.4 s" in result.stderr


def test_where_nothing_answers_it_says_what_to_do(run):
    """If nothing answers at the endpoint, the exit code is 4 and the error says what to do."""
    result = run("ls", "--endpoint", "127.0.0.1:9")
    assert result.exit_code == 4
    for text in ("http://127.0.0.1:9", "mesh up", "MESH_ENDPOINT"):
        assert text in result.stderr


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: web.Response(text="<html>hello</html>", content_type="text/html"), id="html"),
        pytest.param(lambda: web.Response(status=404, text="404: Not Found"), id="404-of-another"),
        pytest.param(lambda: web.json_response({"detail": "no"}, status=404), id="json-of-another"),
        pytest.param(lambda: web.json_response([1]), id="no-object"),
    ],
)
def test_another_program_at_the_endpoint_is_told_apart(mesh, run, make):
    """An answer from another program at the endpoint is reported as not coming from a mesh."""
    mesh.answer("/mesh/v1/pods", make=make)
    result = run("pods")
    assert result.exit_code == 4
    assert "not the REST interface of a mesh" in result.stderr


def test_an_answer_that_does_not_come_is_given_up(mesh, run):
    mesh.answer("/mesh/v1/models/a/load", make=lambda: asyncio.sleep(3600))
    result = run("load", "a", "--timeout", "0.05")
    assert result.exit_code == 4
    assert "did not answer within 0.05 s" in result.stderr


@pytest.mark.parametrize("endpoint", ["ftp://x", "http://", "http://h:99999", "h:port"])
def test_a_bad_endpoint_is_wrong_usage(run, endpoint):
    result = run("ls", "--endpoint", endpoint)
    assert result.exit_code == 2
    assert "--endpoint" in result.stderr


def test_the_endpoint_may_stand_before_or_behind_the_command(mesh, run, monkeypatch):
    """The endpoint option may stand before or after the command. The option after the command takes precedence, and
    either takes precedence over the environment."""
    monkeypatch.setenv("MESH_ENDPOINT", "http://127.0.0.1:9")
    assert run("ls").exit_code == 4
    assert run("--endpoint", mesh.endpoint, "ls").exit_code == 0
    assert run("ls", "-e", mesh.endpoint).exit_code == 0
    assert run("--endpoint", mesh.endpoint, "ls", "-e", "http://127.0.0.1:9").exit_code == 4
