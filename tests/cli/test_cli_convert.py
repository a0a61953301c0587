"""`mesh convert`, run as a user runs it."""

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import joblib
import numpy as np
import onnxruntime
import pytest
from sklearn.datasets import load_iris
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from typer.testing import CliRunner, Result

from mesh.cli.app import build

X, Y = load_iris(return_X_y=True)
DOCS = Path(__file__).resolve().parents[2] / "docs" / "convert.md"
WIDE = {"COLUMNS": "200", "TERM": "dumb"}


def run(*words: str) -> Result:
    return CliRunner().invoke(build(), ["convert", *words], env=WIDE)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    joblib.dump(LogisticRegression(max_iter=500).fit(X, Y), tmp_path / "churn.joblib")
    return tmp_path / "churn.joblib"


def test_the_page_is_true(model: Path) -> None:
    """The command in the docs converts a model, and the first words of each line that it prints are those on the
    page."""
    np.savetxt(model.with_name("customers.csv"), X, delimiter=",")
    section = DOCS.read_text().partition("## Convert a model")[2].partition("\n## ")[0]
    lines = re.findall(r"^    (.*)$", section, re.MULTILINE)
    command = lines[0].removeprefix("mesh ")
    argv = [sys.executable, "-P", "-m", "mesh", *command.split()]
    done = subprocess.run(argv, cwd=model.parent, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert "runs the code in it: this is safe only if you trust its author" in done.stderr
    shown = [line.split()[:4] for line in lines[2:]]
    assert [line.split()[:4] for line in done.stdout.splitlines()] == shown
    onnxruntime.InferenceSession(model.with_suffix(".onnx"))


def test_an_existing_file_is_overwritten_only_by_force(model: Path) -> None:
    target = model.with_suffix(".onnx")
    target.write_text("mine")
    refused = run(str(model))
    assert refused.exit_code == 1
    assert "overwrite it with --force, or name another file with --output" in refused.output
    assert target.read_text() == "mine"
    assert run(str(model), "--force").exit_code == 0
    assert target.read_bytes() != b"mine"


def test_nothing_is_kept_of_a_conversion_that_differs(tmp_path: Path) -> None:
    """If the converted model answers differently, the command fails, names the rows and the way out, and leaves no file
    behind."""
    joblib.dump(RandomForestClassifier(5, random_state=0).fit(X, Y), tmp_path / "forest.joblib")
    failed = run(str(tmp_path / "forest.joblib"), "--json")
    assert failed.exit_code == 1
    assert "most for rows with missing values, so no file was written" in failed.stderr
    assert "add --no-missing" in failed.stderr
    assert json.loads(failed.stdout)["exact"] is False
    assert [file.name for file in tmp_path.iterdir()] == ["forest.joblib"]
    assert run(str(tmp_path / "forest.joblib"), "--no-missing").exit_code == 0


class Nothing:
    """An object that is no model."""


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (pickle.dumps({"a": 1}), "it is not a model"),
        (b"\x80\x04not a pickle", "cannot be loaded"),
        (b"", "is an empty file"),
        (b"CBM1rest", "CatBoost exports ONNX itself"),
        (b"tree\nversion=v4\nnonsense", "cannot be loaded"),
        (pickle.dumps(Nothing()).replace(b"test_cli_convert", b"test_cli_xonvert"), "which is not installed"),
        (pickle.dumps(Nothing()).replace(b"Nothing", b"Nowhere"), "refers to something that is missing here"),
        (None, "cannot be read: No such file"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes | None, says: str) -> None:
    file = tmp_path / "model.pkl"
    if content is not None:
        file.write_bytes(content)
    result = run(str(file))
    assert result.exit_code == 1, result.output
    assert says in result.stderr


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("rows.csv", "1,2,3\n", "has 3 columns, but the model takes 4"),
        ("rows.csv", "", "has no rows"),
        ("rows.csv", "a,b,c,d\n1,2,3,x\n", "column x3 takes numbers"),
        ("rows.csv", "a,b,c,d\n1,2,3,4\n1,2\n", "has 2 columns, but the first line has 4"),
        ("rows.csv", "a,b,c,d\n,2,3,4\n", "the model itself refuses the given rows"),
        ("rows.npy", "no array", "is not an array of numbers or text"),
        ("none.csv", None, "cannot be read: No such file"),
    ],
)
def test_bad_rows_are_refused(model: Path, name: str, content: str | None, says: str) -> None:
    """The error says what is wrong with the given rows, and no model is written."""
    rows = model.with_name(name)
    if content is not None:
        rows.write_text(content)
    result = run(str(model), "--rows", str(rows))
    assert result.exit_code == 1, result.output
    assert says in result.stderr
    assert not model.with_suffix(".onnx").exists()


def test_rows_are_read_with_and_without_a_header(model: Path) -> None:
    """The header of a CSV file does not count as a row. NumPy's files are read too."""
    np.savetxt(model.with_name("plain.csv"), X, delimiter=",")
    np.savetxt(model.with_name("headed.csv"), X, delimiter=",", header="a,b,c,d", comments="")
    np.save(model.with_name("rows.npy"), X)
    for name in ("plain.csv", "headed.csv", "rows.npy"):
        result = run(str(model), "--rows", str(model.with_name(name)), "--force", "--json")
        assert result.exit_code == 0, result.output
        assert {one["count"] for one in json.loads(result.stdout)["differences"] if one["rows"] == "given"} == {150}


def test_a_missing_extra_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skl2onnx", None)
    result = run(str(model))
    assert result.exit_code == 1
    assert "pip install '.[convert]'" in result.stderr
