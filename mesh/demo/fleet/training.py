"""Training the model of a recipe, and exporting it to ONNX. Only worker processes import this module, because it
imports scikit-learn.

With the same versions of the libraries, the same recipe gives the same bytes. Seeds are fixed, and one thread computes.
The converter draws the graph's name at random, numbers names across graphs, and takes some items from a set. This
module replaces the names and sorts the items.
"""

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import AttributeProto, GraphProto, ModelProto
from skl2onnx import convert_sklearn
from skl2onnx.common.data_types import DoubleTensorType, FloatTensorType
from sklearn.base import BaseEstimator
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import (
    ExtraTreesClassifier,
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.linear_model import ElasticNet, Lasso, LogisticRegression, Ridge
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, SVR
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

from mesh.demo.fleet import datasets
from mesh.demo.fleet.datasets import Dataset
from mesh.demo.fleet.recipes import CLASSIFICATION, Recipe

OPSET = {"": 17, "ai.onnx.ml": 3}

_CLASSIFIERS: dict[str, type[BaseEstimator]] = {
    "logistic": LogisticRegression,
    "forest": RandomForestClassifier,
    "tree": DecisionTreeClassifier,
    "boosting": GradientBoostingClassifier,
    "svm": SVC,
    "mlp": MLPClassifier,
    "bayes": GaussianNB,
    "extra-trees": ExtraTreesClassifier,
    "discriminant": LinearDiscriminantAnalysis,
    "neighbours": KNeighborsClassifier,
}
_REGRESSORS: dict[str, type[BaseEstimator]] = {
    "ridge": Ridge,
    "forest": RandomForestRegressor,
    "tree": DecisionTreeRegressor,
    "boosting": GradientBoostingRegressor,
    "svm": SVR,
    "mlp": MLPRegressor,
    "lasso": Lasso,
    "elastic": ElasticNet,
    "neighbours": KNeighborsRegressor,
}
_SCALED = frozenset({"logistic", "svm", "mlp", "neighbours", "ridge", "lasso", "elastic"})
_SEEDED = frozenset({"forest", "tree", "boosting", "mlp", "extra-trees"})


def export(recipe: Recipe, data: Dataset | None = None) -> bytes:
    """Trains the model and returns it as ONNX. Passing `data` saves reading the data set again."""
    data = data or datasets.load(recipe.dataset)
    rows, targets = _customers_rows(recipe, data)
    classifies = recipe.dataset in CLASSIFICATION
    settings = dict(recipe.settings)
    if recipe.kind in _SEEDED:
        settings["random_state"] = recipe.seed
    last = (_CLASSIFIERS if classifies else _REGRESSORS)[recipe.kind](**settings)
    model = make_pipeline(StandardScaler(), last) if recipe.kind in _SCALED else last
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a few rounds of training do not converge, which does not matter
        model.fit(rows, targets)
        width = [None, rows.shape[1]]
        onnx = convert_sklearn(
            model,
            name=recipe.id,
            initial_types=[("input", DoubleTensorType(width) if recipe.doubles else FloatTensorType(width))],
            options={id(last): {"zipmap": False}} if classifies else None,
            target_opset=OPSET,
        )
    _normalize(onnx)
    encoded: bytes = onnx.SerializeToString(deterministic=True)
    return encoded


def _normalize(model: ModelProto) -> None:
    """Names everything inside the graph by its position, and sorts unordered items."""
    imports = sorted(model.opset_import, key=lambda entry: str(entry.domain))
    del model.opset_import[:]
    model.opset_import.extend(imports)
    names = {value.name: value.name for value in (*model.graph.input, *model.graph.output)}
    names[""] = ""  # an optional input that is left out
    _rename(model.graph, names)


def _rename(graph: GraphProto, names: dict[str, str]) -> None:
    def new(name: str) -> str:
        return names.setdefault(name, f"v{len(names)}")

    for value in (*graph.input, *graph.output, *graph.value_info):
        value.name = new(value.name)
    for tensor in graph.initializer:
        tensor.name = new(tensor.name)
    for node in graph.node:
        node.name = ""
        node.input[:] = [new(name) for name in node.input]
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                attribute.g.name = "body"
                _rename(attribute.g, names)  # a subgraph may use names of the surrounding graph, so both share them
        node.output[:] = [new(name) for name in node.output]


def _customers_rows(recipe: Recipe, data: Dataset) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Returns the rows and targets of one customer: a random part of the data, drawn with the recipe's seed."""
    drawn = np.random.default_rng(recipe.seed)
    count = len(data.rows)
    # Only a few hundred rows of the larger sets: a customer has no more, and training stays quick.
    chosen = drawn.choice(count, size=min(count * 4 // 5, 500), replace=False)
    targets = data.targets[chosen]
    if recipe.named_classes:
        targets = np.asarray(data.names, dtype=np.str_)[targets]
    return data.rows[chosen].astype(np.float32), targets
