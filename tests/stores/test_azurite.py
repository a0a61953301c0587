"""Azure Blob Storage with shared keys, as azurite implements it."""

import pytest

from tests.stores.suite import StoreSuite
from tests.support import programs
from tests.support.stores import Azurite

pytestmark = [
    pytest.mark.stores,
    pytest.mark.skipif(bool(programs.AZURITE.missing()), reason=programs.AZURITE.missing()),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    server = Azurite(tmp_path_factory.mktemp("azurite"))
    yield server
    server.stop()


class TestAzurite(StoreSuite):
    pass
