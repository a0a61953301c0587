"""`mesh simulate`: traces from files, generated traces, tables, JSON, pictures, and errors in files."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mesh.cli import tracefile
from mesh.cli.exits import CommandError

SMALL = ("--models", "200", "--requests", "2000", "--pods", "2")


def test_a_made_trace_shows_each_policy_and_the_bound(run):
    """A generated trace gives one row per policy, in the given order. The clairvoyant bound is never worse than a
    policy."""
    result = run("simulate", "zipf", *SMALL, "--policy", "lru", "--policy", "gdsf", "--size", "1MiB", "--json")
    assert result.exit_code == 0
    rows = json.loads(result.stdout)
    assert [row["policy"] for row in rows] == ["lru", "gdsf", "clairvoyant"]
    assert all(0 < row["hit_rate"] <= rows[2]["hit_rate"] for row in rows)
    assert rows[0]["requests"] == 1000
    assert rows[0]["all"]["requests"] == 2000
    table = run("simulate", "azure", *SMALL).stdout
    for text in ("2,000 requests", "200 models", "lru", "clairvoyant", "load s/1000"):
        assert text in table


@pytest.mark.parametrize("rooms", [("5",), ("5", "20%")])
def test_a_picture_is_a_png(run, tmp_path, rooms):
    pytest.importorskip("matplotlib")
    path = tmp_path / "a.png"
    asked = [word for room in rooms for word in ("--room", room)]
    result = run("simulate", "scan", *SMALL, *asked, "--picture", str(path))
    assert result.exit_code == 0, result.stderr
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_trace_of_ones_own(run, tmp_path):
    """A CSV trace may have a heading and comments. Sizes are read from another CSV file, without a heading."""
    trace, sizes = tmp_path / "calls.csv", tmp_path / "sizes.csv"
    trace.write_text("time,model\n# a remark\n100.5,a\n101,b\n101.25,a\n")
    sizes.write_text("a,1MiB,30\nb,2097152\n")
    result = run("simulate", str(trace), "--sizes", str(sizes), "--capacity", "4MiB", "--pods", "1", "--json")
    assert result.exit_code == 0, result.stderr
    row = json.loads(result.stdout)[0]["all"]
    assert (row["requests"], row["hits"], row["loaded_bytes"]) == (3, 1, 3 << 20)
    assert tracefile.requests(trace) == [(0, "a"), (500, "b"), (750, "a")]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "has no requests"),
        ("1,a\nx,b\n", "line 2"),
        ("1,a\n0.5,b\n", "goes back in time"),
        ("1\n", "line 1"),
        ("1,a\nnan,b\n", "line 2"),
        ("1,a\n1e300,b\n", "too far"),
    ],
)
def test_what_is_wrong_with_a_trace_is_said_with_its_line(run, tmp_path, content, says):
    path = tmp_path / "t.csv"
    path.write_text(content)
    result = run("simulate", str(path))
    assert result.exit_code == 2
    assert says in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("nowhere.csv",),
        ("zipf", "--policy", "lfu"),
        ("zipf", "--room", "0"),
        ("zipf", "--room", "x"),
        ("zipf", "--capacity", "1x"),
        ("zipf", "--room", "5", "--capacity", "1GiB"),
        ("zipf", "--pods", "0"),
        ("zipf", "--sizes", "nowhere.csv"),
        ("zipf", "--size", "-"),
    ],
)
def test_wrong_words_say_what_is_right(run, words):
    result = run("simulate", *words, "--models", "10", "--requests", "10")
    assert result.exit_code == 2
    assert "error:" in result.stderr


def test_a_model_without_a_size_is_named(run, tmp_path):
    trace, sizes = tmp_path / "t.csv", tmp_path / "s.csv"
    trace.write_text("1,a\n")
    sizes.write_text("b,1MiB\n")
    result = run("simulate", str(trace), "--sizes", str(sizes))
    assert result.exit_code == 2
    assert "'a'" in result.stderr


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_no_file_is_worse_than_an_error(tmp_path, content):
    """Whatever a file contains, reading it as a trace or as sizes succeeds or raises an error that names the file."""
    path = tmp_path / "any"
    path.write_bytes(content)
    for read in (tracefile.requests, tracefile.sizes):
        try:
            read(path)
        except CommandError as error:
            assert str(path) in error.text
