"""The data sets: scikit-learn's bundled ones, none of which is downloaded.

Their rows are also what the demo's requests are made of, so the fleet's folder keeps them as plain arrays: whoever
sends requests needs numpy and not scikit-learn, whose import takes seconds.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ORIGINS = {
    "iris": "Iris (R. A. Fisher, UCI)",
    "wine": "Wine recognition (UCI)",
    "breast-cancer": "Breast Cancer Wisconsin, diagnostic (UCI)",
    "digits": "Optical Recognition of Handwritten Digits, test set (UCI)",
    "diabetes": "Diabetes (Efron, Hastie, Johnstone, Tibshirani, 2004)",
}

FEATURES = {"iris": 4, "wine": 13, "breast-cancer": 30, "digits": 64, "diabetes": 10}
"""Columns of each: what its models take."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """Rows and what they stand for."""

    rows: npt.NDArray[np.float64]  # [count, features]
    targets: npt.NDArray[Any]  # class numbers, or values
    names: tuple[str, ...]  # of the classes; empty for a regression


def load(name: str) -> Dataset:
    """Reads one from the installed scikit-learn."""
    from sklearn import datasets  # seconds to import, needed in workers only

    loaded = {
        "iris": datasets.load_iris,
        "wine": datasets.load_wine,
        "breast-cancer": datasets.load_breast_cancer,
        "digits": datasets.load_digits,
        "diabetes": datasets.load_diabetes,
    }[name]()
    names = tuple(str(label) for label in getattr(loaded, "target_names", ()))
    return Dataset(np.asarray(loaded.data, np.float64), np.asarray(loaded.target), names)


def rows_file(directory: Path, dataset: str) -> Path:
    """Where the rows for requests are."""
    return directory / "rows" / f"{dataset}.npy"
