"""The data sets that are bundled with scikit-learn, so that nothing has to be downloaded.

The demo's requests consist of rows of the data sets. The fleet's folder keeps the rows as plain arrays, so sending
requests needs numpy but not scikit-learn, whose import takes seconds.
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
"""Number of columns of each data set, which is the width of its models' inputs."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """The rows of a data set, and their targets."""

    rows: npt.NDArray[np.float64]  # [count, features]
    targets: npt.NDArray[Any]  # numbers of classes, or values
    names: tuple[str, ...]  # of the classes; empty for a regression


def load(name: str) -> Dataset:
    """Reads a data set from the installed scikit-learn."""
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
    """Returns the path of the file with the rows that requests send."""
    return directory / "rows" / f"{dataset}.npy"
