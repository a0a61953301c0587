"""S3 as versitygw speaks it: signatures are checked, and it is fast enough for large files."""

import pytest

from tests.stores.suite import StoreSuite
from tests.support import programs
from tests.support.stores import Versity

pytestmark = [
    pytest.mark.stores,
    pytest.mark.skipif(bool(programs.VERSITYGW.missing()), reason=programs.VERSITYGW.missing()),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    server = Versity(tmp_path_factory.mktemp("versitygw"))
    yield server
    server.stop()


class TestVersity(StoreSuite):
    """All of the suite."""
