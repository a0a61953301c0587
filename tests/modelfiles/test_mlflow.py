"""MLflow's description of a model, and the type that follows from its flavours."""

from pathlib import Path

import pytest

from mesh.modelfiles import mlflow
from mesh.modelfiles.mlflow import BadDescription


@pytest.mark.parametrize(
    ("flavours", "kind"),
    [
        ("{python_function: {}, sklearn: {}}", "mlflow"),
        ("{python_function: {}, onnx: {}}", "onnx"),
        ("{xgboost: {}}", "xgboost"),
        ("{lightgbm: {}, other: 3}", "lightgbm"),
    ],
)
def test_flavours_decide_the_type(tmp_path: Path, flavours: str, kind: str) -> None:
    """ONNX, XGBoost and LightGBM flavours decide the type. Other models are served by MLflow through their Python
    function."""
    (tmp_path / "MLmodel").write_text(f"flavors: {flavours}\n")
    assert mlflow.type_of(mlflow.flavours(tmp_path)) == kind


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("flavors: [", "not valid YAML"),
        ("a: b", "names no flavors"),
        ("- x", "names no flavors"),
        ("flavors: {}", "names no flavors"),
        ("flavors: {spark: {}, h2o: {}}", "has the flavors h2o, spark, none of which can be served"),
        ("[" * 100_000, "not valid YAML"),
        ("flavors: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("x" * (2 << 20), "more than 1048576 bytes"),
    ],
)
def test_a_bad_description_is_refused(tmp_path: Path, text: str, says: str) -> None:
    """A bad description is refused. The error says what is wrong with the file, and no code in it is run."""
    (tmp_path / "MLmodel").write_text(text)
    with pytest.raises(BadDescription, match=says):
        mlflow.type_of(mlflow.flavours(tmp_path))


@pytest.mark.parametrize(
    ("flavour", "says"),
    [
        ("xgboost: {data: ../secret}", "outside of the model's folder"),
        ("xgboost: {data: /etc/passwd}", "outside of the model's folder"),
        ("xgboost: {data: model.xgb}", "model.xgb, which MLmodel names, is missing"),
        ("xgboost: {data: 5}", "the flavor xgboost in MLmodel lacks data, the name of the model's file"),
        ("lightgbm: {data: x}", "has no flavor xgboost, only lightgbm"),
    ],
)
def test_the_file_of_a_flavour_is_in_its_folder(tmp_path: Path, flavour: str, says: str) -> None:
    """The file of a flavour must be in the model's folder, so a description cannot name a file of the pod."""
    (tmp_path / "MLmodel").write_text(f"flavors: {{{flavour}}}")
    with pytest.raises(BadDescription, match=says):
        mlflow.file_of(tmp_path, "xgboost")


def test_a_pickle_in_the_format_of_skops_is_left_to_mlflow(tmp_path: Path) -> None:
    """A scikit-learn model in the skops format of MLflow 3 is left to MLflow, because only MLflow can read the
    format."""
    (tmp_path / "MLmodel").write_text("flavors: {sklearn: {pickled_model: m, serialization_format: skops}}")
    with pytest.raises(BadDescription, match="--type mlflow"):
        mlflow.file_of(tmp_path, "sklearn")
