"""Random troubles under traffic: no answer is wrong or stale, and everything works again once they end."""

import pytest

from tests.chaos.run import Run
from tests.support.arena import Arena


async def run(folder, say, *, seed: int, seconds: float, **size: int) -> None:
    # About ten of the models fit into a pod: there are evictions, and loads all the time. Registrations are compared
    # often, so that whoever missed a removal finds out within a calm.
    options = {
        "capacity": "1MiB",
        "runtime_options": ["--check-interval", "2", "--hang-timeout", "5"],
        "router_options": ["--unload-wait", "1"],  # else a stopped agent holds each change up until it goes on
    }
    async with Arena(folder, ttl=3, **options, **size) as arena:
        run = Run(arena, seed, seconds)
        try:
            await run.run()
        finally:
            verdict = await run.verdict()
            verdict.write(folder / "history.jsonl")
            say(f"{verdict}\n  history: {folder / 'history.jsonl'}")
        assert not verdict.faults, verdict.story()


@pytest.mark.chaos
@pytest.mark.timeout(0)  # it has bounds of its own
async def test_chaos(tmp_path, say, seed, seconds):
    """Three routers, three pods, ten minutes."""
    await run(tmp_path, say, seed=seed, seconds=seconds, pods=3, routers=3)
