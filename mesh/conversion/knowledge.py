"""Knowledge of a fitted model about the values of its columns.

Rows of arbitrary numbers may all take the same path through a model: trees that were trained with values around a
thousand say the same of every value around zero. So made-up rows use the thresholds of trees, the means of scalers, the
edges of bins and the rows that neighbours are searched in, as far as the first step has any.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mesh.conversion.layout import Column, ColumnType, RowLayout, branches, steps

_MOST = 2000  # values kept for each column


def note(model: Any, columns: Sequence[Column]) -> None:
    """Adds the values that the model knows to its columns."""
    with contextlib.suppress(Exception):  # these attributes are the libraries' own: without them, rows are plainer
        _of_step(next(steps(model)), list(range(len(columns))), columns)


def rows(model: Any, layout: RowLayout) -> npt.NDArray[Any] | None:
    """Returns rows of the training data that the model holds, such as those in which it searches neighbours, or None.
    Among them may be rows that are equally far from others, for which two models may choose differently."""
    first = next(steps(model))
    for name in ("_fit_X", "X_train_", "support_vectors_"):
        found = getattr(first, name, None)
        if isinstance(found, np.ndarray) and found.dtype.kind == "f" and found.shape[1:] == (len(layout.columns),):
            return found[:_MOST]
    return None


def _of_step(step: Any, indices: Sequence[int], columns: Sequence[Column]) -> None:
    if isinstance(step, str):
        return
    first = next(steps(step))
    if (parts := branches(first)) is not None:
        for part, chosen in parts:
            _of_step(part, [indices[index] for index in chosen], columns)
        return
    for index, value in _values(first):
        if 0 <= index < len(indices) and np.isfinite(value):
            column = columns[indices[index]]
            if column.type is ColumnType.NUMBER and not column.categorical and len(column.values) < _MOST:
                column.values.append(float(value))


def _values(model: Any) -> Iterator[tuple[int, float]]:
    """Yields the values that a model knows, each with the number of its column."""
    mean, scale = getattr(model, "mean_", None), getattr(model, "scale_", None)
    if isinstance(mean, np.ndarray) and isinstance(scale, np.ndarray) and mean.shape == scale.shape:
        for away in (-3, -1, 0, 1, 3):
            yield from enumerate(mean + away * scale)
    for name in ("data_min_", "data_max_", "center_", "max_abs_", "statistics_", "means_", "theta_"):
        found = getattr(model, name, None)
        if isinstance(found, np.ndarray) and found.dtype.kind == "f":
            for row in np.atleast_2d(found):
                yield from enumerate(row)
    for name in ("_fit_X", "support_vectors_", "X_train_", "cluster_centers_", "quantiles_"):
        found = getattr(model, name, None)
        if isinstance(found, np.ndarray) and found.ndim == 2:
            for row in found[:200]:
                yield from enumerate(row)
    for index, edges in enumerate(getattr(model, "bin_edges_", ())):
        yield from ((index, edge) for edge in edges)
    yield from _thresholds(model)


def _thresholds(model: Any) -> Iterator[tuple[int, float]]:
    if hasattr(model, "tree_"):
        yield from zip(model.tree_.feature.tolist(), model.tree_.threshold.tolist(), strict=True)
    elif isinstance(trees := getattr(model, "estimators_", None), list | np.ndarray):
        for tree in np.ravel(np.asarray(trees, dtype=object)):
            yield from _thresholds(tree)
    elif hasattr(model, "_predictors"):  # of histogram-based gradient boosting
        for predictor in (one for stage in model._predictors for one in stage):
            for node in predictor.nodes:
                if not node["is_leaf"]:
                    yield int(node["feature_idx"]), float(node["num_threshold"])
    elif hasattr(model, "get_booster"):
        names = {f"f{index}": index for index in range(model.n_features_in_)}
        names |= {name: index for index, name in enumerate(model.get_booster().feature_names or ())}
        for tree in model.get_booster().get_dump(dump_format="json"):
            for node in _nodes(json.loads(tree), "children"):
                if isinstance(node.get("split_condition"), int | float):
                    yield names.get(node["split"], -1), node["split_condition"]
    elif (booster := getattr(model, "booster_", getattr(model, "booster", None))) is not None:
        for tree in booster.dump_model()["tree_info"]:
            for node in _nodes(tree["tree_structure"], "left_child", "right_child"):
                if isinstance(node.get("threshold"), int | float):
                    yield node["split_feature"], node["threshold"]


def _nodes(node: dict[str, Any], *names: str) -> Iterator[dict[str, Any]]:
    waiting = [node]
    while waiting:
        yield (one := waiting.pop())
        for name in names:
            children = one.get(name, [])
            waiting += children if isinstance(children, list) else [children]
