"""Models of six types over four pods under traffic and troubles: every answer is the library's own, and what has a copy
elsewhere does not fail."""

from pathlib import Path

import pytest

from tests.foreign import run
from tests.servers.bank_app import TYPES
from tests.servers.fleet import ServersFleet
from tests.servers.training import run_there

EACH = 50  # models of each type
MORE = 25  # further contents of each type, for models that are registered again


@pytest.mark.timeout(0)  # the run has time limits of its own
async def test_six_types_survive_troubles(environment: Path, tmp_path: Path, say, seed: int, seconds: float) -> None:
    """Three hundred models of six types, with room for a fifth, survive minutes of troubles without a fault."""
    bank = tmp_path / "bank"
    run_there(environment, "bank_app.py", str(bank), ",".join(TYPES), str(EACH + MORE))
    await run.faultless(ServersFleet(tmp_path, bank, each=EACH), tmp_path, say, seed=seed, seconds=seconds)
