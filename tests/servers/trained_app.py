"""Trains a model of each type that MLServer serves, and records the library's own answers: `trained_app.py FOLDER`.

The program runs in MLServer's environment, which has the libraries, and imports nothing of Mesh.
"""

import json
import pickle
import shutil
import sys
from pathlib import Path

import joblib
import numpy as np

ROWS = np.array([[5.1, 3.5, 1.4, 0.2], [6.7, 3.0, 5.2, 2.3], [5.9, 3.0, 4.2, 1.5]])
INPUT = "x"


def main(folder: Path) -> None:
    """Writes the models and `answers.json`, which has each model's path, its type, and its answers to ROWS."""
    import catboost
    import lightgbm
    import mlflow
    import xgboost
    from sklearn.datasets import load_iris
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = load_iris(return_X_y=True)
    flower = x.sum(axis=1)
    answers: dict[str, dict[str, object]] = {}

    def note(name: str, path: Path, kind: str, answer: object) -> None:
        values = np.asarray(answer).ravel().tolist()
        answers[name] = {"path": str(path), "type": kind, "answer": values}

    pipeline = make_pipeline(StandardScaler(), LogisticRegression()).fit(x, y)
    joblib.dump(pipeline, folder / "churn.joblib")
    note("joblib", folder / "churn.joblib", "sklearn", pipeline.predict(ROWS))
    joblib.dump(pipeline, folder / "small.joblib", compress=("gzip", 3))
    note("joblib-gzip", folder / "small.joblib", "sklearn", pipeline.predict(ROWS))
    (folder / "plain.pkl").write_bytes(pickle.dumps(pipeline))
    note("pickle", folder / "plain.pkl", "sklearn", pipeline.predict(ROWS))

    regressor = xgboost.XGBRegressor(n_estimators=8).fit(x, flower)
    for ending in ("json", "ubj"):
        regressor.save_model(folder / f"boost.{ending}")
        note(f"xgboost-{ending}", folder / f"boost.{ending}", "xgboost", regressor.predict(ROWS))
    shutil.copy(folder / "boost.ubj", folder / "boost.bst")
    note("xgboost-bst", folder / "boost.bst", "xgboost", regressor.predict(ROWS))
    classifier = xgboost.XGBClassifier(n_estimators=8).fit(x, y)
    classifier.save_model(folder / "classes.json")
    note("xgboost-classes", folder / "classes.json", "xgboost", classifier.predict(ROWS))

    queries = np.sort(np.arange(len(y)) % 15)
    ranked = np.argsort(np.arange(len(y)) % 15, kind="stable")  # each query has flowers of all kinds
    ranker = xgboost.XGBRanker(n_estimators=8).fit(x[ranked], y[ranked], qid=queries)
    ranker.save_model(folder / "ranks.ubj")
    note("xgboost-ranker", folder / "ranks.ubj", "xgboost", ranker.predict(ROWS))
    booster = xgboost.train({"objective": "count:poisson"}, xgboost.DMatrix(x, flower), 8)
    booster.save_model(folder / "native.json")
    note("xgboost-native", folder / "native.json", "xgboost", booster.predict(xgboost.DMatrix(ROWS)))

    light = lightgbm.LGBMRegressor(n_estimators=8, verbose=-1).fit(x, flower)
    light.booster_.save_model(folder / "light.txt")
    note("lightgbm", folder / "light.txt", "lightgbm", light.predict(ROWS))
    joblib.dump(light, folder / "light.joblib")
    note("lightgbm-pickle", folder / "light.joblib", "lightgbm", light.predict(ROWS))

    cat = catboost.CatBoostClassifier(iterations=8, verbose=False, allow_writing_files=False).fit(x, y)
    cat.save_model(folder / "cat.cbm")
    note("catboost", folder / "cat.cbm", "catboost", cat.predict(ROWS))

    quiet = {"verbose": False, "allow_writing_files": False}
    cats = {
        "regressor": catboost.CatBoostRegressor(iterations=8, **quiet).fit(x, flower),
        "poisson": catboost.CatBoostRegressor(iterations=8, loss_function="Poisson", **quiet).fit(x, flower),
        "ranker": catboost.CatBoostRanker(iterations=8, bootstrap_type="No", **quiet).fit(
            x[ranked], y[ranked], group_id=queries
        ),
    }
    for name, model in cats.items():
        model.save_model(folder / f"{name}.cbm")
        note(f"catboost-{name}", folder / f"{name}.cbm", "catboost", model.predict(ROWS))

    mlflow.sklearn.save_model(pipeline, folder / "flow")
    note("mlflow", folder / "flow", "mlflow", pipeline.predict(ROWS))
    mlflow.sklearn.save_model(pipeline, folder / "pickled", serialization_format="cloudpickle")
    note("mlflow-pickled", folder / "pickled", "mlflow", pipeline.predict(ROWS))
    note("mlflow-sklearn", folder / "pickled", "sklearn", pipeline.predict(ROWS))
    packed = shutil.make_archive(str(folder / "flow"), "zip", folder, "flow")
    note("mlflow-zip", Path(packed), "mlflow", pipeline.predict(ROWS))

    own = folder / "own"
    own.mkdir()
    shutil.copy(folder / "churn.joblib", own / "iris.joblib")
    described = {"implementation": "mlserver_sklearn.SKLearnModel", "parameters": {"uri": "./iris.joblib"}}
    (own / "model-settings.json").write_text(json.dumps(described))
    note("own-settings", own, "sklearn", pipeline.predict(ROWS))
    packed = shutil.make_archive(str(folder / "packed"), "gztar", folder, "own")
    note("own-settings-tar", Path(packed), "sklearn", pipeline.predict(ROWS))

    (folder / "answers.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
