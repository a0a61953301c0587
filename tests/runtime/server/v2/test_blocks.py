"""Memory of large requests: where contents begin in it, and when the memory is reused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.pb import inference_pb2 as pb
from mesh.runtime.server.v2 import alignment, blocks, requests
from mesh.runtime.server.v2.blocks import Blocks
from mesh.wire import framing
from tests.runtime.server.conftest import outputs
from tests.support import models
from tests.support.examples import examples
from tests.support.fakecalls import FakeCall
from tests.support.onnxserver import request

SIZE = 3 << 20
FP32 = np.dtype(np.float32)


def placed(memory: Blocks, frame: bytes, begun: int = 1000) -> memoryview:
    """Returns a frame in memory that was allocated when the frame's first bytes had arrived."""
    view = memory.memory(len(frame), frame[:begun])
    view[:] = frame
    return view


def boundary(view: memoryview) -> int:
    """Returns the distance of the memory's address from the alignment boundary before it."""
    return int(np.frombuffer(view, np.uint8).ctypes.data % alignment.BOUNDARY)


@settings(max_examples=examples(100), deadline=None)
@given(st.text(max_size=70), st.text(max_size=300), st.lists(st.integers(0, 1 << 40), max_size=9), st.integers(1, 4000))
def test_contents_begin_at_a_boundary_wherever_they_are_in_the_message(name, request_id, shape, begun):
    """Raw contents begin at an alignment boundary, whatever precedes them in the message, if their first bytes had
    arrived in time."""
    message = pb.ModelInferRequest(model_name=name, id=request_id, raw_input_contents=[bytes(range(256)) * 64])
    message.inputs.add(name="x", datatype="FP32", shape=shape)
    frame = framing.pack(message.SerializeToString())
    view = placed(Blocks(), frame, begun)
    _, (contents,) = requests.split(view[framing.PREFIX :])
    assert contents == bytes(range(256)) * 64
    if len(frame) - len(contents) < begun:
        assert boundary(contents) == 0


@settings(max_examples=examples(200), deadline=None)
@given(st.binary(max_size=60))
def test_any_beginning_is_accepted(begun):
    """Messages that are malformed, compressed, or not of V2 get memory too."""
    assert 0 <= blocks.contents_at(begun) <= len(begun)
    assert len(Blocks().memory(100, begun)) == 100


def test_contents_at_a_boundary_are_not_copied():
    frame = framing.pack(request("m", x=np.arange(SIZE // 4, dtype=np.float32)))
    view = placed(Blocks(), frame)
    _, (contents,) = requests.split(view[framing.PREFIX :])
    array = alignment.put(contents, (SIZE // 4,), FP32)
    assert np.shares_memory(array, np.frombuffer(view, np.uint8))
    assert (array == np.arange(SIZE // 4)).all()
    elsewhere = alignment.put(bytes(3) + contents[3:], (SIZE // 4,), FP32)
    assert not np.shares_memory(elsewhere, np.frombuffer(view, np.uint8))
    assert elsewhere.ctypes.data % alignment.BOUNDARY == 0


def test_memory_is_used_again_once_nothing_refers_to_the_message():
    """As long as a frame, a part of it or an array of its contents exists, its memory is not used for another
    message."""
    memory = Blocks()
    first = placed(memory, b"\0" * SIZE)
    where = np.frombuffer(first, np.uint8).ctypes.data
    array = np.frombuffer(first[1000:2000], np.uint8).reshape(10, 100)[3:]
    del first
    second = placed(memory, b"\1" * SIZE)
    assert not array.any()
    assert memory.free == 0
    del array
    assert memory.free >= SIZE
    third = placed(memory, b"\2" * (SIZE - 5000))
    assert np.frombuffer(third, np.uint8).ctypes.data == where
    assert bytes(second[:3]) == b"\1\1\1"
    assert memory.free == 0


def test_a_small_message_does_not_take_large_memory():
    memory = Blocks()
    memory.memory(SIZE * 4, b"")
    free = memory.free
    small = memory.memory(SIZE, b"")
    assert memory.free == free
    del small
    assert memory.free > free


def test_free_memory_is_bounded_and_returned_by_a_trim():
    memory = Blocks()
    views = [memory.memory(SIZE, b"") for _ in range(30)]
    del views
    assert SIZE <= memory.free <= blocks._MOST_FREE
    huge = memory.memory(blocks._MOST_FREE * 2, b"")
    del huge
    assert memory.free < blocks._MOST_FREE * 3
    memory.trim()
    assert memory.free == 0


@pytest.mark.parametrize("elements", [300_000, 900_000])
async def test_a_request_in_such_memory_is_answered_like_any_other(make, elements):
    """A large request that arrives as a `memoryview` instead of `bytes` is answered, and its memory is free
    afterwards."""
    parts = make(max_message=16 << 20)
    await parts.load("m", models.identity(shape=(None,)))
    memory = Blocks()
    values = np.random.default_rng(1).random(elements, np.float32)
    for _ in range(3):
        call = FakeCall(frame=placed(memory, framing.pack(request("m", x=values))))  # type: ignore[arg-type]
        parts.port.handle(call)
        (found,) = await outputs(call)
        assert (found == values).all()
        call.frame = None
        del call
    assert values.nbytes < memory.free <= 2 * values.nbytes + (1 << 20)


async def test_a_malformed_request_in_such_memory_is_refused(make):
    parts = make(max_message=16 << 20)
    await parts.load("m", models.identity(shape=(None,)))
    frame = framing.pack(request("m", x=np.zeros(SIZE // 4, np.float32)) + b"\x3a\xff")
    call = FakeCall(headers=[(b"mm-model-id", b"m")], frame=placed(Blocks(), frame))  # type: ignore[arg-type]
    parts.port.handle(call)
    assert "not a ModelInferRequest" in call.text
