"""The reading of a model's file by the library that wrote it.

A pickle is loaded as joblib does, which also reads plain pickles, compressed or not. Its code runs in this process.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mesh.conversion.errors import CannotConvert, missing
from mesh.modelfiles import mlflow, sniffing

_XGBOOST = (sniffing.XGBOOST_JSON, sniffing.XGBOOST_UBJ, sniffing.XGBOOST_BINARY)
CATBOOST = 'CatBoost exports ONNX itself, with model.save_model("model.onnx", format="onnx")'
"""The way out for models of CatBoost."""

_FLAVOURS = ("sklearn", "xgboost", "lightgbm", "catboost")
_TEXT = 300  # characters of a library's error


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory, with its library's remarks about it."""

    model: Any
    remarks: tuple[str, ...] = ()  # what the library warned of


def file_of(path: Path) -> tuple[Path, sniffing.Kind | None]:
    """Returns the file of the model at `path`, and its kind. Raises CannotConvert."""
    try:
        if (path / mlflow.DESCRIPTION).is_file():
            found = mlflow.flavours(path)
            flavour = next((name for name in _FLAVOURS if name in found), _FLAVOURS[0])
            path = mlflow.file_of(path, flavour)
        kind = sniffing.look(path)
    except mlflow.BadDescription as error:
        raise CannotConvert(str(error)) from error
    except OSError as error:
        raise CannotConvert(f"{path} cannot be read: {error.strerror}") from error
    if path.is_dir():
        raise CannotConvert(f"{path} is a folder: name the model's file in it")
    if kind is sniffing.ONNX:
        raise CannotConvert(f"{path} is an ONNX model already: register it as it is")
    return path, kind


def load(path: Path, kind: sniffing.Kind | None) -> LoadedModel:
    """Loads the model from its file; `file_of` returns both. Runs the code in a pickle. Raises CannotConvert."""
    reader: Callable[[Path], Any]
    if kind in _XGBOOST or (kind is None and path.suffix in (".bst", ".ubj")):
        reader = _xgboost
    elif kind is sniffing.LIGHTGBM:
        reader = _lightgbm
    elif kind in (sniffing.CATBOOST, sniffing.CATBOOST_PICKLE):
        raise CannotConvert(f"{path} is {kind.what}: {CATBOOST}")
    elif kind is None or (kind.code and kind not in (sniffing.TORCH, sniffing.MAR)):
        reader = _pickle
    else:
        raise CannotConvert(f"{path} is {kind.what}, which is not converted here: {kind.way_out}")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            model = reader(path)
        except CannotConvert:
            raise
        except ImportError as error:
            text = f"{path} needs the Python module {error.name}, which is not installed: install it, or run this "
            raise CannotConvert(f"{text}command in the environment that trained the model") from error
        except AttributeError as error:
            text = f"{path} refers to something that is missing here ({error}): run this command in the environment "
            raise CannotConvert(f"{text}that trained the model") from error
        except Exception as error:  # a pickle raises whatever its code raises
            text = f"{type(error).__name__}: {error}"[:_TEXT]
            raise CannotConvert(f"{path} cannot be loaded ({text}): check the file") from error
    remarks = [str(one.message) for one in warned if "Version" in type(one.message).__name__]
    return LoadedModel(model, tuple(dict.fromkeys(remarks)))


def _pickle(path: Path) -> Any:
    try:
        import joblib
    except ImportError as error:
        raise missing(error) from error
    model = joblib.load(path)
    if not any(hasattr(model, name) for name in ("predict", "transform")):
        what = f"{type(model).__module__}.{type(model).__qualname__}"
        raise CannotConvert(
            f"{path} holds an object of {what}, which has neither predict nor transform: it is not a model"
        )
    return model


def _xgboost(path: Path) -> Any:
    import xgboost

    booster = xgboost.Booster()
    booster.load_model(path)
    return booster


def _lightgbm(path: Path) -> Any:
    import lightgbm

    return lightgbm.Booster(model_file=path)
