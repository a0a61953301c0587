"""Rows that the user gives in a file, as CSV or as NumPy writes them."""

import csv
import itertools
from pathlib import Path
from typing import Any

import numpy as np

from mesh.conversion.errors import CannotConvert
from mesh.conversion.layout import Column, ColumnType, RowLayout, Rows
from mesh.conversion.samples import Group

MOST = 100_000
"""Maximum number of lines of a CSV file, its header included, or rows of an array, that are read."""


def read(path: Path, layout: RowLayout) -> Group:
    """Reads the rows of a file. Raises CannotConvert."""
    try:
        rows = _numpy(path, layout) if path.suffix.lower() == ".npy" else _csv(path, layout)
    except OSError as error:
        raise CannotConvert(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise CannotConvert(f"{path} cannot be read: give a CSV file in UTF-8, or an array in a .npy file") from error
    if not len(rows[0]):
        raise CannotConvert(f"{path} has no rows: give at least one")
    return Group("given rows", rows, given=True)


def _numpy(path: Path, layout: RowLayout) -> Rows:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise CannotConvert(f"{path} is not an array of numbers or text: {error}; save one with numpy.save") from error
    if not isinstance(array, np.ndarray):
        raise CannotConvert(f"{path} is an archive of arrays: save one array with numpy.save")
    if array.ndim != 2 or array.shape[1] != len(layout.columns):
        text = f"the array in {path} has the shape {list(array.shape)}"
        raise CannotConvert(f"{text}, but the model takes rows of {len(layout.columns)} columns")
    array = array[:MOST]
    return [_typed(path, column, array[:, index].tolist()) for index, column in enumerate(layout.columns)]


def _csv(path: Path, layout: RowLayout) -> Rows:
    names = [column.name for column in layout.columns]
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            reader = csv.reader(file)
            numbered = [(reader.line_num, line) for line in itertools.islice(reader, MOST + 1) if line]
        except csv.Error as error:
            raise CannotConvert(f"{path} is not valid CSV: {error}; correct the file") from error
    lines = [line for _, line in numbered]
    if not lines:
        raise CannotConvert(f"{path} has no rows: give at least one")
    order = list(range(len(names)))
    head = [cell.strip() for cell in lines[0]]
    if set(names) <= set(head):  # other columns, such as the target, are left out
        order = [head.index(name) for name in names]
        lines = lines[1:]
    else:
        numbers = [index for index, column in enumerate(layout.columns) if column.type is not ColumnType.TEXT]
        if any(not _is_number(head[index]) for index in numbers if index < len(head)):
            lines = lines[1:]  # a header with names that the model does not know
        if len(head) != len(names):
            raise CannotConvert(f"{path} has {len(head)} columns, but the model takes {len(names)}: {', '.join(names)}")
    for number, line in numbered:
        if len(line) <= max(order):
            text = f"line {number} of {path} has {len(line)} columns, but the first line has {len(head)}"
            raise CannotConvert(f"{text}: complete it")
    return [
        _typed(path, column, [line[index] for line in lines])
        for column, index in zip(layout.columns, order, strict=True)
    ]


def _typed(path: Path, column: Column, cells: list[Any]) -> Any:
    if column.type is ColumnType.TEXT:
        return np.asarray([str(cell) for cell in cells] + [None], dtype=object)[:-1]
    try:
        numbers = np.asarray([np.nan if str(cell).strip() == "" else float(cell) for cell in cells], dtype=np.float64)
        if column.type is ColumnType.NUMBER:
            return numbers
        if not np.all(numbers == np.round(numbers)) or np.any(np.abs(numbers) > 2**53):
            text = f"{path}: column {column.name} takes integers of at most 2^53, but has empty cells or other numbers"
            raise CannotConvert(f"{text}: correct the file")
        return numbers.astype(np.int64)
    except (ValueError, TypeError) as error:
        raise CannotConvert(f"{path}: column {column.name} takes numbers: {error}; correct the file") from error


def _is_number(cell: str) -> bool:
    try:
        float(cell or "nan")
    except ValueError:
        return False
    return True
