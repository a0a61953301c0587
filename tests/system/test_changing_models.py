"""The commands of docs/changing-models.md, run in order in a mesh that `mesh up` starts, while callers call the
alias."""

import json
import threading
import urllib.error
from collections.abc import Iterator

import pytest

from tests.support import documented, models
from tests.support.documented import CHANGING, RUN_BY, Shell
from tests.system.test_up import Up

PAGE = "changing-models.md"


class Caller:
    """A client that calls the alias all the time, and records the answers."""

    def __init__(self, up: Up) -> None:
        self._up = up
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.versions: list[str] = []
        self.failures: list[str] = []

    def call(self) -> str:
        """Makes one call. Returns the version that answered."""
        tensor = {"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [0.0]}
        answer = self._up.rest("POST", "/v2/models/fraud/infer", {"inputs": [tensor]})
        version = str(answer["model_version"])
        assert answer["model_name"] == "fraud"
        # Until the page makes fraud@9 a version, its replies name its own.
        assert answer["outputs"][0]["data"] == [9.0 if version == "1" else float(version)]
        return version

    def _run(self) -> None:
        while not self._end.wait(0.02):
            try:
                self.versions.append(self.call())
            except (OSError, AssertionError) as error:
                read = error.read().decode() if isinstance(error, urllib.error.HTTPError) else ""
                self.failures.append(f"{error!r} {read}")

    def __enter__(self) -> "Caller":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(60)


@pytest.fixture
def shell(tmp_path) -> Iterator[Shell]:
    """A shell in a folder that contains the versions' files, as the page registers them."""
    shell = Shell(tmp_path / "here")
    for version in (7, 8, 9):
        (shell.folder / f"fraud-{version}.onnx").write_bytes(models.constant(float(version)))
    (shell.folder / "fraud-10.onnx").write_bytes(b"no model")
    return shell


def typed(shell: Shell, heading: str, words: dict[str, str] | None = None, *, code: int = 0) -> list[str]:
    """Runs the commands below a heading. Returns the output of each command, stdout and stderr together."""
    assert RUN_BY[PAGE, heading].test == CHANGING
    said = []
    for command in documented.block(PAGE, heading):
        text = command.put({word: by for word, by in (words or {}).items() if word in command.text})
        done = shell.run(text)
        assert done.returncode == code or (code and done.returncode == 0), f"$ {text}\n{done.stdout}{done.stderr}"
        said.append(done.stdout + done.stderr)
    return said


@pytest.mark.long
@pytest.mark.timeout(600)
async def test_the_page_from_mesh_up_on(shell, tmp_path):
    """The page's commands do what the page says in a mesh that `mesh up` has just started. No call of the alias fails
    from its first version until its removal."""
    up = await Up(tmp_path, "--file-root", str(shell.folder)).ready()
    shell.environment["MESH_ENDPOINT"] = f"http://127.0.0.1:{up.port}"
    words = {"http://127.0.0.1:8033": shell.environment["MESH_ENDPOINT"], "/models/": f"{shell.folder}/"}
    try:
        said = shell.run("mesh register fraud ./fraud-7.onnx --version 7")
        assert said.returncode == 0, said.stderr
        with Caller(up) as caller:
            _, second, listed, rest = typed(shell, "A new version", words)
            assert "calls     fraud@8 (version 8)" in second
            assert [line.split() for line in listed.splitlines()][2] == ["8", "fraud@8", "LOADED", "all"]
            assert json.JSONDecoder().raw_decode(rest)[0].get("status") == "DEFINED", rest
            assert caller.call() == "8"
            assert "fraud@7 (version 7)" in typed(shell, "Roll back")[0]
            assert caller.call() == "7"
            _, tenth, half, whole = typed(shell, "Try a version on a tenth of the calls")
            assert "90 % fraud@7, 10 % fraud@9" in tenth
            assert "50 % fraud@7, 50 % fraud@9, by x-user" in half
            assert "fraud@9 (version 9)" in whole
            assert caller.call() == "9"
            _, shown, without = typed(shell, "Compare a version as a shadow")
            assert "5 % also to fraud@8" in shown
            assert "also to" not in without
            broken = shell.run("mesh register fraud ./fraud-10.onnx --version 10")
            assert broken.returncode == 5, broken.stderr
            assert "calls of fraud still go to fraud@9" in broken.stderr
            status, explained = typed(shell, "When a move is stuck", code=5)
            assert "TRANSITION_FAILED" in status
            assert "It has not moved to fraud@10 (version 10), because that model could not be loaded" in explained
            assert shell.run("mesh rollback fraud").returncode == 0
            assert caller.call() == "9"
        assert caller.failures == []
        assert {"7", "8", "9"} <= set(caller.versions)
        assert "deleted alias fraud" in typed(shell, "Delete an alias")[0]
        names = {model["id"] for model in up.rest("GET", "/mesh/v1/models")["models"]}
        assert {"fraud@7", "fraud@8", "fraud@10"}.isdisjoint(names)
        assert "fraud@9" in names  # it was registered by itself
    finally:
        up.process.terminate()
        up.process.wait(60)
