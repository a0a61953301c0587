"""Conversions of real models of scikit-learn, XGBoost and LightGBM, and the errors for models that cannot be
converted."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import (
    cluster,
    compose,
    ensemble,
    feature_extraction,
    impute,
    linear_model,
    naive_bayes,
    neighbors,
    neural_network,
    pipeline,
    preprocessing,
    svm,
    tree,
)
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.datasets import load_iris

from mesh.conversion import answers, comparing, conversion, knowledge, layout, samples
from mesh.conversion.conversion import Conversion
from mesh.conversion.errors import CannotConvert
from mesh.conversion.layout import Column, ColumnType

X, Y = load_iris(return_X_y=True)
SUM = X.sum(axis=1)
NAMES = np.array(["setosa", "versicolor", "virginica"])[Y]
FRAME = pd.DataFrame({"age": X[:, 0], "plan": np.where(X[:, 1] > 3, "gold", "free"), "visits": X[:, 2], "target": Y})
CLASSES = ("predict", "predict_proba")


def converted(model: Any, **more: Any) -> Conversion:
    """Converts a model with the defaults of the command."""
    return conversion.convert(model, **({"rows": None, "width": None, "tolerance": 1e-4} | more))


def names(made: Conversion) -> tuple[str, ...]:
    return tuple(name for name, _ in made.outputs)


def scaled(last: Any) -> Any:
    return pipeline.make_pipeline(preprocessing.StandardScaler(), last)


def xgboost(kind: str, **more: Any) -> Any:
    """Returns an untrained estimator of XGBoost."""
    import xgboost as library

    return getattr(library, kind)(n_estimators=4, **more)


def lightgbm(kind: str, **more: Any) -> Any:
    """Returns an untrained estimator of LightGBM."""
    import lightgbm as library

    return getattr(library, kind)(n_estimators=4, verbose=-1, **more)


@pytest.mark.parametrize(
    ("make", "target", "outputs"),
    [
        pytest.param(lambda: linear_model.LogisticRegression(max_iter=500), Y, CLASSES, id="logistic"),
        pytest.param(lambda: scaled(linear_model.LogisticRegression()), NAMES, CLASSES, id="pipeline-of-text-classes"),
        pytest.param(lambda: linear_model.LogisticRegression(max_iter=500), Y > 0, CLASSES, id="logistic-bool"),
        pytest.param(lambda: linear_model.Ridge(), SUM, ("predict",), id="ridge"),
        pytest.param(lambda: linear_model.Ridge(), SUM * 1e6, ("predict",), id="large-answers"),
        pytest.param(lambda: linear_model.Ridge(), SUM * 1e-6, ("predict",), id="small-answers"),
        pytest.param(lambda: linear_model.Ridge(), X[:, :2], ("predict",), id="two-targets"),
        pytest.param(lambda: svm.LinearSVC(), Y, ("predict", "decision_function"), id="linear-svc"),
        pytest.param(lambda: linear_model.RidgeClassifier(), Y > 0, ("predict", "decision_function"), id="two-scores"),
        pytest.param(lambda: svm.SVR(), SUM, ("predict",), id="svr"),
        pytest.param(lambda: naive_bayes.GaussianNB(), Y, CLASSES, id="bayes"),
        pytest.param(
            lambda: neural_network.MLPRegressor(hidden_layer_sizes=8, max_iter=20, random_state=0),
            SUM,
            ("predict",),
            id="network",
        ),
        pytest.param(lambda: ensemble.RandomForestClassifier(5), Y, CLASSES, id="forest"),
        pytest.param(lambda: ensemble.GradientBoostingClassifier(n_estimators=3), Y, CLASSES, id="boosting"),
        pytest.param(lambda: ensemble.HistGradientBoostingRegressor(max_iter=3), SUM, ("predict",), id="histogram"),
        pytest.param(lambda: scaled(tree.DecisionTreeRegressor(max_depth=4)), SUM, ("predict",), id="scaled-tree"),
        pytest.param(lambda: cluster.KMeans(3, n_init=1), None, ("predict", "transform"), id="clusters"),
        pytest.param(lambda: preprocessing.MinMaxScaler(), None, ("transform",), id="scaler"),
        pytest.param(lambda: xgboost("XGBClassifier"), Y, CLASSES, id="xgboost-classes"),
        pytest.param(
            lambda: xgboost("XGBRegressor", objective="count:poisson"), SUM, ("predict",), id="xgboost-poisson"
        ),
        pytest.param(lambda: scaled(xgboost("XGBClassifier")), Y > 0, CLASSES, id="xgboost-pipeline"),
        pytest.param(lambda: lightgbm("LGBMClassifier"), Y, CLASSES, id="lightgbm-classes"),
        pytest.param(lambda: lightgbm("LGBMRegressor"), SUM, ("predict",), id="lightgbm"),
        pytest.param(lambda: scaled(lightgbm("LGBMClassifier")), NAMES, CLASSES, id="lightgbm-pipeline"),
    ],
)
def test_a_model_answers_alike(make: Callable[[], Any], target: Any, outputs: tuple[str, ...]) -> None:
    """A conversion has the same outputs as the library's methods, and a separate session gives the library's
    answers."""
    model = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(X, target)
    made = converted(model, missing_values=False)
    assert made.exact, made.differences
    assert names(made) == outputs
    session = onnxruntime.InferenceSession(made.content, providers=["CPUExecutionProvider"])
    name, datatype, width = made.inputs[0]
    found = session.run(None, {name: X.astype(np.float32 if datatype == "FP32" else np.float64)})
    assert width == 4
    for method, output in zip(outputs, found, strict=True):
        own = answers.fitted(np.asarray(getattr(model, method)(X)), output.shape)
        if own.dtype.kind == "f":
            assert output == pytest.approx(own, rel=1e-3, abs=1e-3 * float(np.abs(own).mean()))
        else:
            assert (output == own).all()


@pytest.mark.parametrize("kind", ["classes", "two-classes", "numbers"])
@pytest.mark.parametrize("library", [xgboost, lightgbm])
def test_boosters_saved_by_their_library_are_converted(library: Any, kind: str) -> None:
    """A booster that its library has saved has the same outputs as a booster in scikit-learn's wrapper."""
    target = {"classes": Y, "two-classes": Y > 0, "numbers": SUM}[kind]
    prefix = "XGB" if library is xgboost else "LGBM"
    model = library(f"{prefix}{'Regressor' if kind == 'numbers' else 'Classifier'}").fit(X, target)
    booster = model.get_booster() if library is xgboost else model.booster_
    made = converted(booster, missing_values=False)
    assert made.exact, made.differences
    assert names(made) == (("predict",) if kind == "numbers" else CLASSES)


