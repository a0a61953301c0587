"""The comparison of a model's answers with those of its conversion.

A relative difference is that of two numbers, divided by the larger of: the library's number, and the typical size
(root mean square) of its column in these rows. Otherwise a number near zero among large ones would count as wrong for
an error that no caller can notice. Probabilities are compared as they are.

Classes must be equal. If the model itself gives two classes the same probability, up to the tolerance, then either of
them is right.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mesh.conversion import answers
from mesh.conversion.samples import Group

_SMALLEST = 1e-3  # of an output's typical size: smaller columns are judged by this


@dataclass(slots=True)
class OutputDifference:
    """The differences between the library's and the ONNX model's answers in one output."""

    output: str
    given: bool  # in rows given by the user
    classes: bool  # the output has classes instead of numbers
    rows: int = 0
    differing: int = 0  # rows with another class, or with a number beyond the tolerance
    tied: int = 0  # rows with another class that the model finds as probable
    absolute: float = 0.0
    relative: float = 0.0
    where: str = ""  # the kind of the rows that differ most; "": none differs
    worst: tuple[int, float] = (0, 0.0)  # the differing rows, and the largest relative difference, of that kind

    def add(self, other: "OutputDifference") -> None:
        """Adds the differences in other rows."""
        if (rank := (other.differing, other.relative)) > self.worst:
            self.where, self.worst = other.where, rank
        self.rows += other.rows
        self.differing += other.differing
        self.tied += other.tied
        self.absolute = max(self.absolute, other.absolute)
        self.relative = max(self.relative, other.relative)


def matched(expected: dict[str, npt.NDArray[Any]], found: list[npt.NDArray[Any]]) -> list[str]:
    """Returns, for each output in order, the name of the method whose answer it is. Stops at the first output that no
    method's answer fits."""
    names: list[str] = []
    for output in found:
        fitting = (
            name
            for name, answer in expected.items()
            if name not in names and answers.fitted(answer, output.shape) is not None
        )
        name = next(fitting, None)
        if name is None or (name == "score_samples" and "predict" not in expected):
            break
        names.append(name)
    return names


def compare(
    name: str,
    group: Group,
    expected: dict[str, npt.NDArray[Any]],
    found: npt.NDArray[Any],
    *,
    classes: npt.NDArray[Any] | None,
    tolerance: float,
) -> OutputDifference:
    """Compares one output with the library's answer for a group of rows. `classes` are a classifier's classes. A number
    differs if its relative difference, or a probability's difference, exceeds `tolerance`."""
    ours = answers.fitted(expected[name], found.shape)
    made = OutputDifference(name, group.given, classes=False, rows=len(group), where=group.what)
    if ours is None:  # the number of rows differs
        made.differing, made.absolute, made.relative = len(group), np.inf, np.inf
        return made
    if ours.dtype.kind not in "fiub" or found.dtype.kind not in "fiub" or (classes is not None and name == "predict"):
        made.classes = True
        return _of_classes(made, ours, found, expected, classes, tolerance)
    mine, theirs = ours.astype(np.float64), found.astype(np.float64)
    with np.errstate(all="ignore"):
        away = np.abs(mine - theirs)
        away[(mine == theirs) | (np.isnan(mine) & np.isnan(theirs))] = 0.0
        away[np.isnan(away)] = np.inf
        relative = away / _sizes(mine, probabilities=name == "predict_proba")
        relative[np.isnan(relative)] = np.inf  # where both the difference and the size overflow
        relative[away == 0] = 0.0
    made.absolute, made.relative = float(away.max(initial=0.0)), float(relative.max(initial=0.0))
    made.differing = int((relative.reshape(len(group), -1) > tolerance).any(axis=1).sum())
    return made


def _sizes(mine: npt.NDArray[Any], *, probabilities: bool) -> npt.NDArray[Any]:
    if probabilities:
        return np.ones_like(mine)
    known = np.where(np.isfinite(mine), mine, 0.0)
    columns = np.sqrt(np.mean(known**2, axis=0, keepdims=True))
    least = _SMALLEST * np.sqrt(np.mean(known**2)) or 1.0
    return np.asarray(np.maximum(np.abs(known), np.maximum(columns, least)))


def _of_classes(
    made: OutputDifference,
    ours: npt.NDArray[Any],
    found: npt.NDArray[Any],
    expected: dict[str, npt.NDArray[Any]],
    classes: npt.NDArray[Any] | None,
    tolerance: float,
) -> OutputDifference:
    other = np.asarray(
        [
            str(one) != str(two) if isinstance(two, str) else one != two
            for one, two in zip(ours.ravel().tolist(), found.ravel().tolist(), strict=True)
        ],
        dtype=bool,
    )
    wrong = np.asarray(other.reshape(made.rows, -1).any(axis=1))
    if classes is not None and ours.size == made.rows:
        places = {str(value): place for place, value in enumerate(classes.tolist())}
        for row in np.flatnonzero(wrong):
            pair = [places.get(_text(value.ravel()[row], classes)) for value in (ours, found)]
            if None not in pair and _tied(expected, int(row), pair, len(classes), tolerance):
                wrong[row] = False
                made.tied += 1
    made.differing = int(wrong.sum())
    return made


def _text(value: Any, classes: npt.NDArray[Any]) -> str:
    """Returns a class in the form in which `str` writes the library's own class: 1 may stand for True or 1.0."""
    if isinstance(value, str | bytes):
        return value if isinstance(value, str) else value.decode()
    return str(np.asarray(value).astype(classes.dtype).tolist()) if classes.dtype.kind in "biuf" else str(value)


def _tied(expected: dict[str, npt.NDArray[Any]], row: int, pair: list[Any], count: int, tolerance: float) -> bool:
    for name in ("predict_proba", "decision_function"):
        scores = expected.get(name)
        if scores is None:
            continue
        if scores.ndim == 1 and count == 2:
            return bool(abs(scores[row]) <= tolerance)
        if scores.ndim == 2 and scores.shape[1] == count:
            return bool(abs(scores[row, pair[0]] - scores[row, pair[1]]) <= tolerance)
    return False
