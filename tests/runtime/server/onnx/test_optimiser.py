"""The optimiser's comparison of a model's plain form with the optimised one."""

from typing import Any

import numpy as np
import pytest

from mesh.runtime.server.onnx import optimiser


class Session:
    """A session whose outputs have the given values, or that fails with an error."""

    def __init__(self, *values: float, error: Exception | None = None) -> None:
        self.outputs = {f"y{number}": None for number in range(2)}
        self.inputs: dict[str, None] = {"x": None}
        self._values = values
        self._error = error

    def made_up(self) -> dict[str, Any]:
        return {"x": np.zeros(1)}

    def run(self, names: list[str], feed: dict[str, Any], options: object) -> list[np.ndarray]:
        if self._error is not None:
            raise self._error
        return [np.array([value]) for value in self._values]


FAILS = Session(error=ValueError("no"))


@pytest.mark.parametrize(
    ("one", "other", "agree"),
    [
        (Session(1.0, float("nan")), Session(1.0, float("nan")), True),
        (Session(1.0, 2.0), Session(1.0, 3.0), False),
        (Session(1.0, 2.0), FAILS, False),
        (FAILS, Session(1.0, 2.0), False),
        (FAILS, FAILS, True),
        (FAILS, Session(error=KeyError("no")), False),
    ],
    ids=["equal", "different", "only the other fails", "only this one fails", "both fail", "they fail differently"],
)
def test_forms_agree_if_they_answer_or_fail_alike(one: Any, other: Any, agree: bool) -> None:
    assert optimiser._agree(one, other) is agree
