"""The version of a model, which is the number of the folder in its path."""

import pytest

from mesh.schema import versions


@pytest.mark.parametrize(
    ("path", "version"),
    [
        pytest.param("s3://models/fraud/8/model.onnx", "8", id="folder"),
        pytest.param("s3://models/fraud/8", "8", id="last"),
        pytest.param("s3://models/fraud/8/", "8", id="slash"),
        pytest.param("s3://models/3/fraud/12/model.onnx", "12", id="last-of-two"),
        pytest.param("/srv/models/fraud/007/model.onnx", "007", id="as-written"),
        pytest.param("s3://models/fraud/v8/model.onnx", "1", id="not-digits-alone"),
        pytest.param("s3://8/fraud/model.onnx", "1", id="bucket"),
        pytest.param("https://127001/fraud/model.onnx?version=/9", "1", id="host-and-query"),
        pytest.param("s3://models/fraud/%38/model.onnx", "8", id="escaped"),
        pytest.param("s3://models/fraud/٣/model.onnx", "1", id="other-digits"),
        pytest.param(f"s3://models/{'1' * 40}/model.onnx", "1", id="digest"),
        pytest.param("model.onnx", "1", id="file-alone"),
        pytest.param("", "1", id="none"),
    ],
)
def test_a_models_own_version_is_the_number_of_its_folder(path, version):
    """A model in a repository with numbered folders has its folder's number as its version. Every other model has
    version 1."""
    assert versions.own(path) == version
