"""Recipes of the models of the sample fleet. A model's number determines its whole recipe.

A dense fleet has one small model for each customer. The problems are few, but the kinds of model, their settings and
the customers' rows differ. So a recipe names one of scikit-learn's bundled data sets, a kind of model, random
hyperparameters and a seed for choosing rows. Sizes vary as in practice, from half a kilobyte (a linear model) to a
megabyte (a forest). Most models are small.

Some classifiers answer with class names (BYTES) instead of numbers, some regressors take doubles (FP64).
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CLASSIFICATION = ("iris", "wine", "breast-cancer", "digits")
REGRESSION = ("diabetes",)
DATASETS = (*CLASSIFICATION, *REGRESSION)

CLASSIFIERS = (
    "logistic",
    "forest",
    "tree",
    "boosting",
    "svm",
    "mlp",
    "bayes",
    "extra-trees",
    "discriminant",
    "neighbours",
)
REGRESSORS = ("ridge", "forest", "tree", "boosting", "svm", "mlp", "lasso", "elastic", "neighbours")

_FIRST = (
    ("iris", "logistic"),
    ("wine", "forest"),
    ("breast-cancer", "svm"),
    ("digits", "mlp"),
    ("diabetes", "ridge"),
    ("diabetes", "boosting"),
)
"""Recipes of the models that `mesh up` registers, small and quick to train: one for each data set, and two for
`diabetes`."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """The description of one model, as plain data that is sent to a worker as JSON."""

    id: str
    dataset: str
    kind: str
    seed: int
    settings: Mapping[str, Any]
    named_classes: bool
    doubles: bool


def recipe(number: int) -> Recipe:
    """Returns the recipe of the model with that number, counted from 0. The same number always gives the same
    recipe."""
    drawn = random.Random(number)
    if number < len(_FIRST):
        dataset, kind = _FIRST[number]
    else:
        dataset = DATASETS[number % len(DATASETS)]
        kinds = REGRESSORS if dataset in REGRESSION else CLASSIFIERS
        kind = kinds[number // len(DATASETS) % len(kinds)]
    return Recipe(
        id=f"{dataset}-{kind}-{number:03d}",
        dataset=dataset,
        kind=kind,
        seed=number,
        settings=_settings(kind, drawn),
        named_classes=dataset in CLASSIFICATION and drawn.random() < 0.2,
        # Trees and kernels are single precision in ONNX's own operators.
        doubles=kind in ("ridge", "lasso", "elastic") and drawn.random() < 0.5,
    )


def _settings(kind: str, drawn: random.Random) -> dict[str, Any]:
    match kind:
        case "logistic":
            return {"C": round(10 ** drawn.uniform(-2, 2), 4)}
        case "forest" | "extra-trees":
            # Most are small; a few take a megabyte.
            trees, deepest = drawn.choice([(5, 12), (8, 12), (12, 12), (20, 12), (30, 12), (50, 8), (80, 8), (150, 6)])
            return {"n_estimators": trees, "max_depth": drawn.choice([d for d in (4, 6, 8, 12) if d <= deepest])}
        case "tree":
            return {"max_depth": drawn.randint(3, 12)}
        case "boosting":
            return {"n_estimators": drawn.choice([10, 15, 20, 30]), "max_depth": drawn.randint(2, 3)}
        case "svm":
            return {"C": round(10 ** drawn.uniform(-1, 2), 4)}
        case "mlp":
            return {"hidden_layer_sizes": drawn.choice([[16], [32], [64], [32, 16], [128, 64]]), "max_iter": 60}
        case "ridge" | "lasso" | "elastic":
            return {"alpha": round(10 ** drawn.uniform(-3, 0), 5)}
        case "neighbours":
            return {"n_neighbors": drawn.randint(3, 9)}
        case _:
            return {}
