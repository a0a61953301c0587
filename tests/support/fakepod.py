"""A runtime pod in the test's process: presence, claims and data port are real, but a model is only a string.

It publishes itself in a real etcd under a real lease, claims models as agents must, and answers `mesh.agent.v1.Agent`
over gRPC and V2 over HTTP/1.1. Each answer names the pod, the model and the registration, so a test sees which pod
answered for which registration.
"""

import asyncio
from collections.abc import Awaitable, Callable

import grpc

from mesh.etcd import Etcd, Lease, absent_prefix, created, delete_op, get_op, get_range_op, modified, put_op
from mesh.etcd.ranges import after_prefix
from mesh.pb import agent_pb2, agent_pb2_grpc, inference_pb2
from mesh.schema.keys import Keys
from mesh.schema.records import LOADED, LOADING, READY, CopyRecord, PodRecord
from mesh.statuses import Code
from mesh.wire import framing, metadata
from mesh.wire.call import Call
from mesh.wire.server import Server

INFER = b"/inference.GRPCInferenceService/ModelInfer"


class FakePod(agent_pb2_grpc.AgentServicer):
    """A fake pod: `async with FakePod("a", etcd, keys) as pod`.

    `on_load`, if set, is awaited before each load and may raise. `on_call`, if set, gets each call that reaches a
    model, and answers it in place of the pod. `loads`, `unloads` and `calls` record what has happened.
    """

    def __init__(self, name: str, etcd: Etcd, keys: Keys, *, incarnation: str = "i1", capacity: int = 1 << 30) -> None:
        self.name = name
        self.etcd = etcd
        self.keys = keys
        self.incarnation = incarnation
        self.capacity = capacity
        self.models: dict[str, int] = {}  # create revisions of the registrations that the data port serves, by model
        self.loads: list[agent_pb2.LoadRequest] = []
        self.unloads: list[str] = []
        self.calls: list[bytes] = []  # ids
        self.on_load: Callable[[agent_pb2.LoadRequest], Awaitable[None]] | None = None
        self.on_call: Callable[[Call], None] | None = None
        self.lease: Lease | None = None
        self._loading: dict[str, asyncio.Task[agent_pb2.LoadReply]] = {}
        self._server = Server(self._call)
        self._agent = grpc.aio.server()
        agent_pb2_grpc.add_AgentServicer_to_server(self, self._agent)
        self.data = self.control = ""

    async def __aenter__(self) -> "FakePod":
        self.data = f"127.0.0.1:{await self._server.listen_tcp('127.0.0.1', 0)}"
        self.control = f"127.0.0.1:{self._agent.add_insecure_port('127.0.0.1:0')}"
        await self._agent.start()
        await self.publish()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.die()
        if self.lease is not None:
            await self.lease.revoke()

    # --- presence ---

    async def publish(self, state: str = READY) -> None:
        """Publishes the pod and all its copies, under a new lease if the pod has none."""
        if self.lease is None:
            self.lease = await Lease.grant(self.etcd, ttl=10)
        record = PodRecord(
            self.incarnation,
            self.data,
            self.control,
            state,
            capacity_bytes=self.capacity,
            copies=len(self.models),
            used_bytes=1000 * len(self.models),
        )
        await self.etcd.put(self.keys.pod(self.name), record.encode(), lease=self.lease.id)
        for model, revision in self.models.items():
            await self.put_copy(model, revision, LOADED)

    async def put_copy(self, model: str, revision: int, state: str) -> None:
        """Writes the key of a copy, even if the pod does not have the copy."""
        assert self.lease is not None
        record = CopyRecord(self.incarnation, revision, state, host_bytes=1000)
        await self.etcd.put(self.keys.copy(model, self.name), record.encode(), lease=self.lease.id)

    async def lose_lease(self) -> None:
        """Revokes the lease, as if it had expired: etcd deletes all keys of the pod at once, but the pod keeps
        running."""
        assert self.lease is not None
        lease, self.lease = self.lease, None
        await lease.revoke()

    async def die(self) -> None:
        """Closes the ports at once. The lease stays alive."""
        await self._agent.stop(0)
        await self._server.close(0)

    # --- the agent ---

    async def Load(self, request: agent_pb2.LoadRequest, context: object) -> agent_pb2.LoadReply:
        """Claims, loads and publishes a model, or joins its load under way."""
        task = self._loading.get(request.model_id)
        if task is None:
            self.loads.append(request)
            task = asyncio.create_task(self._load(request))
            self._loading[request.model_id] = task
            task.add_done_callback(lambda _: self._loading.pop(request.model_id, None))
        return await asyncio.shield(task)

    async def _load(self, request: agent_pb2.LoadRequest) -> agent_pb2.LoadReply:
        model, revision = request.model_id, request.create_revision
        if self.models.get(model) == revision:
            return agent_pb2.LoadReply(loaded=agent_pb2.LoadReply.Loaded(incarnation=self.incarnation))
        assert self.lease is not None
        claim = CopyRecord(self.incarnation, revision, LOADING)
        key, copies, record = self.keys.copy(model, self.name), self.keys.copies(model), self.keys.model(model)
        result = await self.etcd.txn(
            [absent_prefix(copies), created(record, "==", revision)],
            [put_op(key, claim.encode(), lease=self.lease.id)],
            [get_op(record), get_range_op(copies, after_prefix(copies))],
        )
        if not result.succeeded:
            found, claims = result.responses
            assert isinstance(found, tuple)
            assert isinstance(claims, tuple)
            if not found or found[0].create_revision != revision:
                return agent_pb2.LoadReply(stale=agent_pb2.LoadReply.Stale())
            pod = self.keys.copy_of(claims[0].key)[1]
            return agent_pb2.LoadReply(elsewhere=agent_pb2.LoadReply.Elsewhere(pod=pod))
        try:
            if self.on_load is not None:
                await self.on_load(request)
        except Refuses as refusal:
            await self.etcd.txn([], [delete_op(key)])
            return refusal.reply
        self.models[model] = revision
        await self.put_copy(model, revision, LOADED)
        loaded = agent_pb2.LoadReply.Loaded(incarnation=self.incarnation, host_bytes=1000, load_ms=1)
        return agent_pb2.LoadReply(loaded=loaded)

    async def Unload(self, request: agent_pb2.UnloadRequest, context: object) -> agent_pb2.UnloadReply:
        self.unloads.append(request.model_id)
        had = self.models.pop(request.model_id, None) is not None
        await self.etcd.delete(self.keys.copy(request.model_id, self.name))
        return agent_pb2.UnloadReply(had_copy=had)

    async def Describe(self, request: agent_pb2.DescribeRequest, context: object) -> agent_pb2.DescribeReply:
        reply = agent_pb2.DescribeReply(
            pod=self.name, incarnation=self.incarnation, state="ready", capacity_bytes=self.capacity
        )
        for model, revision in self.models.items():
            if request.model_id in ("", model):
                reply.copies.add(model_id=model, create_revision=revision, state="loaded", host_bytes=1000)
        return reply

    async def evict(self, model: str) -> None:
        """Evicts a copy: first from the data port, then its key from etcd."""
        revision = self.models.pop(model)
        found = await self.etcd.get(self.keys.copy(model, self.name))
        if found is not None:
            await self.etcd.txn(
                [modified(found.key, found.mod_revision)], [delete_op(self.keys.copy(model, self.name))]
            )
        assert revision

    # --- the data port ---

    def _call(self, call: Call) -> None:
        model = metadata.decode_bin(call.header(b"mm-model-id-bin") or b"").decode()
        revision = self.models.get(model)
        if call.header(b"mesh-copy") != b"%b.%d" % (self.incarnation.encode(), revision or 0):
            call.fail(Code.UNAVAILABLE, "not here", headers=[(b"mesh-not-here", b"1")])
            return
        self.calls.append(model.encode())
        if self.on_call is not None:
            self.on_call(call)
            return
        message = inference_pb2.ModelInferResponse(model_name=model, id=f"{self.name} {revision}")
        call.reply(framing.pack(message.SerializeToString()), headers=[(b"mesh-load", b"0")])


class Refuses(Exception):
    """An error for `on_load` to raise. The load ends with the given reply, and the claim is withdrawn."""

    def __init__(self, reply: agent_pb2.LoadReply) -> None:
        super().__init__(reply)
        self.reply = reply


def request(model_id: str) -> bytes:
    return framing.pack(inference_pb2.ModelInferRequest(model_name=model_id).SerializeToString())


def answer(frame: bytes | None) -> tuple[str, str]:
    """Returns the pod and the registration's revision that a reply names."""
    assert frame is not None
    pod, revision = inference_pb2.ModelInferResponse.FromString(frame[framing.PREFIX :]).id.split()
    return pod, revision