def test_columns_of_several_types_are_inputs_of_their_own() -> None:
    """A model of named columns gets one input for each column, with the column's type, and its answers equal the
    library's."""
    model = pipeline.make_pipeline(
        compose.ColumnTransformer(
            [
                ("numbers", pipeline.make_pipeline(impute.SimpleImputer(), preprocessing.StandardScaler()), ["age"]),
                ("plans", preprocessing.OneHotEncoder(handle_unknown="ignore"), ["plan"]),
                ("rest", "passthrough", ["visits"]),
            ]
        ),
        linear_model.LogisticRegression(max_iter=500),
    ).fit(FRAME.drop(columns="target"), Y)
    made = converted(model)
    assert made.exact, made.differences
    assert made.inputs == (("age", "FP32", 1), ("plan", "BYTES", 1), ("visits", "FP32", 1))


def test_text_is_converted() -> None:
    """The converted pipeline takes texts in a single input."""
    texts = ["the cat sat", "a dog ran", "the dog sat", "a cat ran"] * 5
    try:
        made = converted(
            pipeline.make_pipeline(feature_extraction.text.TfidfVectorizer(), linear_model.LogisticRegression()).fit(
                texts, [0, 1, 1, 0] * 5
            )
        )
    except CannotConvert as error:
        if "locale" not in str(error):
            raise
        pytest.skip(f"SKIPPED, NO TEXT MODEL HAS BEEN CONVERTED: {error}")
    assert made.inputs == (("input", "BYTES", 1),)
    assert made.exact, made.differences


def test_missing_values_decide_unless_they_are_left_out() -> None:
    """A converted forest that was trained without missing values answers differently for them, and the reported
    differences are in these rows alone."""
    model = ensemble.RandomForestRegressor(5, random_state=0).fit(X, SUM)
    made = converted(model)
    assert not made.exact
    assert {one.where for one in made.differences if one.differing} == {"with missing values"}
    assert converted(model, missing_values=False).exact


def test_numbers_of_64_bits_are_tried_where_32_are_not_exact() -> None:
    """If numbers of 32 bits cannot distinguish values around a million as the scaler does, numbers of 64 bits are
    tried."""
    made = converted(scaled(linear_model.Ridge()).fit(X + 1e6, SUM))
    assert made.exact, made.differences
    assert made.inputs == (("input", "FP64", 4),)


def test_neighbours_at_the_same_distance_are_noticed() -> None:
    """If several neighbours are at the same distance, as in the iris data, the two models may choose different ones.
    The conversion notices that."""
    made = converted(neighbors.KNeighborsRegressor().fit(X, SUM))
    assert [one.where for one in made.differences if one.differing] == ["of the training data"]
    apart = np.random.default_rng(0).standard_normal(X.shape)
    assert converted(neighbors.KNeighborsRegressor().fit(apart, SUM)).exact


