"""One real pod: etcd, agent and model server as processes."""

from tests.support import models
from tests.support.agent import AgentProcess


async def test_a_model_is_loaded_called_and_unloaded(pod: AgentProcess) -> None:
    """The whole way of a copy: its key, its answers, its leaving nothing behind."""
    created = await pod.loaded("a/b c", models.constant(7.0))
    answer = await pod.infer("a/b c", created)
    assert answer.value == 7.0
