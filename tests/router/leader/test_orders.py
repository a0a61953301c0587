"""A leader's requests to agents, and how their answers change the leader's view."""

import pytest

from mesh.schema.records import ModelRecord
from placement.debits import Debits
from placement.limits import TypeLimits
from router.leader.orders import Orders
from router.loads.agents import Unreachable
from router.state.registry import Registration
from tests.support import fakecalls
from tests.support.fakecalls import FakeAgents
from tests.support.worlds import World

REGISTRATION = Registration("m", ModelRecord("onnx", "file:///m", host_bytes=50), 7, 7)


@pytest.fixture
def world():
    made = World()
    made.pod("a")
    return made


def orders(world, agents):
    return Orders(view=world.view, agents=agents, limits=TypeLimits, debits=Debits())


async def test_what_an_agent_answers_is_known_before_etcd_tells_it(world):
    """The view has the copy before etcd reports it, with its generation, its digest, and the mark that servers died in
    the model's calls."""
    agents = FakeAgents()
    reply = fakecalls.loaded("i")
    reply.loaded.generation, reply.loaded.digest, reply.loaded.blamed = 2, "d", True
    agents.answers["a"] = reply
    answer = await orders(world, agents).load(
        REGISTRATION, world.view.pods["a"], idle_ms=5, reason="because", expected_copies=1
    )
    assert answer is reply
    (copy,) = world.view.copies["m"]
    assert (copy.token, copy.record.digest, copy.record.blamed, copy.answered) == (b"i.7.2", "d", True, True)


async def test_a_refusal_changes_nothing_in_view(world):
    """The caller gets a refusal as the agent's answer, but an error if the agent cannot be reached."""
    agents = FakeAgents()
    agents.answers["a"] = fakecalls.refused("NO_ROOM", "full")
    asked = orders(world, agents)
    pod = world.view.pods["a"]
    reply = await asked.load(REGISTRATION, pod, idle_ms=5, reason="because", expected_copies=0)
    assert reply.refused.text == "full"
    assert "m" not in world.view.copies
    agents.answers["a"] = fakecalls.unreachable()
    with pytest.raises(Unreachable):
        await asked.load(REGISTRATION, pod, idle_ms=5, reason="because", expected_copies=0)
