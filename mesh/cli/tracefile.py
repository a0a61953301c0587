"""Request traces and models' sizes as CSV files, for `mesh simulate`.

A trace has a line `seconds,model` for each request, in order of time. A file of sizes has a line `model,bytes` for each
model, and optionally `,milliseconds`, the duration of a load. A first line without numbers is a heading.
"""

import csv
import math
from collections.abc import Iterator
from pathlib import Path

from mesh.cli.exits import CommandError, Exit
from mesh.options.values import parse_bytes
from placement.simulator.fleet import SimulatedModel, load_ms

MAX_MS = 2**53


def requests(path: Path) -> list[tuple[int, str]]:
    """Reads the requests of a trace, with times in milliseconds since the first. Raises CommandError, which names the
    line."""
    found: list[tuple[int, str]] = []
    first = last = 0.0
    for number, row in _rows(path):
        try:
            seconds, model_id = float(row[0]), row[1].strip()
        except (ValueError, IndexError):
            if number == 1 and len(row) > 1:
                continue  # a heading
            raise _wrong(path, number, "is not SECONDS,MODEL") from None
        if not math.isfinite(seconds) or not model_id:
            raise _wrong(path, number, "is not SECONDS,MODEL")
        if not found:
            first = last = seconds
        if seconds < last:
            raise _wrong(path, number, f"goes back in time, from {last:g} to {seconds:g} s: sort the trace")
        if (seconds - first) * 1000 > MAX_MS:
            raise _wrong(path, number, "is too far from the first request: give times in seconds")
        last = seconds
        found.append((int((seconds - first) * 1000), model_id))
    if not found:
        raise CommandError(f"{path} has no requests: write a line SECONDS,MODEL for each", code=Exit.USAGE)
    return found


def sizes(path: Path) -> dict[str, SimulatedModel]:
    """Reads the sizes of models, by id. Raises CommandError, which names the line."""
    found: dict[str, SimulatedModel] = {}
    for number, row in _rows(path):
        try:
            count = parse_bytes(row[1].strip())
            took = round(float(row[2])) if len(row) > 2 and row[2].strip() else load_ms(count)
        except (ValueError, IndexError, OverflowError):
            if number == 1 and len(row) > 1:
                continue
            raise _wrong(path, number, "is not MODEL,BYTES or MODEL,BYTES,MILLISECONDS") from None
        if took < 0 or not row[0].strip():
            raise _wrong(path, number, "is not MODEL,BYTES or MODEL,BYTES,MILLISECONDS")
        found[row[0].strip()] = SimulatedModel(count, max(1, took))
    return found


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            for row in reader:
                if row and not row[0].startswith("#"):
                    yield reader.line_num, row
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {error.strerror}", code=Exit.USAGE) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise CommandError(f"{path} is not a CSV file: {error}", code=Exit.USAGE) from error


def _wrong(path: Path, number: int, why: str) -> CommandError:
    return CommandError(f"{path}, line {number}: {why}", code=Exit.USAGE)
