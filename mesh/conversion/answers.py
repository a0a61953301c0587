"""The library's own answers, by the methods that give them: `predict`, `predict_proba`, `transform` and others.

Boosters that were saved by their own library, instead of in a pickle, are wrapped, so that all models answer alike.
"""

import json
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from mesh.conversion.errors import SERVE_IT, CannotConvert

METHODS = ("predict", "predict_proba", "decision_function", "transform", "score_samples")
"""Methods that may be outputs, in the order in which they are tried for an output of the ONNX model."""


class LightGBM:
    """A booster of LightGBM that answers as LightGBM's classifiers and regressors do."""

    def __init__(self, booster: Any) -> None:
        self.booster = booster
        self.n_features_in_ = booster.num_feature()
        objective = str(booster.dump_model(num_iteration=1).get("objective", "")).split(" ")[0]
        self.classes = {"binary": 2}.get(objective, booster.num_model_per_iteration())
        if objective.startswith(("binary", "multiclass")):
            self.classes_ = np.arange(self.classes)
            self.predict_proba = self._probabilities

    def predict(self, rows: Any) -> npt.NDArray[Any]:
        """Returns the numbers or classes for rows."""
        if hasattr(self, "classes_"):
            return np.asarray(self._probabilities(rows).argmax(axis=1))
        return np.asarray(self.booster.predict(rows))

    def _probabilities(self, rows: Any) -> npt.NDArray[Any]:
        found = np.asarray(self.booster.predict(rows))
        return np.stack([1 - found, found], axis=1) if found.ndim == 1 else found


def wrapped(model: Any) -> Any:
    """Returns a model that has the methods of scikit-learn's models. Raises CannotConvert."""
    kind = f"{type(model).__module__.partition('.')[0]}.{type(model).__name__}"
    if kind == "lightgbm.Booster":
        return LightGBM(model)
    if kind != "xgboost.Booster":
        return getattr(model, "best_estimator_", model)
    import xgboost

    objective = str(json.loads(model.save_config())["learner"]["objective"]["name"])
    if objective.startswith("rank:"):
        raise CannotConvert(f"the model ranks ({objective}), for which there is no conversion: {SERVE_IT}")
    made = xgboost.XGBClassifier() if objective.startswith(("binary:", "multi:")) else xgboost.XGBRegressor()
    made.load_model(model.save_raw("ubj"))
    return made


def of_library(model: Any, rows: Any) -> dict[str, npt.NDArray[Any]]:
    """Returns the answers of all methods that the model has. Raises what the library raises if it refuses the rows."""
    found = {}
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        for name in METHODS:
            if not callable(method := getattr(model, name, None)):
                continue
            try:
                answer = method(rows)
            except (AttributeError, NotImplementedError):  # offered, but not with these parameters
                continue
            if hasattr(answer, "toarray"):
                answer = answer.toarray()
            try:
                found[name] = np.asarray(answer)
            except ValueError:  # a list of arrays with different shapes: one for each output of a model with several
                continue
    return found


def fitted(answer: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any] | None:
    """Returns a library's answer in the shape of an output of the ONNX model, or None if it does not fit."""
    if answer.shape == shape:
        return answer
    if answer.ndim == 1 and shape == (len(answer), 2):  # the score of the second of two classes
        return np.stack([-answer, answer], axis=1)
    return answer.reshape(shape) if answer.size == np.prod(shape) and answer.shape[:1] == shape[:1] else None
