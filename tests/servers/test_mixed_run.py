"""Models of seven types over four pods of three kinds under traffic and troubles: every answer is the library's own,
and no call fails while an unharmed pod has a copy."""

from pathlib import Path

import pytest

from mesh.modelservers import environments, machines
from tests.foreign import run
from tests.servers import training
from tests.servers.bank_app import TYPES
from tests.servers.fleet import ServersFleet

COUNT = 300  # models
CALLERS = 8  # on two busy cores, cold loads of more calls would queue for longer than a call may last
TRAINED = 70  # of each type of MLServer, including those that take the place of others


@pytest.mark.timeout(0)  # the run has time limits of its own
async def test_all_types_survive_troubles(environment: Path, tmp_path: Path, say, seed: int, seconds: float) -> None:
    """Three hundred models of MLServer, of Triton's Python backend and of ONNX, with room for a fifth, survive minutes
    of troubles without a fault."""
    triton = environments.installed("triton") is not None and not machines.lacks("triton")
    if not triton:
        say(f"WITHOUT TRITON: {machines.lacks('triton') or 'run `mesh servers install triton`'}")
    fleet = ServersFleet(tmp_path, training.bank(environment, TYPES, TRAINED), environment, count=COUNT, triton=triton)
    await run.faultless(fleet, tmp_path, say, seed=seed, seconds=seconds, callers=CALLERS)
