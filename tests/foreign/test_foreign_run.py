"""Models of a foreign server and of ours under traffic and troubles: every answer is right, and what has a copy
elsewhere does not fail."""

import pytest

from tests.foreign.mixed import Mixed
from tests.foreign.run import Run


async def run(folder, say, *, seed: int, seconds: float, count: int, lie: str = "", **options: int) -> None:
    """Makes one run with `count` models of each kind, and fails on any fault."""
    async with Mixed(folder, count=count, lie=lie) as mixed:
        run = Run(mixed, seed, seconds, **options)
        try:
            await run.run()
        finally:
            verdict = await run.verdict()
            verdict.write(folder / "history.jsonl")
            say(f"{verdict}\n  history: {folder / 'history.jsonl'}")
        assert not verdict.faults, verdict.story()


@pytest.mark.foreign
@pytest.mark.timeout(0)  # the run has time limits of its own
async def test_foreign(tmp_path, say, seed, seconds, lie):
    """Two hundred models of each kind over four pods, with room for a fifth, survive minutes of troubles without a
    fault."""
    await run(tmp_path, say, seed=seed, seconds=seconds, count=200, lie=lie)
