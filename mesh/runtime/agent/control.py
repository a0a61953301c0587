"""The gRPC service that routers call on a pod, mesh.agent.v1.Agent. This module only translates between messages and
the agent's requests and answers."""

import time
from collections.abc import Iterable
from typing import Any

import grpc

from mesh.identity import Identity, rpc
from mesh.options.values import format_address, parse_address
from mesh.pb import agent_pb2 as pb
from mesh.pb import agent_pb2_grpc
from mesh.runtime.agent.standing import AgentStanding
from mesh.runtime.cache.assembly import Cache
from mesh.runtime.cache.books.activity import active
from mesh.runtime.cache.books.entries import CacheEntry, EntryState
from mesh.runtime.cache.loads import outcomes
from mesh.runtime.presence import verdicts
from mesh.schema.records import PodRecord
from mesh.statuses import Reason
from mesh.telemetry import logs
from placement.footprint import Footprint
from placement.replay import render

log = logs.get(__name__)

_CANNOT_LISTEN = (
    "cannot listen on {} (--control): check that this machine has the address, and that no other process uses the port"
)

_OPTIONS = (
    ("grpc.so_reuseport", 0),  # otherwise a second agent could silently share the port
    # Routers ping us while they wait for loads, every 10 s (`router.loads.agents`). By default a server takes three
    # pings without data in 5 minutes, then ends the connection, and all loads on it: "Too many pings".
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.max_send_message_length", 64 << 20),  # for a description of thousands of copies
)


