"""The expected size of a model, computed from the size of its files."""

import pytest

from mesh.pb import modelruntime_pb2 as pb
from mesh.runtime.relay.adapters import sizes


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ('{"disk_size_bytes": 1000}', 1250),
        ('{"disk_size_bytes": 0}', 7),
        ('{"disk_size_bytes": "1000"}', 7),
        ('{"storage_key": "x"}', 7),
        ("[]", 7),
        ("no JSON", 7),
        ("", 7),
    ],
)
def test_a_model_takes_a_quarter_more_than_its_files(key: str, expected: int) -> None:
    """If the size of the files is missing or unusable, the default counts."""
    request = pb.PredictModelSizeRequest(modelId="m", modelKey=key)
    assert sizes.predicted(request, default=7).sizeInBytes == expected
