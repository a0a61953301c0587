"""The agent's metrics. A metric that ModelMesh has too has the same name.

`modelmesh_invoke_model_milliseconds` is the model server's own count, taken from the use board, because no call goes
through the agent.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any

from mesh import process
from mesh.runtime.cache.books.account import AccountStatistics
from mesh.runtime.cache.books.ledger import Ledger
from mesh.runtime.sharedmemory.board import Series
from mesh.statuses import Code
from mesh.telemetry import metrics
from placement.queue import QueueStatistics
from placement.sizes import SizesStatistics
from puller.puller import PullerStatistics


class Meters:
    """The metrics of one agent. Other parts have references to the metrics that they change."""

    def __init__(self) -> None:
        self.registry = registry = metrics.Registry("agent")
        ms, sizes = metrics.BUCKETS_MS, metrics.BUCKETS_SIZE
        self.load_ms = registry.histogram(
            "modelmesh_loadmodel_milliseconds", "Time of loadModel in the model server, successes only.", ms
        ).labels()
        self.load_failures = registry.counter("modelmesh_loadmodel_failure", "Loads that failed.").labels()
        self.queue_ms = registry.histogram(
            "modelmesh_loading_queue_delay_milliseconds", "Time that loads waited for space and for their turn.", ms
        ).labels()
        self.model_bytes = registry.histogram(
            "modelmesh_loaded_model_size_bytes", "Measured size of loaded models.", sizes
        ).labels()
        self.unload_ms = registry.histogram(
            "modelmesh_unloadmodel_milliseconds", "Time of unloading, calls in flight included.", ms
        ).labels()
        self.unload_failures = registry.counter(
            "modelmesh_unloadmodel_failure", "Copies that could not be unloaded at once."
        ).labels()
        self.unload_attempt_failures = registry.counter(
            "modelmesh_unloadmodel_attempt_failure", "Failed attempts to unload."
        ).labels()
        self.age_at_eviction = registry.histogram(
            "modelmesh_age_at_eviction_milliseconds", "Idle time of evicted copies.", metrics.BUCKETS_AGE_MS
        ).labels()
        self.pull_ms = registry.histogram("mesh_pull_milliseconds", "Time of fetching a model's files.", ms).labels()
        self.cold_ms = registry.histogram(
            "mesh_load_milliseconds", "Time of a load from request to answer, successes only.", ms
        ).labels()
        self.evictions = registry.counter(
            "mesh_evictions",
            "Copies evicted: to make room for others, or because the model server took more memory than it may.",
        ).labels()
        self._refusals = registry.counter("mesh_load_refusals", "Loads refused, by reason.", ("reason",))
        self.server_deaths = registry.counter("mesh_server_deaths", "Deaths of the model server.").labels()
        hung = registry.counter("mesh_hung_processes", process.HUNG_HELP, ("process",))
        self.server_hangs = hung.labels("model-server")

    def follow_loads(self, queued: Callable[[], QueueStatistics], sizes: Callable[[], SizesStatistics]) -> None:
        """Adds the metrics of waiting loads and predicted sizes."""
        gauge, counter = self.registry.gauge, self.registry.counter
        gauge("mesh_loads_queued", "Loads that wait for the model server.").follow(lambda: queued().queued)
        counter("mesh_size_predictions", "Sizes predicted and then measured.").follow(lambda: sizes().predictions)
        counter("mesh_size_predicted_over", "Predictions more than 10 % too large.").follow(lambda: sizes().over)
        counter("mesh_size_predicted_under", "Predictions more than 10 % too small.").follow(lambda: sizes().under)

    def follow_account(self, account: Callable[[], AccountStatistics]) -> None:
        """Adds the metrics of a foreign server's memory."""
        gauge = self.registry.gauge
        gauge(
            "mesh_server_observed_bytes", "Host memory used by the models of a foreign server, observed from outside."
        ).follow(lambda: account().observed_bytes)
        gauge(
            "mesh_server_accounted_bytes",
            "Host memory of the models of a foreign server by the pod's books, without the factor.",
        ).follow(lambda: account().accounted_bytes)
        gauge("mesh_size_factor", "Factor by which the books count the sizes of models.", merge="max").follow(
            lambda: account().factor
        )

    def refused(self, reason: str) -> None:
        """Counts a refused load."""
        self._refusals.labels(reason).inc()

    def follow(
        self,
        ledger: Ledger,
        puller: Callable[[], PullerStatistics],
        wanted: Callable[[], float],
        *,
        published: Callable[[], bool],
    ) -> None:
        """Adds the metrics of memory, copies, pulls and the disk. `wanted` returns the number of pods that the models
        in use would fill, and `published` returns whether the pod is published in etcd."""
        gauge = self.registry.gauge

        def idle_s() -> float:
            first = ledger.first()
            return 0.0 if first is None else ledger.idle_ms(first) / 1000

        gauge("modelmesh_instance_capacity_bytes", "Memory for models.").follow(lambda: ledger.capacity.host_bytes)
        gauge("modelmesh_instance_used_bytes", "Memory used by models, loads included.").follow(
            lambda: ledger.committed.host_bytes
        )
        gauge(
            "modelmesh_instance_used_bps",
            "Use of the fuller memory, in 1/100 percent of its capacity.",
            merge="max",
        ).follow(lambda: int(10_000 * ledger.fullness))
        gauge("mesh_device_capacity_bytes", "Device memory for models; 0: no device.").follow(
            lambda: ledger.capacity.device_bytes
        )
        gauge("mesh_device_used_bytes", "Device memory used by models, loads included.").follow(
            lambda: ledger.committed.device_bytes
        )
        gauge("mesh_pods_wanted", "Pods such as this one that its models in use would fill.").follow(wanted)
        gauge("modelmesh_instance_models_total", "Copies in this pod.").follow(lambda: ledger.statistics().copies)
        gauge("modelmesh_instance_lru_age_seconds", "Idle time of the oldest copy; 0: none.", merge="max").follow(
            idle_s
        )
        gauge("modelmesh_instance_lru_seconds", "Last use of the oldest copy, since the epoch.", merge="min").follow(
            lambda: time.time() - idle_s()
        )
        gauge("mesh_loads_in_progress", "Loads under way.").follow(lambda: ledger.statistics().loading)
        gauge("mesh_pulls_in_progress", "Models whose files are being fetched.").follow(lambda: puller().in_progress)
        gauge("mesh_pull_bytes_per_second", "Rate at which pulls receive bytes from stores.").follow(
            lambda: sum(pull.bytes_per_second for pull in puller().progress.values())
        )
        gauge("mesh_disk_bytes", "Files of models on this pod's disk.").follow(lambda: puller().cache.bytes)
        gauge("mesh_disk_used_bytes", "Files of models on disk in use by loaded models and pulls.").follow(
            lambda: puller().cache.used_bytes
        )
        counter = self.registry.counter
        counter("mesh_pull_fetched_bytes", "Bytes fetched from stores.").follow(lambda: puller().fetched_bytes)
        counter("mesh_pull_failures", "Pulls that failed.").follow(lambda: puller().failures)
        counter("mesh_pull_retries", "Repeated attempts to fetch.").follow(lambda: puller().retries)
        counter("mesh_disk_hits", "Files found on disk.").follow(lambda: puller().cache.hits)
        counter("mesh_disk_misses", "Files that had to be fetched.").follow(lambda: puller().cache.misses)
        counter("mesh_disk_damaged", "Files changed or removed on disk by another program and fetched again.").follow(
            lambda: puller().cache.damaged
        )
        counter("mesh_disk_evictions", "Files removed from disk to make room.").follow(lambda: puller().cache.evictions)
        gauge("mesh_published", "1 while this pod is published in etcd.", merge="min").follow(lambda: int(published()))


def calls_snapshot(calls: Iterable[Series]) -> metrics.Snapshot:
    """Returns the model server's calls by method and code, as a snapshot to merge."""
    series: list[Any] = []
    for one in calls:
        try:
            code = Code(one.code).name
        except ValueError:
            code = Code.UNKNOWN.name
        series.append([[one.method, code], [list(one.buckets), one.sum_ns / 1e6]])
    metric = {
        "name": "modelmesh_invoke_model_milliseconds",
        "type": "histogram",
        "help": "Calls that the model server answered, by its own clock.",
        "labels": ["method", "code"],
        "merge": "sum",
        "buckets": list(metrics.BUCKETS_MS),
        "series": series,
    }
    return {"metrics": [metric]}
