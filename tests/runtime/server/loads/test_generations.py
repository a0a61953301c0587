"""Two generations of one registration in a server, and which of them answers until the older one is gone."""

import asyncio

import numpy as np
import pytest

from mesh.runtime.server.loads.loader import Order
from mesh.runtime.sharedmemory.slot import SlotState
from mesh.statuses import MeshError
from tests.support import models
from tests.support.waiting import until

OLD, NEW, NEWEST, OTHER = b"a.7", b"a.7.1", b"a.7.2", b"a.8"


def value(parts, token: bytes) -> float | None:
    """Returns the value with which the copy with the token answers. None means *not here*."""
    copy = parts.copies.find(b"m", token)
    if copy is None:
        return None
    return float(copy.session.run(["y"], {"x": np.ones((1, 1), np.float32)}, None)[0].item())


async def beside(parts, content: bytes, token: bytes, slot: int) -> None:
    """Loads new content of the model from the same path, as after a pull."""
    await parts.loader.load(Order("m", parts.write("m", content), token, slot))


async def test_both_answer_and_each_call_finds_the_one_that_it_names(parts):
    await parts.load("m", models.constant(1), token=OLD, slot=0)
    await beside(parts, models.constant(2), NEW, 1)
    assert (value(parts, OLD), value(parts, NEW)) == (1.0, 2.0)
    assert value(parts, NEWEST) is None
    assert value(parts, OTHER) is None
    assert len(list(parts.copies)) == 2


async def test_the_newer_answers_for_the_older_once_that_has_gone(parts):
    """Once the older generation is gone, the newer one answers calls for it, so routers with a slightly old view get an
    answer. Calls for a generation that is not loaded yet get none."""
    await parts.load("m", models.constant(1), token=OLD, slot=0)
    await beside(parts, models.constant(2), NEW, 1)
    await parts.loader.unload("m", token=OLD)
    assert (value(parts, OLD), value(parts, NEW), value(parts, NEWEST)) == (2.0, 2.0, None)
    assert parts.board.read(0).state is SlotState.FREE
    assert parts.board.read(1).state is SlotState.LOADED


async def test_the_older_goes_on_where_the_newer_cannot_be_loaded_or_is_given_up(parts):
    await parts.load("m", models.constant(1), token=OLD, slot=0)
    with pytest.raises(MeshError):
        await beside(parts, b"no model", NEW, 1)
    assert (value(parts, OLD), value(parts, NEW)) == (1.0, None)
    await beside(parts, models.constant(3), NEWEST, 1)
    await parts.loader.unload("m", token=NEWEST)
    assert (value(parts, OLD), value(parts, NEWEST)) == (1.0, None)


async def test_the_older_finishes_its_calls_while_the_newer_is_there(parts):
    """The older generation finishes its calls while the newer one is loaded. A third may be loaded while the first is
    still draining."""
    await parts.load("m", models.slow(), token=OLD, slot=0)
    copy = parts.copies.get("m")
    copy.row.begin(0)
    await beside(parts, models.constant(2), NEW, 1)
    unload = parts.loader.unload("m", token=OLD)
    going = asyncio.ensure_future(unload)
    await until(lambda: copy.drained is not None, why="the older copy waits for its call")
    await beside(parts, models.constant(3), NEWEST, 2)
    assert (value(parts, OLD), value(parts, NEW), value(parts, NEWEST)) == (2.0, 2.0, 3.0)
    assert not going.done()
    copy.row.end(0, runs=0, busy_ns=0, failed=False)
    copy.answered()
    await going
    assert (value(parts, NEW), value(parts, NEWEST)) == (2.0, 3.0)


async def test_an_unload_without_a_token_takes_both_and_so_does_another_registration(parts):
    await parts.load("m", models.constant(1), token=OLD, slot=0)
    await beside(parts, models.constant(2), NEW, 1)
    await parts.loader.unload("m")
    assert not list(parts.board.uses())
    await parts.load("m", models.constant(1), token=OLD, slot=0)
    await beside(parts, models.constant(2), NEW, 1)
    await beside(parts, models.constant(3), OTHER, 2)
    assert (value(parts, NEW), value(parts, OTHER)) == (None, 3.0)
    assert [slot for slot, _ in parts.board.uses()] == [2]
    await parts.loader.purge()
    assert not list(parts.board.uses())
