"""Tests of a run's figures: their comparison, the page about them, and that the page in docs matches its figures."""

import json

import pytest
from rich.console import Console

from tests.bench import __main__, page, results
from tests.bench.results import Comparison, Results, Row

SYSTEMS = ["Mesh", "plain", "Other"]


def comparison(*rows: Row) -> Comparison:
    return Comparison("throughput", "Calls a second", SYSTEMS, "plain", list(rows), ["a note"])


def rates(mesh: list[float], plain: list[float], other: list[float], **more: object) -> Row:
    return Row("gRPC", "calls/s", dict(zip(SYSTEMS, (mesh, plain, other), strict=True)), more_is_better=True, **more)


def document(*rows: Row, **absent: str) -> dict:
    """Returns the JSON document of a run with one comparison."""
    found = Results(Console(quiet=True), [comparison(*rows)], absent=absent)
    found.described["Mesh"] = "all of it"
    return found.document()


def test_a_ratio_is_the_median_of_the_ratios_of_rounds():
    """A machine that is slow in one round slows both systems, and so does not change the ratio. A system without
    figures has no ratio."""
    row = rates([100, 10, 100], [50, 5, 40], [])
    assert row.ratio("Mesh", "plain") == 2
    assert row.ratio("Mesh", "Other") is None


@pytest.mark.parametrize("more_is_better", [True, False])
def test_the_best_system_has_the_best_median(more_is_better):
    """The best median is the highest or the lowest, depending on `more_is_better`. If only one system has figures,
    there is no best system."""
    row = Row("x", "ms", {"Mesh": [1, 9, 2], "plain": [3, 3, 3], "Other": []}, more_is_better=more_is_better)
    assert row.best() == ("plain" if more_is_better else "Mesh")
    assert Row("x", "ms", {"Mesh": [1.0], "Other": []}).best() is None


def test_results_survive_their_file(tmp_path):
    """The JSON holds every figure, to five digits."""
    found = Results(Console(quiet=True))
    found.add(comparison(rates([1.234567], [2.0], [3.0], remarks={"Other": "bounded"})))
    path = tmp_path / "folder" / "results.json"
    found.write(path)
    (read,) = results.read(json.loads(path.read_text()))
    assert read == comparison(rates([1.2346], [2.0], [3.0], remarks={"Other": "bounded"}))


def test_the_page_says_where_another_server_is_better():
    """The page lists a row in which a peer is better, but not one in which the difference is within `CLOSE`."""
    text = page.text(document(rates([90.0], [50.0], [120.0])))
    section = text.partition("## Where another server is better")[2].partition("##")[0]
    assert "gRPC: Other has 120 calls/s, Mesh 90.0 (Mesh / Other 0.75)" in section
    assert "**120**" in text
    section = page.text(document(rates([118.0], [50.0], [120.0]))).partition("## Where another")[2].partition("##")[0]
    assert "Nowhere in this run." in section


def test_the_page_says_which_goals_are_missed():
    text = page.text(document(rates([90.0], [50.0], [20.0], reach=">= 3.5")))
    assert "- Calls a second: gRPC: the ratio to plain is 1.80, the goal >= 3.5" in text
    assert "goals are missed" not in page.text(document(rates([90.0], [50.0], [20.0], reach=">= 1.8")))
    assert "goals are missed" not in page.text(document(rates([90.0], [50.0], [20.0], reach="<= 1.8")))


def test_the_page_says_what_bounds_a_figure_and_what_is_absent():
    """A limited figure has the number of a remark below the table, and the page names a server that could not be
    installed."""
    row = rates([90.0], [50.0], [20.0], remarks={"Mesh": "bounded by the generator"})
    text = page.text(document(row, MLServer="no index\nat all"))
    assert "**90.0 1)**" in text
    assert "- 1) bounded by the generator" in text
    assert "**MLServer is not in this run**: no index\n" in text


def test_the_page_says_when_the_machine_was_busy():
    found = document(rates([90.0], [50.0], [20.0]))
    for busy, said in ((0.1, False), (2.0, True)):
        found["machine"]["busy"] = busy
        assert ("was not quiet" in page.text(found)) == said


def test_a_terminal_shows_the_same_figures():
    """The table shows medians, the ratio to the base, its goal and the remarks. The notes follow."""
    console = Console(record=True, width=140)
    Results(console).add(comparison(rates([90.0], [50.0], [], reach=">= 2", remarks={"Other": "has no REST"})))
    shown = console.export_text()
    for part in ("90.0", "50.0", "1.80", ">= 2", "1) has no REST", "a note"):
        assert part in shown


def test_pictures_are_drawn(tmp_path, monkeypatch):
    """The command writes the page, and a picture of each comparison that has one. It fails if there is no results
    file."""
    latency = [
        Row(f"REST, 500 calls/s, p{share}", "ms", {"Mesh": [1.0], "plain": [], "Other": [30.0]}) for share in (50, 99)
    ]
    found = Results(Console(quiet=True), [comparison(rates([9.0], [5.0], []))])
    found.add(Comparison("latency", "Latency", SYSTEMS, "Other", latency))
    monkeypatch.setattr(page, "DOCS", tmp_path)
    monkeypatch.setattr(page, "KEPT", tmp_path / "performance.json")
    monkeypatch.setattr(page, "PAGE", tmp_path / "performance.md")
    found.write(tmp_path / "results.json")
    assert page.main([str(tmp_path / "results.json")]) == 0
    for name in ("throughput", "latency"):
        assert (tmp_path / f"performance-{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"(performance-{name}.png)" in (tmp_path / "performance.md").read_text()
    assert page.main([str(tmp_path / "absent.json")]) == 1


def test_the_page_in_docs_is_that_of_its_figures():
    """No figure of docs/performance.md was written by hand."""
    assert page.KEPT.exists() == page.PAGE.exists()
    if page.KEPT.exists():
        assert page.PAGE.read_text() == page.text(json.loads(page.KEPT.read_text()))


@pytest.mark.parametrize(
    ("names", "quick", "name"),
    [
        (["chain", "peers", "large", "servers"], False, "results.json"),
        (["large", "servers", "alias", "peers", "chain"], False, "results.json"),
        (["chain", "peers", "large"], False, "results-chain-peers-large.json"),
        (["chain", "peers", "large", "servers"], True, "results-chain-peers-large-servers-quick.json"),
        (["large"], False, "results-large.json"),
    ],
)
def test_only_a_complete_run_overwrites_the_figures_of_the_page(names, quick, name):
    assert __main__.output(names, quick=quick).name == name


def test_a_run_that_compares_nothing_leaves_the_page_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(page, "KEPT", tmp_path / "kept.json")
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    Results(Console(quiet=True)).write(tmp_path / "results.json")
    assert page.main([str(tmp_path / "results.json")]) == 1
    assert "no comparisons" in capsys.readouterr().err
    assert not page.PAGE.exists()
