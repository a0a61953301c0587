"""Reading of large binary tensors straight into the message, which must be the same as a copied one."""

import asyncio
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.pb import inference_pb2 as pb
from mesh.wire import framing, plainconnection, plainserver
from mesh.wire.budget import Budget
from router.inference.models import Models
from router.rest.conversions import Conversions
from router.rest.inference import Inference
from router.rest.plain import PlainInference
from tests.support.wire import Transport, run

LIMIT = 1 << 20
SIZE = 200_000  # bytes, above `largebody.LEAST`
REPLY = framing.pack(pb.ModelInferResponse(model_name="m").SerializeToString())


class Carrier:
    """One connection to the inference over REST, and the frames that reach the models."""

    def __init__(self):
        self.frames = []
        self.longer = 0  # requests that became messages by copying
        self.budget = Budget(64 << 20)
        models = Models(self._dispatch, max_message=LIMIT)
        inference = Inference(models, Conversions(max_message=LIMIT), max_message=LIMIT)
        quick = inference.quick

        def counted(*args):
            self.longer += 1
            return quick(*args)

        inference.quick = counted
        handler = PlainInference(models, inference, self.budget)
        serving = plainserver.PlainServer(
            handler.serve, handler.refusal, max_message=LIMIT, budget=self.budget, min_rate=0, opening=handler.opening
        )
        self.connection = plainconnection.PlainConnection(serving, asyncio.get_running_loop())
        self.transport = Transport()
        self.connection.connection_made(self.transport)

    def _dispatch(self, call):
        self.frames.append(call.frame)
        call.reply(REPLY)

    def send(self, data, cuts=()):
        """Delivers a request in reads that end at the cuts, and returns the status of the answer."""
        before = len(self.transport.written)
        for start, end in zip((0, *cuts), (*cuts, len(data)), strict=True):
            self.deliver(data[start:end])
        return int(bytes(self.transport.written[before:]).split()[1])

    def deliver(self, data):
        """Delivers one read to the protocol that is reading at that moment."""
        while data:
            protocol = self.transport.protocol or self.connection
            if isinstance(protocol, asyncio.BufferedProtocol):
                space = protocol.get_buffer(-1)
                count = min(len(space), len(data))
                space[:count] = data[:count]
                protocol.buffer_updated(count)
                data = data[count:]
            else:
                protocol.data_received(data)
                data = b""


def request(raws, *, size=None, announced=None):
    """Returns a request with these raw contents, and the lengths of its head and of its JSON."""
    inputs = [
        {
            "name": f"x{number}",
            "datatype": "UINT8",
            "shape": [len(raw) if size is None else size],
            "parameters": {"binary_data_size": len(raw) if size is None else size},
        }
        for number, raw in enumerate(raws)
    ]
    text = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    body = text + b"".join(raws)
    head = (
        b"POST /v2/models/m/infer HTTP/1.1\r\nhost: a\r\ninference-header-content-length: %d\r\n"
        b"content-length: %d\r\n\r\n" % (len(text) if announced is None else announced, len(body))
    )
    return head + body, len(head), len(text)


def raws_of(frame):
    """Returns the raw contents of a framed request."""
    return list(pb.ModelInferRequest.FromString(framing.unpack(frame, limit=LIMIT)).raw_input_contents)


def contents(seed, size=SIZE):
    return bytes((seed + place) % 251 for place in range(997)) * (size // 997 + 2)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, SIZE), max_size=5), st.integers(0, 3))
def test_however_a_body_comes_the_message_is_the_same(cuts, after):
    """Wherever reads end, the message for a body with a known JSON part contains the tensor that was sent."""

    async def scenario():
        carrier = Carrier()
        for seed in range(2):
            raw = contents(seed)[:SIZE]
            data, head, text = request([raw])
            places = sorted({head, head + text + after, *(head + cut for cut in cuts)})
            assert carrier.send(data, places if seed else ()) == 200
            assert raws_of(carrier.frames[seed]) == [raw]
        assert len(carrier.frames[0]) == len(carrier.frames[1])
        assert carrier.budget.held == 0

    run(scenario())


@pytest.mark.parametrize("first", [0, 1, 70_000])
def test_a_large_tensor_is_read_into_its_message(first):
    """If the JSON part is known, the memory into which the tensor was read becomes the message, and nothing is
    copied."""

    async def scenario():
        carrier = Carrier()
        carrier.send(request([contents(0)[:SIZE]])[0])
        converted = carrier.longer
        raw = contents(1)[:SIZE]
        data, head, text = request([raw])
        place = head + text + first
        carrier.deliver(data[:head])
        carrier.deliver(data[head:place])
        memory = carrier.transport.protocol._memory
        carrier.deliver(data[place:])
        assert carrier.frames[1] is memory
        assert raws_of(memory) == [raw]
        assert carrier.longer == converted
        assert carrier.budget.held == 0

    run(scenario())


def test_bodies_that_cannot_be_read_into_their_message_are_copied():
    """The message is made by a copy if the body has two tensors or another JSON part, or if its first read is
    incomplete."""

    async def scenario():
        carrier = Carrier()
        carrier.send(request([contents(0)[:SIZE]])[0])
        two = [contents(1)[:SIZE], contents(2)[:100_000]]
        for _ in range(2):
            data, head, _ = request(two)
            carrier.send(data, [head, head + 500])
            assert raws_of(carrier.frames[-1]) == two
        data, head, _ = request([contents(3)[:SIZE]])
        carrier.send(data, [head, head + 5])
        assert raws_of(carrier.frames[-1]) == [contents(3)[:SIZE]]
        other = contents(4)[: SIZE + 1]
        data, head, text = request([other])
        carrier.send(data, [head, head + text])
        assert raws_of(carrier.frames[-1]) == [other]
        assert carrier.longer == 5

    run(scenario())


@pytest.mark.parametrize(
    "made",
    [
        lambda raw: request([raw + b"x"], size=len(raw)),
        lambda raw: request([raw[:-1]], size=len(raw)),
        lambda raw: request([raw], announced=len(request([raw])[0]) - request([raw])[1] - len(raw) + 1),
    ],
)
def test_a_body_with_a_known_json_and_another_size_is_refused(made):
    async def scenario():
        carrier = Carrier()
        raw = contents(0)[:SIZE]
        assert carrier.send(request([raw])[0]) == 200
        data, head, text = made(raw)
        assert carrier.send(data, [head, head + text]) == 400
        assert len(carrier.frames) == 1
        assert carrier.budget.held == 0

    run(scenario())
