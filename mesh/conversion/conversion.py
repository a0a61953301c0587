"""One conversion: the ONNX model for a model, and how far the answers of the two differ."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mesh.conversion import answers, comparing, given, knowledge, making, samples
from mesh.conversion.comparing import OutputDifference
from mesh.conversion.errors import SERVE_IT, CannotConvert, missing
from mesh.conversion.layout import ColumnType, RowLayout, of_model
from mesh.conversion.samples import Group

_CHUNK = 1000  # rows of one call


@dataclass(frozen=True, slots=True)
class Conversion:
    """A converted model, and how far its answers differ from the library's."""

    content: bytes
    inputs: tuple[tuple[str, str, int], ...]  # names, V2 datatypes, and columns
    outputs: tuple[tuple[str, str], ...]  # names and types
    dropped: int  # further outputs of the ONNX model, for which the library has no answers
    differences: tuple[OutputDifference, ...]
    tolerance: float

    @property
    def exact(self) -> bool:
        """True if no answer differs beyond the tolerance."""
        return not any(one.differing for one in self.differences)


def convert(
    model: Any, *, rows: Path | None, width: int | None, tolerance: float, missing_values: bool = True
) -> Conversion:
    """Converts a model, and compares the answers of both models for rows that are made up, and for those in the file
    `rows`. Numbers have 32 bits in the ONNX model, or 64 if that is exact and 32 are not. `width` is the number of
    columns, if the user has given it. Raises CannotConvert."""
    model = answers.wrapped(model)
    layout = of_model(model, width)
    knowledge.note(model, layout.columns)
    groups = [
        *samples.made_up(layout, knowledge.rows(model, layout), missing=missing_values),
        *([given.read(rows, layout)] if rows is not None else []),
    ]
    expected = _expected(model, layout, groups)
    first = _attempt(model, layout, expected, np.float32, tolerance)
    if first.exact or all(column.type is not ColumnType.NUMBER for column in layout.columns):
        return first
    try:
        second = _attempt(model, layout, expected, np.float64, tolerance)
    except CannotConvert:  # many operators have no form for 64 bits
        return first
    return second if second.exact else first


Expected = list[tuple[Group, dict[str, npt.NDArray[Any]]]]


def _expected(model: Any, layout: RowLayout, groups: Sequence[Group]) -> Expected:
    """Returns the library's answers for each group. Raises CannotConvert if the library refuses the user's rows, or all
    that are made up."""
    found: Expected = []
    refusal = ""
    for group in groups:
        try:
            found.append((group, answers.of_library(model, layout.for_library(group.rows))))
        except CannotConvert:
            raise
        except Exception as error:  # a library raises whatever it likes for rows that it does not take
            refusal = refusal or " ".join(str(error).split())[:300]
            if group.given:
                raise CannotConvert(f"the model itself refuses the given rows: {refusal}") from error
    if not any(answer for _, answer in found):
        if refusal:
            text = f"the model itself refuses all rows that were made up ({refusal})"
            raise CannotConvert(f"{text}: give rows with --rows FILE")
        raise CannotConvert(f"the model has no usable method ({', '.join(answers.METHODS)}): {SERVE_IT}")
    return found


def _attempt(model: Any, layout: RowLayout, expected: Expected, number: npt.DTypeLike, tolerance: float) -> Conversion:
    try:
        import onnxruntime
    except ImportError as error:
        raise missing(error) from error
    made = making.make(model, layout, number)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
        group, own = expected[0]
        found = session.run(None, layout.feeds(group.part(0, _CHUNK).rows, number))
        part = {name: answer[:_CHUNK] for name, answer in own.items()}
        names = comparing.matched(part, [np.asarray(one) for one in found])
        if not names:
            text = "the outputs of the converted model have other shapes than the library's answers"
            raise CannotConvert(f"{text}: {SERVE_IT}")
        outputs = [output.name for output in session.get_outputs()][: len(names)]
        differences: dict[tuple[bool, str], OutputDifference] = {}
        for group, own in expected:
            parts = [
                session.run(outputs, layout.feeds(group.part(start, start + _CHUNK).rows, number))
                for start in range(0, len(group), _CHUNK)
            ]
            for name, *found in zip(names, *parts, strict=True):
                classes = getattr(model, "classes_", None)
                one = comparing.compare(
                    name,
                    group,
                    own,
                    np.concatenate(found),
                    classes=classes if isinstance(classes, np.ndarray) else None,
                    tolerance=tolerance,
                )
                known = differences.setdefault((group.given, name), OutputDifference(name, group.given, one.classes))
                known.add(one)
    except CannotConvert:
        raise
    except Exception as error:  # ONNX Runtime's errors have no class in common
        text = " ".join(str(error).split())[:300]
        raise CannotConvert(f"ONNX Runtime cannot run the converted model ({text}): {SERVE_IT}") from error
    making.rename(made, names)
    types = [output.type.removeprefix("tensor(").removesuffix(")") for output in session.get_outputs()]
    datatypes = {ColumnType.NUMBER: f"FP{np.dtype(number).itemsize * 8}", ColumnType.INTEGER: "INT64"}
    return Conversion(
        made.SerializeToString(),
        tuple((name, datatypes.get(kind, "BYTES"), columns) for name, kind, columns in layout.inputs()),
        tuple(zip([output.name for output in made.graph.output], types, strict=False)),
        len(types) - len(names),
        tuple(differences[key] for key in sorted(differences)),
        tolerance,
    )
