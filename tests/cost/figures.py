"""The stored figures, `figures.json`, and their comparison with measured figures.

Each minor version of Python compiles the same source into different instructions, so each has its own figures. Only the
running version can be measured. For operations that changed, the figures of other versions are removed, and those
versions report the missing figures until they are measured too.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.cost.counting import Cost

PATH = Path(__file__).with_name("figures.json")

INSTRUCTIONS = 0.02
"""Share by which instructions may differ. With one Python they repeat exactly; the share allows for patch releases, and
for changes too small to be stored."""

MEMORY, MEMORY_BYTES = 0.05, 512
"""Share and bytes by which memory may differ. Runs differ by 200 bytes because free lists hold a few objects more or
less."""

Figures = dict[str, Cost]
"""The cost of each operation."""


@dataclass(frozen=True, slots=True)
class Difference:
    operation: str
    text: str

    def __str__(self) -> str:
        return f"{self.operation}: {self.text}"


def load(path: Path = PATH) -> dict[str, Figures]:
    """Loads the figures by minor version of Python, such as "3.11"."""
    if not path.exists():
        return {}
    stored = json.loads(path.read_text())
    return {
        version: {name: Cost(one["functions"], one["memory"]) for name, one in figures.items()}
        for version, figures in stored.items()
    }


def save(stored: Mapping[str, Figures], path: Path = PATH) -> None:
    """Writes each figure on its own line, so that changes to different functions merge."""
    plain = {
        version: {name: {"functions": one.functions, "memory": one.memory} for name, one in figures.items()}
        for version, figures in stored.items()
        if figures
    }
    path.write_text(json.dumps(plain, indent=1, sort_keys=True) + "\n")


def differences(was: Figures, now: Figures) -> list[Difference]:
    """Returns the figures that differ by more than the tolerance, up or down, and the operations that only one side
    has."""
    found = [Difference(name, "is stored, but no longer measured") for name in was.keys() - now.keys()]
    for name, cost in now.items():
        if name not in was:
            found.append(Difference(name, "has no stored figure"))
            continue
        before = was[name]
        if abs(cost.instructions - before.instructions) > before.instructions * INSTRUCTIONS:
            change = _change(before.instructions, cost.instructions, "instructions")
            found.append(Difference(name, "\n".join([change, *_functions(before, cost)])))
        if not _same_memory(before, cost):
            found.append(Difference(name, _change(before.memory, cost.memory, "bytes held at once")))
    return sorted(found, key=lambda one: one.operation)


def accepted(
    stored: Mapping[str, Figures], version: str, now: Figures, *, keep: bool = False
) -> tuple[dict[str, Figures], list[str]]:
    """Returns the figures with one version's replaced, and a text for each figure that other versions lose. With `keep`
    they lose none."""
    was = stored.get(version, {})
    changed = set()  # operations without a stored figure are not known to have changed
    if not keep:
        changed = {one.operation for one in differences(was, now) if one.operation in was}
    result = {version: {name: _settled(was.get(name), cost) for name, cost in now.items()}}
    lost = []
    for other, figures in stored.items():
        if other != version:
            result[other] = {name: cost for name, cost in figures.items() if name not in changed}
            lost += [f"Python {other}: {name}" for name in figures if name in changed]
    return result, sorted(lost)


def _same_memory(was: Cost, now: Cost) -> bool:
    return abs(now.memory - was.memory) <= was.memory * MEMORY + MEMORY_BYTES


def _settled(was: Cost | None, now: Cost) -> Cost:
    """Returns the figure to store. If the memory differs within the tolerance, the stored value is kept, so that the
    file rarely changes."""
    return now if was is None or not _same_memory(was, now) else Cost(now.functions, was.memory)


def _change(was: int, now: int, what: str) -> str:
    share = f" ({(now - was) / was:+.1%})" if was else ""
    return f"{'grew' if now > was else 'fell'} from {was:,} to {now:,} {what}{share}"


def _functions(was: Cost, now: Cost) -> list[str]:
    """Returns a line for each function that differs, the largest difference first."""
    changes = {
        name: now.functions.get(name, 0) - was.functions.get(name, 0) for name in {**was.functions, **now.functions}
    }
    order = sorted((name for name, change in changes.items() if change), key=lambda name: -abs(changes[name]))
    return [
        f"    {changes[name]:+5d}  {name} ({was.functions.get(name, 0)} to {now.functions.get(name, 0)})"
        for name in order
    ]
