"""The state of a pod, for the pod's record, the probes, routers and operators."""

import time
from collections.abc import Iterable

from mesh.envoy.egress import ADMIN
from mesh.etcd import Patience
from mesh.host import processes
from mesh.runtime.agent.settings import RuntimeSettings
from mesh.runtime.blame.history import History
from mesh.runtime.cache.assembly import Cache
from mesh.runtime.cache.books.meters import calls_snapshot
from mesh.runtime.cache.books.rate import Rate
from mesh.runtime.cache.disk.optimising import Optimising
from mesh.runtime.presence import figures
from mesh.runtime.presence.ondisk import OnDisk
from mesh.runtime.presence.publishing import Presence
from mesh.runtime.servers.relief import Relief
from mesh.runtime.servers.serverprocess import ServerProcess
from mesh.runtime.sharedmemory.board import Board
from mesh.schema.records import READY, PodRecord
from mesh.telemetry import metrics
from puller.progress import Progress
from puller.puller import Puller

STARTING, SERVER_DOWN = "starting", "server-down"

_STEPS = 50  # steps of the capacity in which observed memory is published: small changes publish nothing
_DEAD = 180.0  # seconds of fruitless starts of a model server after which the pod is not live


class AgentStanding:
    """The state of one pod. The agent sets its phase; everything else is read from the agent's parts."""

    def __init__(
        self,
        settings: RuntimeSettings,
        cache: Cache,
        server: ServerProcess,
        board: Board,
        presence: Presence,
        puller: Puller,
        optimising: Optimising,
        history: History,
        relief: Relief,
        patience: Patience,
        *,
        incarnation: str,
        token: str,
    ) -> None:
        """Makes the state of a pod that is starting. Callers of its agent must send `token`. `patience` has the reason
        if the pod's start waits for etcd."""
        self.name = settings.name
        self.incarnation = incarnation
        self.phase = STARTING  # starting, ready or leaving, independent of the model server
        self.known = False  # known to the mesh, as it has been published
        self.addresses = ("", "", "")  # data, control, probe, as published
        self.labels = settings.labels
        self.rate = Rate(self.calls)
        self._settings = settings
        self._cache = cache
        self._server = server
        self._board = board
        self._presence = presence
        self._puller = puller
        self._optimising = optimising
        self._history = history
        self._relief = relief
        self._patience = patience
        self._token = token
        self._began = time.monotonic()
        self._on_disk = OnDisk(puller.remembered)
        puller.listen(self._on_disk.changed)

    @property
    def state(self) -> str:
        """The state: starting, ready, leaving, or server-down for a ready pod without a ready model server."""
        return SERVER_DOWN if self.phase == READY and not self._server.serves else self.phase

    # --- for the mesh

    def record(self) -> PodRecord:
        """Returns the record of the pod in its present state."""
        ledger = self._cache.ledger
        statistics, first = ledger.statistics(), ledger.first()
        used, account = ledger.committed.positive, self._cache.account
        books = account.statistics()
        step = max(1, ledger.capacity.host_bytes // _STEPS)
        data, control_address, probe = self.addresses
        return PodRecord(
            incarnation=self.incarnation,
            data_address=data,
            control_address=control_address,
            state=self.state,
            labels=self.labels,
            zone=self._settings.zone,
            capacity_bytes=ledger.capacity.host_bytes,
            used_bytes=used.host_bytes,
            device_capacity_bytes=ledger.capacity.device_bytes,
            device_used_bytes=used.device_bytes,
            oldest_idle_ms=0 if first is None else ledger.idle_ms(first),
            oldest_unused=first is not None and not ledger.used(first),
            copies=statistics.copies,
            loads_in_progress=statistics.loading,
            loading_threads=self._cache.admission.concurrency,
            rate=self.rate.per_minute,
            probe_address=probe,
            age_ms=figures.coarse_age_ms(time.monotonic() - self._began),
            disk=self._on_disk.text,
            secrets=self._puller.secrets,
            token=self._token,
            types=self._settings.types,
            observed_bytes=books.observed_bytes // step * step,
            factor=round(books.factor, 1) if account.foreign else 0.0,
            unobserved=books.unseen,
        )

    # --- for the probes

    def why_not_ready(self) -> str | None:
        """Returns the reason why the pod is not ready, or None if it is ready. A pod that is cut off from etcd stays
        ready, because it still serves its models."""
        state = self.state
        if state == READY:
            if (trouble := self._server.trouble) is not None:
                return trouble
            return None if self.known else self._patience.why or "the pod is being published in etcd"
        if state == SERVER_DOWN:
            return f"{self._server.why_down}; this pod waits for it to start again"
        return self._patience.why or f"the pod is {state}"

    def why_not_live(self) -> str | None:
        """Returns the reason why Kubernetes should restart the container, or None. The reason is that no model server
        could be started for minutes. A slow first start, or the absence of etcd, is no reason."""
        if self._server.down_for > _DEAD:
            return f"no model server has started for {self._server.down_for:.0f} s: {self._server.why_down}"
        return None

    def metrics(self) -> bytes:
        """Returns the metrics of the agent and its model server (or its relay and the relay's Envoy), in Prometheus'
        format."""
        snapshots = [self._cache.meters.registry.snapshot(), calls_snapshot(self._board.calls())]
        if pid := self._server.pid:
            foreign = self._settings.foreign
            snapshots.append(metrics.process_snapshot("relay" if foreign else "model-server", pid))
            if foreign and (egress := processes.behind_socket(str(self._server.plan.run_dir / ADMIN))):
                snapshots.append(metrics.process_snapshot("egress", egress))
        return metrics.render(metrics.merge(snapshots))

    # --- for routers and operators

    def resident_bytes(self) -> int:
        """Returns the private memory of the model server, or of the relay to a foreign one, in bytes."""
        return self._server.resident_bytes

    def calls(self) -> int:
        """Returns the number of calls that the model server has answered so far."""
        return sum(sum(series.buckets) for series in self._board.calls())

    def progress(self, model_id: str) -> Progress | None:
        """Returns the progress of the pull of a model's files, or None if none is under way."""
        return self._puller.progress(model_id)

    def decisions(self, model_id: str) -> Iterable[str]:
        """Returns the latest decisions as JSON, one text for each: about a model, or about all models for the id ""."""
        return self._cache.decisions.lines(model_id)

    def counters(self) -> dict[str, int]:
        """Returns counts of what has happened since the start, and of what is in progress, for operators and tests."""
        cache, presence = self._cache, self._presence.statistics()
        loads, pulls = cache.loads.statistics(), self._puller.statistics()
        optimised, records = self._optimising.statistics(), self._history.statistics()
        return {
            "loads": loads.loads,
            "load_failures": loads.failures,
            "load_refusals": loads.refusals,
            "loads_in_progress": loads.in_progress,
            "loads_waiting_for_room": cache.rooms.statistics().waiting,
            "unloads_in_progress": cache.ledger.statistics().unloading,
            "evictions": int(cache.meters.evictions.value),
            "calls": self.calls(),
            "calls_in_flight": self._board.in_flight,
            "server_lives": self._server.lives,
            "server_replacements": self._relief.count,
            "leases": presence.leases,
            "keys_behind": presence.behind,
            "key_writes": presence.writes,
            "records_pending": records.pending,
            "records_written": records.written,
            "records_given_up": records.given_up,
            "pulls": pulls.pulls,
            "pulls_cancelled": pulls.cancelled,
            "pulled_bytes": pulls.bytes,
            "fetched_files": pulls.fetched_files,
            "fetched_bytes": pulls.fetched_bytes,
            "store_connections": pulls.limits.connections,
            "store_connections_waited_for": pulls.limits.waiting,
            "disk_files": pulls.cache.blobs,
            "disk_files_unsafe": pulls.cache.unsafe,
            "disk_leftovers": pulls.leftovers,
            "optimised": optimised.made,
            "optimised_in_vain": optimised.in_vain,
            "optimising_waiting": optimised.waiting,
        }
