"""Google Cloud Storage without credentials, as fake-gcs-server implements it."""

import pytest

from tests.stores.suite import StoreSuite
from tests.support import programs
from tests.support.stores import FakeGcs

pytestmark = [
    pytest.mark.stores,
    pytest.mark.skipif(bool(programs.FAKE_GCS.missing()), reason=programs.FAKE_GCS.missing()),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    server = FakeGcs(tmp_path_factory.mktemp("fake_gcs"))
    yield server
    server.stop()


class TestFakeGcs(StoreSuite):
    pass
