"""The cost figures: counts are reproducible, and a function that grows is noticed and named."""

import subprocess
import sys
from dataclasses import replace

import pytest

from placement.balance import least_loaded
from tests.cost import __main__ as command
from tests.cost import figures
from tests.cost.counting import ROOT, Cost, cost
from tests.router.conftest import FakeEtcd
from tests.support.worlds import World

BEFORE = Cost({"mesh/a.py f": 100, "mesh/b.py g": 400}, 2000)


def least(count: int) -> Cost:
    """Returns the cost of choosing among this number of copies."""
    world = World()
    for number in range(count):
        world.pod(f"pod-{number}")
        world.copy("m", f"pod-{number}")
    copies = world.view.copies["m"]
    return cost(lambda: least_loaded(copies))


def test_a_count_repeats_and_grows_with_the_work():
    """A count is reproducible and grows linearly with the number of copies."""
    two, four, eight = map(least, (2, 4, 8))
    assert set(four.functions) >= {"placement/balance.py least_loaded"}
    assert least(4).functions == four.functions
    assert eight.instructions - four.instructions == 2 * (four.instructions - two.instructions) > 0


def test_only_our_own_packages_are_counted():
    """The instructions of the tests' own fakes are not counted."""
    assert cost(FakeEtcd).functions == {}


def test_memory_is_the_most_that_is_held_at_once():
    """The memory of an operation is its peak: two buffers held at the same time count twice, two held one after the
    other count once."""
    size = 1 << 20
    together = cost(lambda: (bytearray(size), bytearray(size))).memory
    in_turn = cost(lambda: [len(bytearray(size)) for _ in range(2)]).memory
    assert 2 * size <= together < 2.1 * size
    assert size <= in_turn < 1.1 * size


def test_another_process_counts_the_same():
    """Two processes with different hash seeds count the same."""
    name = "router, choice among 4 copies"
    script = (
        "import asyncio, pathlib\n"
        "from tests.cost.counting import cost\n"
        "from tests.cost.operations import OPERATIONS\n"
        "async def main():\n"
        f"    async with OPERATIONS[{name!r}](pathlib.Path('.')) as operation:\n"
        "        print(cost(operation).functions)\n"
        "asyncio.run(main())\n"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONHASHSEED": seed},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1, found
    assert "router/calls/forwarder.py Forwarder.pick" in found.pop()


def test_growth_names_the_function():
    """The report about a growth names the function, the growth, and both figures."""
    now = Cost({"mesh/a.py f": 100, "mesh/b.py g": 390, "mesh/c.py h": 30}, 2000)
    (found,) = figures.differences({"x": BEFORE}, {"x": now})
    assert str(found).splitlines() == [
        "x: grew from 500 to 520 instructions (+4.0%)",
        "      +30  mesh/c.py h (0 to 30)",
        "      -10  mesh/b.py g (400 to 390)",
    ]


@pytest.mark.parametrize(
    ("now", "what"),
    [
        (replace(BEFORE, functions={"mesh/a.py f": 100, "mesh/b.py g": 411}), "grew from 500 to 511 instructions"),
        (replace(BEFORE, functions={"mesh/a.py f": 100, "mesh/b.py g": 389}), "fell from 500 to 489 instructions"),
        (replace(BEFORE, functions={"mesh/a.py f": 100, "mesh/b.py g": 410}), ""),
        (replace(BEFORE, memory=2613), "grew from 2,000 to 2,613 bytes held at once"),
        (replace(BEFORE, memory=1387), "fell from 2,000 to 1,387 bytes held at once"),
        (replace(BEFORE, memory=2612), ""),
    ],
)
def test_what_is_beyond_the_tolerance_differs(now, what):
    """A figure beyond the tolerance is reported in either direction, because a gain that is not stored would hide a
    later loss."""
    found = figures.differences({"x": BEFORE}, {"x": now})
    assert [str(one).partition(" (")[0] for one in found] == ([f"x: {what}"] if what else [])


def test_accepting_takes_the_figures_that_changed_from_other_versions():
    """Accepting figures removes other Python versions' figures for changed operations, which this Python cannot
    measure. Other figures stay, even if their memory differs within the tolerance."""
    grown = Cost({"mesh/a.py f": 200}, 2000)
    stored = {"3.11": {"x": BEFORE, "y": BEFORE}, "3.12": {"x": BEFORE, "y": BEFORE}}
    result, lost = figures.accepted(stored, "3.11", {"x": grown, "y": replace(BEFORE, memory=2001)})
    assert result == {"3.11": {"x": grown, "y": BEFORE}, "3.12": {"y": BEFORE}}
    assert lost == ["Python 3.12: x"]
    result, lost = figures.accepted(stored, "3.11", {"x": grown, "y": BEFORE}, keep=True)
    assert result["3.12"] == stored["3.12"]
    assert not lost
    lacking = {"3.11": {"y": BEFORE}, "3.12": {"x": BEFORE, "y": BEFORE}}
    result, lost = figures.accepted(lacking, "3.11", {"x": grown, "y": BEFORE})
    assert result["3.12"] == lacking["3.12"]
    assert not lost
    result, lost = figures.accepted(stored, "3.13", {"x": grown})
    assert result == {**stored, "3.13": {"x": grown}}
    assert not lost


def test_figures_survive_their_file(tmp_path):
    """A version without figures is not stored, and a missing file has no figures."""
    path = tmp_path / "figures.json"
    assert figures.load(path) == {}
    figures.save({"3.11": {"x": BEFORE}, "3.12": {}}, path)
    assert figures.load(path) == {"3.11": {"x": BEFORE}}


def test_the_command_fails_for_growth_and_says_how_to_accept_it(tmp_path, monkeypatch, capsys):
    """The command fails if a cost grows, and says how to accept it. Once accepted, it passes. A Python version without
    figures is reported."""
    path = tmp_path / "figures.json"
    figures.save({command.VERSION: {"x": BEFORE}}, path)
    measured = {"x": Cost({"mesh/a.py f": 200, "mesh/b.py g": 400}, 2000)}

    async def measure():
        return measured

    monkeypatch.setattr(command, "measure", measure)
    options = ["--figures", str(path)]
    assert command.main(options) == 1
    said = capsys.readouterr().out
    assert "+100  mesh/a.py f (100 to 200)" in said
    assert "make cost ARGS=--accept" in said
    assert command.main([*options, "--accept"]) == 0
    assert command.main(options) == 0
    figures.save({"2.7": {"x": BEFORE}}, path)
    capsys.readouterr()
    assert command.main(options) == 0
    assert f"NO FIGURES FOR PYTHON {command.VERSION} OF ANYTHING: NOT COMPARED" in capsys.readouterr().out
