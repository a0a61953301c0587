"""Trains many small models of each type that MLServer serves: `bank_app.py FOLDER TYPES COUNT`.

The models of one type were trained with different numbers: a model's answers to ROWS are about ten times its number.
`answers.json` maps each number to the model's path, its type, and its library's own answer for each row. The program
runs in MLServer's environment, which has the libraries, and imports nothing of Mesh.
"""

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import numpy as np

ROWS = np.random.default_rng(1).uniform(0.0, 1.0, (8, 4))
STEP = 10.0
"""Difference of the answers of two models with successive numbers."""

SAMPLES = 20_000
"""Rows that a model of scikit-learn keeps, which take about 1 MB."""


def _trees(seed: int) -> tuple[Any, Any]:
    """Returns rows, and targets between 0 and 2 that depend on the rows."""
    x = np.random.default_rng(seed).uniform(0.0, 1.0, (1000, 4))
    return x, x @ np.array([0.8, 0.6, 0.4, 0.2])


def _neighbours(number: int) -> Any:
    from sklearn.neighbors import KNeighborsRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x = np.random.default_rng(number).uniform(0.0, 1.0, (SAMPLES, 4))
    model = make_pipeline(StandardScaler(), KNeighborsRegressor(n_neighbors=3, algorithm="brute"))
    return model.fit(x, x.sum(axis=1) / 2 + STEP * number)


def _sklearn(number: int, folder: Path) -> tuple[Path, Any]:
    model = _neighbours(number)
    joblib.dump(model, folder / "model.joblib")
    return folder / "model.joblib", model.predict(ROWS)


def _mlflow(number: int, folder: Path) -> tuple[Path, Any]:
    import mlflow

    model = _neighbours(number)
    mlflow.sklearn.save_model(model, folder / "flow", pip_requirements=[], serialization_format="cloudpickle")
    return folder / "flow", model.predict(ROWS)


def _xgboost(number: int, folder: Path) -> tuple[Path, Any]:
    import xgboost

    x, y = _trees(number)
    model = xgboost.XGBRegressor(n_estimators=60, max_depth=6, n_jobs=1).fit(x, y + STEP * number)
    model.save_model(folder / "model.ubj")
    return folder / "model.ubj", model.predict(ROWS)


def _lightgbm(number: int, folder: Path) -> tuple[Path, Any]:
    import lightgbm

    x, y = _trees(number)
    model = lightgbm.LGBMRegressor(n_estimators=60, verbose=-1, n_jobs=1).fit(x, y + STEP * number)
    model.booster_.save_model(folder / "model.txt")
    return folder / "model.txt", model.predict(ROWS)


def _catboost(number: int, folder: Path) -> tuple[Path, Any]:
    import catboost

    x, y = _trees(number)
    model = catboost.CatBoostRegressor(
        iterations=100, depth=6, verbose=False, allow_writing_files=False, thread_count=1
    ).fit(x, y + STEP * number)
    model.save_model(folder / "model.cbm")
    return folder / "model.cbm", model.predict(ROWS)


MAKERS: dict[str, Callable[[int, Path], tuple[Path, Any]]] = {
    "sklearn": _sklearn,
    "mlflow": _mlflow,
    "xgboost": _xgboost,
    "lightgbm": _lightgbm,
    "catboost": _catboost,
}

TYPES = tuple(MAKERS)


def main(folder: Path, types: list[str], count: int) -> None:
    """Writes `count` models of each type, and `answers.json`."""
    warnings.simplefilter("ignore")
    answers: dict[int, dict[str, object]] = {}
    number = 0
    for model_type in types:
        for _ in range(count):
            number += 1
            place = folder / str(number)
            place.mkdir(parents=True)
            path, answer = MAKERS[model_type](number, place)
            answers[number] = {"path": str(path), "type": model_type, "answer": np.ravel(answer).tolist()}
    (folder / "answers.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","), int(sys.argv[3]))
