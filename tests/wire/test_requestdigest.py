"""A request's digest, which depends on neither the request's id nor its model's name, and can be computed from what a
dead server leaves in shared memory."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.pb import inference_pb2 as pb
from mesh.wire import framing, requestdigest


def frame(
    values: bytes, *, name: str = "m", version: str = "", id: str = "", typed: bool = False, inputs: int = 1
) -> bytes:
    request = pb.ModelInferRequest(model_name=name, model_version=version, id=id)
    for number in range(inputs):
        request.inputs.add(name=f"x{number}", datatype="UINT8", shape=[len(values)])
        if typed:
            request.inputs[number].contents.bytes_contents.append(values)
        else:
            request.raw_input_contents.append(values)
    return framing.pack(request.SerializeToString())


@pytest.mark.parametrize("size", [0, 10, 1000, 32_700, 40_000, 100_000])
@pytest.mark.parametrize("typed", [True, False])
def test_neither_id_nor_name_change_it(size, typed):
    """A request's digest does not depend on its id or on the name of the model, however long these and the request
    are."""
    expected = requestdigest.digest(frame(bytes(size), typed=typed))
    for name, version, id in (("m", "", "1"), ("alias", "8", ""), ("another", "", "i" * 5000)):
        again = frame(bytes(size), name=name, version=version, id=id, typed=typed)
        assert requestdigest.digest(again) == expected
    assert len(expected) == requestdigest.SIZE


@pytest.mark.parametrize("size", [1, 1000, 100_000])
def test_contents_shape_and_length_change_it(size):
    """Contents, shape, length and the form of the contents change a request's digest."""
    found = {
        requestdigest.digest(frame(bytes(size))),
        requestdigest.digest(frame(b"\1" + bytes(size - 1))),
        requestdigest.digest(frame(bytes(size + 1))),
        requestdigest.digest(frame(bytes(size), inputs=2)),
        requestdigest.digest(frame(bytes(size), typed=True)),
    }
    assert len(found) == 5


@pytest.mark.parametrize("size", [0, 1000, 65_400, 65_536, 70_000, 1_000_000])
def test_the_beginning_of_a_frame_and_its_length_are_enough(size):
    """A request's digest can be computed from the beginning of the request's frame and the frame's length, which a dead
    server leaves in shared memory."""
    whole = frame(bytes(range(256)) * (size // 256), id="7")
    assert requestdigest.digest(whole[: requestdigest.KEPT], len(whole)) == requestdigest.digest(whole)


@given(st.binary(max_size=200))
def test_anything_has_one(data):
    """Invalid and compressed messages have a digest too, which is computed from their raw bytes."""
    assert len(requestdigest.digest(data)) == requestdigest.SIZE
    packed = b"\1" + len(data).to_bytes(4, "big") + data
    assert requestdigest.digest(packed) != requestdigest.digest(packed + b"\0")


def test_a_message_of_many_fields_has_its_own_digest():
    """The digest covers the bytes after the first thousand fields without parsing them."""
    fields = framing.pack(b"\x50\x01" * 30_000)
    assert requestdigest.digest(fields) != requestdigest.digest(framing.pack(b"\x50\x01" * 30_001))
