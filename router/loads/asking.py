"""Load requests to agents. A pod is debited with the estimate until its own figures contain the load."""

from collections.abc import Callable, Hashable
from typing import cast

from mesh.pb import agent_pb2
from mesh.schema import records, versions
from placement.debits import Debits
from placement.footprint import Footprint
from router.loads.agents import Agent
from router.state.pods import News, Pod
from router.state.registry import Registration
from router.state.view import View


def settle(view: View, debits: Debits, now_ms: Callable[[], int]) -> None:
    """Listens to `view` from now on, and ends each debit that `load` makes once its pod publishes figures that contain
    the load, or disappears."""

    def on_pod(name: str, news: News) -> None:
        if news is News.PUBLISHED:
            # A pod's figures are written with its copies or after them, so they contain all copies in the mirror.
            copies = view.pods[name].copies

            def shown(debit: Hashable) -> bool:
                model_id, _, created = cast(tuple[str, str, int], debit)
                copy = copies.get(model_id)
                if copy is None or copy.record.create_revision != created:
                    return False
                return copy.loaded and not copy.answered

            debits.published(name, now_ms(), shown=shown)
        elif news is News.GONE:
            debits.forget(name)

    view.listen(on_pod)


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
    """Asks an agent for a load and returns its answer. Debits the pod with the estimate `footprint`. If the load fails,
    the debit ends; otherwise the measured bytes stay debited until the pod's figures contain them. `timeout` is in
    seconds. Raises the errors of `agents`."""
    debit = (request.model_id, pod.name, request.create_revision)
    taken = footprint.on(device=pod.record is not None and pod.record.device_capacity_bytes > 0)
    debits.sent(pod.name, taken.host_bytes, now_ms(), debit, device_bytes=taken.device_bytes)
    measured = None
    try:
        reply = await agents.load(pod, request, timeout=timeout)
        if reply.WhichOneof("outcome") == "loaded":
            measured = Footprint(reply.loaded.host_bytes, reply.loaded.device_bytes)
        return reply
    finally:
        debits.done(debit, loaded=measured is not None, measured=measured)


def copy_of(registration: Registration, loaded: agent_pb2.LoadReply.Loaded) -> records.CopyRecord:
    """Returns the copy that an agent reports, as the record that the agent writes to etcd."""
    return records.CopyRecord(
        loaded.incarnation,
        registration.created,
        records.LOADED,
        loaded.host_bytes,
        loaded.device_bytes,
        generation=loaded.generation,
        digest=loaded.digest,
        blamed=loaded.blamed,
        version=versions.own(registration.record.path),
    )
