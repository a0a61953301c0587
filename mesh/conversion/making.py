"""The making of an ONNX model, by skl2onnx and the converters for boosters of onnxmltools.

Outputs are tensors, as V2 has no maps, and have the names of the methods whose answers they are.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mesh.conversion.answers import LightGBM
from mesh.conversion.errors import SERVE_IT, CannotConvert, missing
from mesh.conversion.layout import ColumnType, RowLayout
from mesh.conversion.loading import CATBOOST

OPSET = {"": 21, "ai.onnx.ml": 3}
"""Versions of the operators: those of the oldest ONNX Runtime that Mesh allows (1.22)."""

_TEXT = 300  # characters of a library's error


def make(model: Any, layout: RowLayout, number: npt.DTypeLike) -> Any:
    """Returns the ONNX model (onnx.ModelProto) for a model. `number` is the type of its numbers. Raises
    CannotConvert."""
    try:
        import onnxmltools
        import skl2onnx
        from skl2onnx.common import data_types
    except ImportError as error:
        raise missing(error) from error
    assert onnxmltools is not None  # it must be there before a converter needs it
    if type(model).__module__.partition(".")[0] == "catboost":
        raise CannotConvert(CATBOOST)
    numbers = data_types.DoubleTensorType if np.dtype(number) == np.float64 else data_types.FloatTensorType
    types = {
        ColumnType.NUMBER: numbers,
        ColumnType.INTEGER: data_types.Int64TensorType,
        ColumnType.TEXT: data_types.StringTensorType,
    }
    inputs = [(name, types[kind]([None, width])) for name, kind, width in layout.inputs()]
    with _quiet():
        _register_boosters()
        if isinstance(model, LightGBM):
            return _convert_lightgbm(model, layout)
        problems: list[Exception] = []
        for options in _options(model):
            try:
                return skl2onnx.convert_sklearn(model, initial_types=inputs, options=options, target_opset=OPSET)
            except NameError as error:  # the last step has no such option
                problems.append(error)
            except Exception as error:  # converters raise whatever goes wrong in them
                problems.append(error)
                if not isinstance(error, ValueError):
                    break
    raise CannotConvert(f"{_unsupported(model, problems[-1])}: {SERVE_IT}") from problems[-1]


def rename(made: Any, names: Sequence[str]) -> None:
    """Keeps as many outputs of an ONNX model as there are names, and gives them these names. A name that an input has
    too gets a `_` at its end."""
    inputs = {given.name for given in made.graph.input}
    names = [f"{name}_" if name in inputs else name for name in names]
    new = dict(zip([output.name for output in made.graph.output], names, strict=False))
    taken = {name for node in _nodes(made.graph) for name in node.output} - new.keys()
    aside = {name: f"{name}_" for name in taken & set(names)}  # of the graph's inside, for which names are free

    def renamed(name: str) -> str:
        return new.get(name) or aside.get(name, name)

    for node in _nodes(made.graph):
        node.input[:] = [renamed(name) for name in node.input]
        node.output[:] = [renamed(name) for name in node.output]
    del made.graph.output[len(names) :]
    for output in made.graph.output:
        output.name = new[output.name]


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


def _options(model: Any) -> list[dict[int, dict[str, bool]] | None]:
    """Returns the options to try, in order. A classifier without probabilities gives its scores."""
    scores = not hasattr(model, "predict_proba") and hasattr(model, "decision_function")
    tensors = {"zipmap": False}
    wanted = [{**tensors, "raw_scores": True}, tensors] if scores else [tensors]
    return [*({id(model): one} for one in wanted), None]


def _register_boosters() -> None:
    """Tells skl2onnx how to convert the boosters whose libraries are installed, also as steps of a pipeline."""
    from skl2onnx import update_registered_converter
    from skl2onnx.common import shape_calculator

    of_classes = shape_calculator.calculate_linear_classifier_output_shapes
    of_numbers = shape_calculator.calculate_linear_regressor_output_shapes
    options: dict[str, Any] = {"nocl": [True, False], "zipmap": [True, False, "columns"], "raw_scores": [True, False]}
    with contextlib.suppress(ImportError):
        import xgboost
        from onnxmltools.convert.xgboost.operator_converters.XGBoost import convert_xgboost

        for kind, shapes, has in (
            (xgboost.XGBClassifier, of_classes, options),
            (xgboost.XGBRFClassifier, of_classes, options),
            (xgboost.XGBRegressor, of_numbers, None),
            (xgboost.XGBRFRegressor, of_numbers, None),
        ):
            name = f"XGBoost{kind.__name__}"
            update_registered_converter(kind, name, shapes, convert_xgboost, overwrite=True, options=has)
    with contextlib.suppress(ImportError):
        import lightgbm
        from onnxmltools.convert.lightgbm.operator_converters.LightGbm import convert_lightgbm

        for kind, shapes, own in (
            (lightgbm.LGBMClassifier, of_classes, options),
            (lightgbm.LGBMRegressor, of_numbers, dict[str, Any](split=None)),
        ):
            name = f"LightGbm{kind.__name__}"
            update_registered_converter(kind, name, shapes, convert_lightgbm, overwrite=True, options=own)


def _convert_lightgbm(model: LightGBM, layout: RowLayout) -> Any:
    import onnxmltools
    from onnxmltools.convert.common.data_types import FloatTensorType

    inputs = [(name, FloatTensorType([None, width])) for name, _, width in layout.inputs()]
    try:
        # The highest opset that onnxmltools' own converter knows.
        return onnxmltools.convert_lightgbm(model.booster, initial_types=inputs, zipmap=False, target_opset=15)
    except Exception as error:  # converters raise whatever goes wrong in them
        raise CannotConvert(f"{_failed(model.booster, error)}: {SERVE_IT}") from error


def _unsupported(model: Any, error: Exception) -> str:
    """Returns a sentence about what cannot be converted, with the classes that no converter knows, if any."""
    from skl2onnx._supported_operators import sklearn_operator_name_map

    unknown = sorted(
        f"{type(part).__module__}.{type(part).__name__}"
        for part in _parts(model)
        if type(part) not in sklearn_operator_name_map and not hasattr(part, "steps")
    )
    if unknown:
        return f"no conversion to ONNX is known for {', '.join(dict.fromkeys(unknown))}"
    return _failed(model, error)


def _failed(model: Any, error: Exception) -> str:
    text = " ".join(str(error).split())[:_TEXT] or type(error).__name__
    return f"{type(model).__name__} cannot be converted ({text})"


def _parts(model: Any) -> Iterator[Any]:
    """Yields a model and the models that it is made of."""
    yield model
    lists = (getattr(model, name, None) for name in ("steps", "transformers_", "transformer_list", "estimators"))
    for found in lists:
        for part in found if isinstance(found, list) else ():
            inner = part[1] if isinstance(part, tuple) and len(part) > 1 else part
            if hasattr(inner, "get_params") and not isinstance(inner, type):
                yield from _parts(inner)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the converters' warnings and log lines, because the comparison shows what they are about."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