def test_a_wrong_conversion_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the ONNX model is that of a slightly different model, the difference is found and measured."""
    model = linear_model.LinearRegression().fit(X, SUM)
    other = linear_model.LinearRegression().fit(X, SUM + 0.01 * X[:, 0])
    real = conversion.making.make
    monkeypatch.setattr(conversion.making, "make", lambda _, *more: real(other, *more))
    made = converted(model)
    assert not made.exact
    assert max(one.relative for one in made.differences) > 1e-3
    assert converted(model, tolerance=1.0).exact


class Own(BaseEstimator, TransformerMixin):
    """A step for which no converter exists."""

    def fit(self, x: Any, y: Any = None) -> "Own":
        self.n_features_in_ = x.shape[1]
        return self

    def transform(self, x: Any) -> Any:
        return x * 2


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (
            pipeline.make_pipeline(Own(), linear_model.Ridge()),
            r"no conversion to ONNX is known for .*Own: serve .*MLServer",
        ),
        (
            pipeline.make_pipeline(preprocessing.FunctionTransformer(np.log1p), linear_model.Ridge()),
            r"FunctionTransformer.*MLServer",
        ),
        (xgboost("XGBRegressor", booster="gblinear"), r"XGBRegressor cannot be converted \(.*MLServer"),
    ],
)
def test_what_cannot_be_converted_is_named(model: Any, says: str) -> None:
    """If a step cannot be converted, the error names the step, and MLServer as the way out."""
    with pytest.raises(CannotConvert, match=says):
        converted(model.fit(X, SUM))


def test_the_width_is_needed_only_if_the_model_is_silent() -> None:
    """The width must be given only if the model does not state it. A width that contradicts the model is refused."""
    model = linear_model.Ridge().fit(X, SUM)
    with pytest.raises(CannotConvert, match="have 4 columns, not 3"):
        converted(model, width=3)
    del model.n_features_in_
    with pytest.raises(CannotConvert, match="give the number with --width"):
        converted(model)
    assert converted(model, width=4).exact


def test_equal_probabilities_make_no_difference_of_classes() -> None:
    """A different class counts as a difference only if the model prefers one of the two classes."""
    group = samples.Group("rows", [np.zeros(3)])
    expected = {"predict": np.array([0, 1, 1]), "predict_proba": np.array([[0.5, 0.5], [0.5, 0.5], [0.1, 0.9]])}
    classes = np.array([0, 1])
    made = comparing.compare("predict", group, expected, np.array([1, 1, 0]), classes=classes, tolerance=1e-4)
    assert (made.tied, made.differing) == (1, 1)


numbers = st.floats(allow_nan=True, allow_infinity=True, width=64)
columns = st.lists(
    st.builds(
        lambda kind, values: Column("c", kind, values[kind]),
        st.sampled_from(ColumnType),
        st.fixed_dictionaries(
            {
                ColumnType.NUMBER: st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=3),
                ColumnType.INTEGER: st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3),
                ColumnType.TEXT: st.lists(st.text(max_size=4), max_size=3),
            }
        ),
    ),
    min_size=1,
    max_size=4,
)


@given(columns)
def test_rows_can_be_made_up_for_any_columns(made: list[Column]) -> None:
    """Whatever the model states about its columns, made-up rows have one value for each column."""
    shape = layout.RowLayout(tuple(made), separate=len({column.type for column in made}) > 1)
    groups = samples.made_up(shape)
    assert groups
    for group in groups:
        assert len(group.rows) == len(made)
        assert {len(column) for column in group.rows} == {samples.COUNT}
        for inputs in shape.feeds(group.rows, np.float32).values():
            assert inputs.ndim == 2


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=8), st.floats(0, 1))
def test_any_two_answers_can_be_compared(pairs: list[tuple[float, float]], tolerance: float) -> None:
    """Equal answers never differ, not even NaN and infinity. NaN in only one of two answers is a difference."""
    ours, theirs = (np.array(one).reshape(-1, 1) for one in zip(*pairs, strict=True))
    group = samples.Group("rows", [np.zeros(len(pairs))])
    same = comparing.compare("predict", group, {"predict": ours}, ours.copy(), classes=None, tolerance=tolerance)
    assert (same.differing, same.absolute) == (0, 0.0)
    other = comparing.compare("predict", group, {"predict": ours}, theirs, classes=None, tolerance=tolerance)
    assert 0 <= other.differing <= len(pairs)
    if any(np.isnan(one) != np.isnan(two) for one, two in pairs):
        assert other.differing > 0


def test_knowledge_of_trees_and_scalers_reaches_the_columns() -> None:
    """The thresholds of trees and the scales of scalers become values of the columns, so that rows are made up where
    the model decides."""
    for model in (
        ensemble.RandomForestRegressor(2).fit(X, SUM),
        ensemble.HistGradientBoostingRegressor(max_iter=2).fit(X, SUM),
        scaled(linear_model.Ridge()).fit(X, SUM),
        xgboost("XGBRegressor").fit(X, SUM),
        lightgbm("LGBMRegressor").fit(X, SUM),
    ):
        found = layout.of_model(model, None)
        knowledge.note(model, found.columns)
        values = [value for column in found.columns for value in column.values]
        assert values, model
        assert 0 < np.median(values) < 8, model
