"""Rows that are made up to compare two models with.

Rows of different kinds are in groups of their own, because differences are judged by the size of a group's answers.
Groups that the library itself refuses, such as one with missing values, are left out later (`conversion`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mesh.conversion.layout import Column, ColumnType, RowLayout, Rows

COUNT = 200  # rows of a group
MISSING = "with missing values"
_NEAR = 1e-5  # relative: beyond the rounding to 32 bits, where the models may disagree about which side they are on
_WORDS = ("the", "a", "model", "ONNX", "Straße", "x1", "it's", "no.", "2026")


@dataclass(frozen=True, slots=True)
class Group:
    """Rows of one kind, which are judged together."""

    what: str
    rows: Rows
    given: bool = False  # by the user

    def __len__(self) -> int:
        return len(self.rows[0]) if self.rows else 0

    def part(self, start: int, stop: int) -> "Group":
        """Returns the rows from `start` to before `stop`."""
        return Group(self.what, [column[start:stop] for column in self.rows], self.given)


def made_up(
    layout: RowLayout, known: npt.NDArray[Any] | None = None, *, missing: bool = True, seed: int = 0
) -> list[Group]:
    """Returns groups of rows for a model, one with missing values if `missing` is true and it takes numbers. `known`
    are rows of its training data, if it has any. The same model and seed give the same rows."""
    random = np.random.default_rng(seed)
    kinds: dict[str, Callable[[Column], npt.NDArray[Any]]] = {
        "like the training data": lambda column: _between(column, random),
        "near the values that decide": lambda column: _near(column, random),
        "around zero": lambda column: random.standard_normal(COUNT),
        "large": lambda column: random.standard_normal(COUNT) * 100,
        "zero": lambda column: np.zeros(COUNT),
        MISSING: lambda column: np.where(random.random(COUNT) < 0.2, np.nan, _between(column, random)),
    }
    if not any(column.type is ColumnType.NUMBER for column in layout.columns):
        kinds = {what: kinds[what] for what in ("like the training data",)}
    elif not any(column.values for column in layout.columns if column.type is ColumnType.NUMBER):
        del kinds["near the values that decide"]  # none is known
    if not missing:
        kinds.pop(MISSING, None)
    groups = []
    for what, number in kinds.items():
        rows: Rows = []
        for column in layout.columns:
            if column.categorical:
                rows.append(random.choice(np.asarray(column.values), COUNT))
            elif column.type is ColumnType.NUMBER:
                # Callers send numbers of 32 bits to most models, so both models get such numbers.
                with np.errstate(over="ignore"):
                    rows.append(number(column).astype(np.float32).astype(np.float64))
            elif column.type is ColumnType.INTEGER:
                rows.append(random.choice(np.asarray(column.values or [0, 1], dtype=np.int64), COUNT))
            else:
                rows.append(_texts(column, random, flat=layout.flat))
        groups.append(Group(what, rows))
    if known is not None and all(column.type is ColumnType.NUMBER for column in layout.columns):
        groups.append(Group("of the training data", list(known.astype(np.float64).T)))
    return groups


def _between(column: Column, random: np.random.Generator) -> npt.NDArray[Any]:
    """Returns values between any two that the model knows of, and a little beyond."""
    if not column.values:
        return random.standard_normal(COUNT)
    known = np.asarray(column.values, dtype=np.float64)
    one, other = random.choice(known, COUNT), random.choice(known, COUNT)
    between = one + (other - one) * random.uniform(-0.2, 1.2, COUNT)
    return np.asarray(between * (1 + random.choice((-_NEAR, _NEAR), COUNT)))


def _near(column: Column, random: np.random.Generator) -> npt.NDArray[Any]:
    """Returns values just below and above those that the model knows of."""
    if not column.values:
        return random.standard_normal(COUNT)
    known = random.choice(np.asarray(column.values, dtype=np.float64), COUNT)
    return np.asarray(known * (1 + random.choice((-_NEAR, _NEAR), COUNT)))


def _texts(column: Column, random: np.random.Generator, *, flat: bool) -> npt.NDArray[Any]:
    made = np.empty(COUNT, dtype=object)
    known = [str(value) for value in column.values]
    for index in range(COUNT):
        if flat or not known:
            words = random.choice(np.asarray([*_WORDS, *known[:500]], dtype=object), random.integers(1, 12))
            made[index] = " ".join(words)
        else:
            made[index] = known[random.integers(len(known))]
    return made
