"""S3 as versitygw implements it. It checks signatures, and is fast enough for large files."""

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
    pass
