"""Models of a foreign server and of Mesh's own under traffic and troubles: every answer is right, and no call fails
while an unharmed pod has a copy."""

import pytest

from tests.foreign import run
from tests.foreign.mixed import Mixed


@pytest.mark.foreign
@pytest.mark.timeout(0)  # the run has time limits of its own
async def test_foreign(tmp_path, say, seed, seconds, lie):
    """Two hundred models of each kind over four pods, with room for a fifth, survive minutes of troubles without a
    fault."""
    await run.faultless(Mixed(tmp_path, count=200, lie=lie), tmp_path, say, seed=seed, seconds=seconds)
