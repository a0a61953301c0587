"""Trains the models of `direct`, in MLServer's environment: `direct_app.py FOLDER`. Imports nothing of Mesh."""

import sys
from pathlib import Path

FEATURES = 64


def main(folder: Path) -> None:
    """Writes a pipeline of scikit-learn and a booster of XGBoost. Both are small, so that calls cost little."""
    import joblib
    import numpy as np
    import xgboost
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x = np.random.default_rng(0).standard_normal((500, FEATURES))
    y = (x @ np.linspace(-1, 1, FEATURES) > 0).astype(int)
    joblib.dump(make_pipeline(StandardScaler(), LogisticRegression()).fit(x, y), folder / "pipeline.joblib")
    xgboost.XGBRegressor(n_estimators=20, n_jobs=1).fit(x, y).save_model(folder / "booster.ubj")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