class Control(agent_pb2_grpc.AgentServicer):  # type: ignore[misc]
    """The service and its server."""

    def __init__(self, standing: AgentStanding, cache: Cache, token: str, identity: Identity | None = None) -> None:
        """Makes the service. Callers must send `token` and, with an `identity`, use mutual TLS."""
        self._standing = standing
        self._cache = cache
        self._ledger = cache.ledger
        self._loads = cache.loads
        self._token = token
        self._identity = identity
        self._server: grpc.aio.Server | None = None

    async def start(self, address: str) -> str:
        """Listens and returns the address with the port in use. Raises OSError if that fails."""
        host, _ = parse_address(address)
        known = () if self._identity is None else (rpc.OnlyKnown(),)
        server = grpc.aio.server(options=_OPTIONS, interceptors=(*known, rpc.OnlyWithToken(self._token)))
        agent_pb2_grpc.add_AgentServicer_to_server(self, server)
        try:
            port = rpc.listen(server, address, self._identity)
        except RuntimeError as error:
            raise OSError(_CANNOT_LISTEN.format(address)) from error
        if not port:
            raise OSError(_CANNOT_LISTEN.format(address))
        await server.start()
        self._server = server
        return format_address(host, port)

    async def close(self, grace: float) -> None:
        """Stops listening; requests in flight get `grace` seconds to end."""
        if self._server is not None:
            await self._server.stop(grace)

    async def Load(self, request: pb.LoadRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.LoadReply:
        """Loads a model, and replies with the outcome: loaded, elsewhere, refused, failed or stale. Joins a load that
        is under way."""
        want = outcomes.Want(
            model_id=request.model_id,
            revision=request.create_revision,
            type=request.model_type,
            path=request.model_path,
            key=request.model_key,
            sha256=request.sha256,
            footprint=Footprint(request.host_bytes, request.device_bytes),
            idle_ms=request.idle_ms,
            expected_copies=request.expected_copies,
            reason=request.reason,
            pinned=request.pinned,
            generation=request.generation,
        )
        if not want.model_id or want.revision <= 0:
            lacks = "create revision above 0" if want.model_id else "model id"
            refused = pb.LoadReply.Refused(reason=Reason.BAD_REQUEST.name, text=f"the request names no {lacks}")
            return pb.LoadReply(refused=refused)
        return _reply(await self._loads.load(want), self._standing.incarnation)

    async def Unload(self, request: pb.UnloadRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.UnloadReply:
        """Withdraws a copy or a load. Replies once the copy answers no more calls, and says whether there was one."""
        why = request.reason or "requested by a router"
        had = await self._loads.withdraw(request.model_id, request.create_revision, why)
        return pb.UnloadReply(had_copy=had)

    async def Describe(
        self, request: pb.DescribeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.DescribeReply:
        """Replies with the pod's state, its copies and its latest decisions. A request can ask for one model, for the
        copies in use, or only for the latest questions about room."""
        pod, ledger = self._standing, self._ledger
        if request.questions:
            lines = [render(question, answer) for question, answer in self._cache.victims.questions]
            return pb.DescribeReply(pod=pod.name, incarnation=pod.incarnation, decisions=lines)
        entries: Iterable[CacheEntry] = list(ledger.entries.values())
        if request.model_id:
            entries = [entry for entry in entries if entry.model_id == request.model_id]
        elif request.active:
            asked = set(request.models)
            entries = [e for e in entries if not e.aside and (e.model_id in asked or active(ledger, e))]
        now_ns, used = time.monotonic_ns(), ledger.committed.positive
        account = self._cache.account
        books = account.statistics()
        return pb.DescribeReply(
            pod=pod.name,
            incarnation=pod.incarnation,
            state=pod.state,
            capacity_bytes=ledger.capacity.host_bytes,
            used_bytes=used.host_bytes,
            device_capacity_bytes=ledger.capacity.device_bytes,
            device_used_bytes=used.device_bytes,
            resident_bytes=pod.resident_bytes(),
            copies=[self._copy(entry, now_ns) for entry in entries],
            decisions=() if request.active else pod.decisions(request.model_id),
            counters=pod.counters(),
            observed_bytes=books.observed_bytes,
            accounted_bytes=books.accounted_bytes if account.foreign else 0,
            factor=books.factor if account.foreign else 0.0,
            observed=books.what,
            unobserved=books.unseen,
        )

    def _copy(self, entry: CacheEntry, now_ns: int) -> pb.CopyState:
        ledger, admission = self._ledger, self._cache.admission
        use, pull = ledger.use(entry), self._standing.progress(entry.model_id)
        waits = entry.state is EntryState.WAITING
        under_way = entry.usual_ms and (waits or entry.state is EntryState.LOADING)
        return pb.CopyState(
            model_id=entry.model_id,
            create_revision=entry.revision,
            state=entry.state.value,
            host_bytes=entry.footprint.host_bytes,
            device_bytes=entry.footprint.device_bytes,
            idle_ms=ledger.idle_ms(entry),
            calls=use.calls if use else 0,
            in_flight=use.in_flight if use else 0,
            busy_us=use.busy_ns // 1000 if use else 0,
            load_ms=entry.load_ms,
            age_ms=max(0, now_ns - entry.since_ns) // 1_000_000,
            pulled_bytes=pull.done_bytes if pull else 0,
            pull_bytes=(pull.total_bytes or 0) if pull else 0,
            pull_rate=int(pull.bytes_per_second) if pull else 0,
            rate=entry.rate,
            peak_rate=entry.peak_rate,
            queue_ms=entry.queue_ms,
            ahead=admission.ahead_of(entry) if waits else 0,
            expected_ms=admission.expected(entry).expected_ms if under_way else 0,
            pinned=entry.pinned,
            model_type=entry.model_type,
            reason=entry.reason,
            generation=entry.generation,
            digest=entry.digest,
        )


def _reply(outcome: outcomes.Outcome, incarnation: str) -> pb.LoadReply:
    match outcome:
        case outcomes.Loaded():
            return pb.LoadReply(
                loaded=pb.LoadReply.Loaded(
                    incarnation=incarnation,
                    host_bytes=outcome.footprint.host_bytes,
                    device_bytes=outcome.footprint.device_bytes,
                    load_ms=outcome.load_ms,
                    generation=outcome.generation,
                    digest=outcome.digest,
                    blamed=outcome.blamed,
                )
            )
        case verdicts.Elsewhere():
            return pb.LoadReply(elsewhere=pb.LoadReply.Elsewhere(pod=outcome.pod))
        case outcomes.Refused():
            return pb.LoadReply(refused=pb.LoadReply.Refused(reason=outcome.reason.name, text=outcome.text))
        case outcomes.Failed():
            failed = pb.LoadReply.Failed(reason=outcome.reason.name, text=outcome.text)
            failed.kind, failed.asked_ms = outcome.kind.value, outcome.asked_ms
            return pb.LoadReply(failed=failed)
        case verdicts.Stale():
            return pb.LoadReply(stale=pb.LoadReply.Stale())


async def is_alive(record: PodRecord, identity: Identity | None = None, *, timeout: float = 2.0) -> bool | None:
    """Returns True if the agent at the record's address answers with the record's incarnation, False if another agent
    or no process answers there, and None if that is unknown after `timeout` seconds."""
    channel = rpc.channel(record.control_address, (("grpc.enable_http_proxy", 0),), identity)
    try:
        stub = agent_pb2_grpc.AgentStub(channel)
        shown = rpc.shown(record.token)
        reply = await stub.Describe(pb.DescribeRequest(model_id="\0"), timeout=timeout, metadata=shown)
        return bool(reply.incarnation == record.incarnation)
    except grpc.aio.AioRpcError as error:
        text = (error.details() or "").lower()
        # A server without this method, or with another token, is not this pod's agent.
        other = error.code() is grpc.StatusCode.UNIMPLEMENTED or text == rpc.OTHER_TOKEN
        return False if other or "connection refused" in text else None
    finally:
        await channel.close(None)
