"""`python -m tests.cost`: compares the cost of the hot functions with the stored figures; `--accept` stores them."""

import argparse
import asyncio
import gc
import sys
import tempfile
from pathlib import Path

from tests.cost import figures
from tests.cost.counting import cost
from tests.cost.operations import OPERATIONS

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


async def measure() -> figures.Figures:
    """Returns the cost of each operation with this version of Python."""
    found = {}
    for name, make in OPERATIONS.items():
        with tempfile.TemporaryDirectory() as folder:
            async with make(Path(folder)) as operation:
                found[name] = cost(operation)
        gc.collect()
    return found


def main(arguments: list[str] | None = None) -> int:
    """Compares or stores the figures. Returns the exit status, which is 1 if a figure differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.cost", description=__doc__)
    parser.add_argument("--accept", action="store_true", help="Store what is measured as the figures of this Python.")
    parser.add_argument(
        "--keep",
        action="store_true",
        help="Keep the figures of other Pythons, which were measured with the same sources.",
    )
    parser.add_argument("--figures", type=Path, default=figures.PATH, help=argparse.SUPPRESS)
    parser.add_argument("--show", action="store_true", help="List instructions and bytes of each operation.")
    chosen = parser.parse_args(arguments)
    stored = figures.load(chosen.figures)
    now = asyncio.run(measure())
    if chosen.show:
        for name, one in now.items():
            print(f"{name:45} {one.instructions:7,} instructions {one.memory:9,} bytes held at once")
    if chosen.accept:
        result, lost = figures.accepted(stored, VERSION, now, keep=chosen.keep)
        figures.save(result, chosen.figures)
        print(f"stored {len(now)} figures for Python {VERSION} in {chosen.figures}")
        for one in lost:
            print(f"removed the figure of {one}: it changed here, and only that Python can measure it")
        return 0
    was = stored.get(VERSION, {})
    lacking = [name for name in now if name not in was]
    if lacking:
        which = "ANYTHING" if len(lacking) == len(now) else ", ".join(lacking)
        print(f"make cost: NO FIGURES FOR PYTHON {VERSION} OF {which}: NOT COMPARED")
        print("  to store them: make cost ARGS=--accept")
    found = [one for one in figures.differences(was, now) if one.operation not in lacking]
    for one in found:
        print(one)
    if found:
        print(f"The cost of {len({one.operation for one in found})} operations differs from {chosen.figures.name}.")
        print("If the change is worth it, or is a gain: make cost ARGS=--accept, and commit the file with the change.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
