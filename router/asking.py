"""One load asked of one agent, with what it will take there debited from the moment it is sent."""

from collections.abc import Callable

from mesh.pb import agent_pb2
from placement.debits import Debits
from placement.footprint import Footprint
from router.agents import Agent
from router.view import Pod


async def load(
    pod: Pod,
    request: agent_pb2.LoadRequest,
    *,
    agents: Agent,
    debits: Debits,
    footprint: Footprint,
    now_ms: Callable[[], int],
    timeout: float,
) -> agent_pb2.LoadReply:
    """The agent's answer. `footprint` is what the load is reckoned with until it has been measured, `timeout` seconds.
    Raises what `agents` raise; whatever happens, the debit is settled."""
    debit = (request.model_id, pod.name)
    reckoned = footprint.on(device=pod.record is not None and pod.record.device_capacity_bytes > 0)
    debits.sent(pod.name, reckoned.host_bytes, now_ms(), debit, device_bytes=reckoned.device_bytes)
    measured = None
    try:
        reply = await agents.load(pod, request, timeout=timeout)
        if reply.WhichOneof("outcome") == "loaded":
            measured = Footprint(reply.loaded.host_bytes, reply.loaded.device_bytes)
        return reply
    finally:
        debits.done(debit, loaded=measured is not None, measured=measured)
