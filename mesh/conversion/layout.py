"""The rows that a model takes: how many columns, and whether each holds numbers, integers or text.

scikit-learn does not record the types of the columns that a model was trained with. They follow from the steps that
see them first: an encoder knows its categories, and a vectorizer takes text. Whatever is left is a number.

The ONNX model has one input for the whole row, or, if columns differ or the model selects them by name, one for each.
"""

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mesh.conversion.errors import CannotConvert

INPUT = "input"
"""The name of the only input."""

_VECTORIZERS = ("CountVectorizer", "TfidfVectorizer", "HashingVectorizer")
_WIDTH = "give the number with --width"


class ColumnType(enum.Enum):
    """The type of a column."""

    NUMBER = "number"
    INTEGER = "integer"
    TEXT = "text"


@dataclass(slots=True)
class Column:
    """One column of a model's rows."""

    name: str
    type: ColumnType = ColumnType.NUMBER
    values: list[Any] = field(default_factory=list)  # with which the model was trained, as far as it shows them
    categorical: bool = False  # it takes no other values


Rows = list[npt.NDArray[Any]]
"""Rows by their columns: float64 for numbers, int64 for integers, object for text, all of the same length."""


@dataclass(frozen=True, slots=True)
class RowLayout:
    """The form of a model's rows, for the library and for the ONNX model."""

    columns: tuple[Column, ...]
    separate: bool  # one input for each column
    frame: bool = False  # the library selects columns by their names
    flat: bool = False  # the library takes a list of texts instead of a table

    def for_library(self, rows: Rows) -> Any:
        """Returns rows as the library takes them: an array or a data frame of shape (rows, columns), or, if `flat` is
        true, an array of texts. Raises CannotConvert if pandas is needed and missing."""
        if self.flat:
            return rows[0]
        if self.frame:
            try:
                import pandas
            except ImportError as error:
                raise CannotConvert(
                    "the model selects columns by name, which needs pandas: pip install pandas"
                ) from error
            return pandas.DataFrame({column.name: row for column, row in zip(self.columns, rows, strict=True)})
        types = {column.type for column in self.columns}
        if types == {ColumnType.NUMBER}:
            return np.stack(rows, axis=1).astype(np.float64)
        if types == {ColumnType.INTEGER}:
            return np.stack(rows, axis=1).astype(np.int64)
        return np.stack([row.astype(object) for row in rows], axis=1)

    def inputs(self) -> list[tuple[str, ColumnType, int]]:
        """Returns the name, type and width of each input of the ONNX model."""
        if self.separate:
            return [(column.name, column.type, 1) for column in self.columns]
        return [(INPUT, self.columns[0].type, len(self.columns))]

    def feeds(self, rows: Rows, number: npt.DTypeLike) -> dict[str, npt.NDArray[Any]]:
        """Returns the inputs of the ONNX model for rows. `number` is the type of columns of numbers."""
        types = {ColumnType.NUMBER: np.dtype(number), ColumnType.INTEGER: np.dtype(np.int64)}
        made = {}
        at = 0
        for name, kind, width in self.inputs():
            with np.errstate(over="ignore"):
                made[name] = np.stack(rows[at : at + width], axis=1).astype(types.get(kind, np.dtype(object)))
            at += width
        return made


def of_model(model: Any, width: int | None) -> RowLayout:
    """Returns the layout of a model's rows. `width` is the number of columns that the user has given, if any. Raises
    CannotConvert."""
    first = next(steps(model))
    if type(first).__name__ in _VECTORIZERS:
        return RowLayout((Column(INPUT, ColumnType.TEXT, list(getattr(first, "vocabulary_", ()))),), False, flat=True)
    count = _count(model, width)
    names = getattr(model, "feature_names_in_", None)
    names = [f"x{index}" for index in range(count)] if names is None else [str(name) for name in names]
    columns = [Column(name) for name in names]
    _note_types(first, list(range(count)), columns)
    by_name = hasattr(model, "feature_names_in_") and _selects(first)
    differ = len({column.type for column in columns}) > 1
    return RowLayout(tuple(columns), separate=by_name or differ, frame=by_name)


def steps(model: Any) -> Iterator[Any]:
    """Yields the steps of a pipeline, in order, or the model itself. For a search, such as GridSearchCV, yields those
    of the best model."""
    model = getattr(model, "best_estimator_", model)
    if hasattr(model, "steps"):
        for _, step in model.steps:
            if step not in (None, "passthrough"):
                yield from steps(step)
    else:
        yield model


def branches(step: Any) -> list[tuple[Any, list[int]]] | None:
    """Returns the parts of a step that selects columns, each with the numbers of its columns; None for other steps."""
    chosen = getattr(step, "_transformer_to_input_indices", None)
    if chosen is None or not hasattr(step, "transformers_"):
        return None
    return [(part, [int(index) for index in chosen.get(name, ())]) for name, part, _ in step.transformers_]


def _selects(step: Any) -> bool:
    return hasattr(step, "transformers_")


def _count(model: Any, width: int | None) -> int:
    told = getattr(model, "n_features_in_", None)
    if told is None:
        for name in ("num_feature", "num_features"):
            if callable(tell := getattr(model, name, None)):
                told = tell()
    if not isinstance(told, int | np.integer):
        if width is None:
            raise CannotConvert(f"the model does not say how many columns its rows have: {_WIDTH}")
        return width
    if width is not None and width != told:
        raise CannotConvert(f"the model's rows have {told} columns, not {width}: leave out --width")
    return int(told)


def _note_types(step: Any, indices: Sequence[int], columns: list[Column]) -> None:
    """Notes what a step, and the steps in it, reveal about the columns that it sees."""
    for each in steps(step) if not isinstance(step, str) else ():
        if (parts := branches(each)) is not None:
            for part, chosen in parts:
                _note_types(part, [indices[index] for index in chosen], columns)
            return
        if hasattr(each, "transformer_list"):  # a union, whose parts all see the same columns
            for _, part in each.transformer_list:
                _note_types(part, indices, columns)
            return
        if type(each).__name__ in _VECTORIZERS and len(indices) == 1:
            columns[indices[0]].type = ColumnType.TEXT
            columns[indices[0]].values = list(getattr(each, "vocabulary_", ()))
        categories = getattr(each, "categories_", None)
        if isinstance(categories, list) and len(categories) == len(indices):
            for index, known in zip(indices, categories, strict=True):
                _note(columns[index], known)
            return
        statistics = getattr(each, "statistics_", None)
        if isinstance(statistics, np.ndarray) and statistics.dtype.kind in "OUS" and len(statistics) == len(indices):
            for index, known in zip(indices, statistics, strict=True):
                _note(columns[index], np.asarray([known]))


def _note(column: Column, known: npt.NDArray[Any]) -> None:
    if known.dtype.kind in "OUS" and any(isinstance(value, str) for value in known.tolist()):
        column.type = ColumnType.TEXT
        column.values = [value for value in known.tolist() if isinstance(value, str)]
    elif known.dtype.kind in "iu":
        column.type = ColumnType.INTEGER
        column.values = known.tolist()
    else:
        column.values = [value for value in known.tolist() if isinstance(value, float) and np.isfinite(value)]
        column.categorical = bool(column.values)
