"""docs/sizing.md: the code yields the numbers in its tables, and a simulation confirms them."""

import json
import re
from typing import Any

import pytest
import yaml

from mesh.host.memory import Whole
from mesh.options.values import parse_bytes
from mesh.runtime.cache.evictions import capacity
from tests.deploy.test_docs import VALUES
from tests.support import documented
from tests.support.documented import DOCS, Shell

PAGE = "sizing.md"
TEXT = (DOCS / PAGE).read_text()
COMMANDS = documented.commands(PAGE)
GB = 10**9

TENTH = {
    "200_000": "20_000",
    "expovariate(300)": "expovariate(30)",
    "randrange(500)": "randrange(50)",
    "randrange(500, 5000)": "randrange(50, 500)",
    "--models 5000": "--models 500",
    "--rate 300": "--rate 30",
    "--requests 200000": "--requests 20000",
}
"""Replacements that reduce everything in the page's commands to a tenth, including calls a second, because only
proportions matter."""


def table(heading: str) -> list[list[str]]:
    """Returns the first table below a heading, without the separator line."""
    lines = TEXT.split(f"## {heading}\n")[1].split("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    end = next((n for n, row in enumerate(rows) if n > 1 and set(row[0]) == {"-"}), len(rows) + 1)
    return [rows[0], *rows[2 : end - 1]]


def number(text: str) -> float:
    return float(text.split()[0])


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A shell that has run the page's script for a CSV of calls, with a tenth of the calls."""
    shell = Shell(tmp_path_factory.mktemp("sizing"))
    (made,) = [command for command in COMMANDS if command.text.startswith("python - >")]
    script = made.put(TENTH)
    assert "20_000" in script
    done = shell.run(script.partition("\nmesh ")[0])
    assert done.returncode == 0, done.stderr
    return shell


def simulated(shell: Shell, command: str) -> list[dict[str, Any]]:
    """Runs a command of the page and returns its results."""
    done = shell.run(f"{command} --json", timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_cliff_and_the_plateau(calls: Shell):
    """The simulation confirms the hit rates of the first table for sizes above the cliff, and that hits drop sharply
    below. The table's columns agree with each other."""
    (made,) = [command for command in COMMANDS if command.text.startswith("python - >")]
    rows = simulated(calls, "mesh " + made.text.partition("\nmesh ")[2])
    found = {(row["policy"], round(row["room"], 2)): row["hit_rate"] for row in rows}
    _, *lines = table("How much memory")
    assert len(lines) == 6
    for room, line in zip((0.10, 0.12, 0.15, 0.20, 0.50, 0.80), lines, strict=True):
        size, share, lru, gdsf, cold, loaded = map(number, line)
        # 500 models of 20 MB are in use, of 4,504 that are called.
        assert size == pytest.approx(room * 4504 * 0.02, rel=0.01)
        assert share == pytest.approx(size / 10, rel=0.02)
        assert cold == pytest.approx(300 * (1 - lru / 100), abs=1)
        assert loaded == pytest.approx(20 * 300 * (1 - lru / 100), rel=0.02, abs=5)
        if room > 0.12:  # on the cliff itself a tenth of the models is too few to agree
            assert found["lru", room] == pytest.approx(lru / 100, abs=0.02)
            assert found["gdsf", room] == pytest.approx(gdsf / 100, abs=0.02)
    assert found["lru", 0.10] < 0.85 < 0.94 < found["lru", 0.15], (
        "hits drop sharply below the memory of the models in use"
    )
    assert found["gdsf", 0.12] > found["lru", 0.12], "gdsf needs less memory beyond that of the models in use"


def test_calls_of_ones_own(calls: Shell):
    """The command in docs/sizing.md that simulates a CSV of calls with a CSV of sizes works."""
    (command,) = [command for command in COMMANDS if "--sizes" in command.text]
    (calls.folder / "sizes.csv").write_text("".join(f"m{model:04d},20000000\n" for model in range(500)))
    rows = simulated(calls, command.text)
    assert [row["policy"] for row in rows] == ["lru", "gdsf", "clairvoyant"]


def test_a_smooth_popularity(calls: Shell):
    """The second table of docs/sizing.md has neither a cliff nor a plateau. The simulation has a tenth of the table's
    models and a larger part of them is called often, so its hit rates are lower."""
    (command,) = [command for command in COMMANDS if command.text.startswith("mesh simulate zipf")]
    rows = [row["hit_rate"] for row in simulated(calls, command.put(TENTH)) if row["policy"] == "lru"]
    line = re.search(r"^\| hits, `lru` \|(.*)\|$", TEXT, re.MULTILINE)
    assert line is not None
    said = [number(cell) / 100 for cell in line[1].split("|")]
    for here, there in zip(rows, said, strict=True):
        assert there - 0.15 < here < there
    for found in (rows, said):
        assert found[0] < found[1] - 0.03 < found[2] - 0.1 < found[3] - 0.15


def test_containers():
    """The table of containers shows the result of `auto` within 0.05 GiB. A capacity of 0.9 times the limit minus 0.2
    GiB is accepted, and 0.25 GiB more is refused."""
    limits, sizes = table("Containers")
    for limit, size in zip(limits[1:], sizes[1:], strict=True):
        there = parse_bytes(limit.replace(" ", ""))
        assert capacity.auto_capacity(there) / 2**30 == pytest.approx(number(size), abs=0.05)
        most = int(0.9 * there - 0.2 * 2**30)
        assert capacity.server_limit(most, Whole(there, "the container")) < there
        with pytest.raises(ValueError, match="requested for models"):
            capacity.server_limit(most + 2**28, Whole(there, "the container"))


def test_the_example():
    """The pools in the example of docs/sizing.md are valid values of the chart. They have the stated memory even if one
    pod is missing."""
    example = yaml.safe_load(TEXT.split("```yaml\n")[1].split("```")[0])
    assert example["router"].keys() <= VALUES["router"].keys()
    (pool,) = example["pools"]
    assert pool.keys() <= VALUES["runtime"].keys() | {"name"}
    limit = parse_bytes(pool["resources"]["limits"]["memory"])
    assert pool["resources"]["requests"]["memory"] == pool["resources"]["limits"]["memory"]
    wanted = 500 * 20e6 * 1.1 * 1.5
    assert (pool["replicas"] - 2) * capacity.auto_capacity(limit) < wanted, "one pod less would be too few"
    assert wanted <= (pool["replicas"] - 1) * capacity.auto_capacity(limit)
