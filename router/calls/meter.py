"""Cheap counting of calls: ModelMesh's metrics by method and code, and Mesh's own, which distinguish hits from
cold starts.

The series of a method and a code are looked up once and kept, so that a hit builds no strings. `Meter.call` updates all
of them itself, because calling `observe` for each would cost more.

Method names come from clients. A method gets its own series once a model server has answered a call of it with OK. All
other names are counted together as `other`, so invented names can neither inflate the metrics nor crowd out real ones.
"""

from bisect import bisect_left

from mesh.statuses import Code
from mesh.telemetry import metrics

OTHER = "other"
MAX_METHODS = 64
"""Methods besides V2's that have series of their own."""

_MAX_LABEL = 100  # characters
_V2 = ("ModelInfer", "ModelMetadata", "ModelReady")

_Series = tuple[metrics.Distribution, metrics.Distribution, metrics.Distribution]


class Meter:
    """The metrics of one worker's calls and loads. Times are in milliseconds, sizes in bytes."""

    def __init__(self, registry: metrics.Registry) -> None:
        labels = ("method", "code")
        self._times = registry.histogram(
            "modelmesh_api_request_milliseconds", "Inference calls as clients see them.", metrics.BUCKETS_MS, labels
        )
        self._requests = registry.histogram(
            "modelmesh_request_size_bytes", "Payloads of requests.", metrics.BUCKETS_MESSAGE, labels
        )
        self._responses = registry.histogram(
            "modelmesh_response_size_bytes", "Payloads of replies.", metrics.BUCKETS_MESSAGE, labels
        )
        self.misses = registry.histogram(
            "modelmesh_cache_miss_milliseconds", "Waits for models that were not loaded.", metrics.BUCKETS_MS
        ).labels()
        self.hits = registry.histogram(
            "mesh_hit_milliseconds", "Calls of resident models, all outcomes.", metrics.BUCKETS_MS
        ).labels()
        self.cold = registry.histogram(
            "mesh_cold_milliseconds", "Calls that waited for a load, all outcomes.", metrics.BUCKETS_MS
        ).labels()
        self.loads = registry.counter("mesh_loads", "Loads that agents were asked for and carried out.").labels()
        self.load_failures = registry.counter("mesh_load_failures", "Loads that agents tried and that failed.").labels()
        self.not_here = registry.counter("mesh_not_here", "Calls that reached a pod without their copy.").labels()
        self.verify_first = registry.counter(
            "mesh_verify_first", "Calls that a pod refused until the model's record was verified."
        ).labels()
        self.unsent = registry.counter("mesh_unsent", "Calls that could not be sent to a pod.").labels()
        self.lost = registry.counter("mesh_lost", "Calls whose connection broke after they were sent.").labels()
        self.retried = registry.counter("mesh_retried", "Calls sent a second time after a loss.").labels()
        self._management = registry.histogram(
            "mesh_management_milliseconds", "Management calls over gRPC.", metrics.BUCKETS_MS, labels
        )
        self._known: dict[tuple[str, int], _Series] = {}
        self._methods = set(_V2)

    def call(
        self,
        label: str,
        code: int,
        ms: float,
        request: int,
        response: int = -1,
        kind: metrics.Distribution | None = None,
    ) -> None:
        """Counts a finished inference call, also in `kind` (`hits` or `cold`) if given. `ms` is its duration. `request`
        and `response` are sizes without framing; `response` is -1 if there was no reply."""
        times, requests, responses = self._known.get((label, code)) or self._series(label, code)
        bucket = bisect_left(times.bounds, ms)
        times.counts[bucket] += 1
        times.sum += ms
        if kind is not None:
            kind.counts[bucket] += 1
            kind.sum += ms
        requests.counts[bisect_left(requests.bounds, request)] += 1
        requests.sum += request
        if response >= 0:
            responses.counts[bisect_left(responses.bounds, response)] += 1
            responses.sum += response

    def managed(self, label: str, code: int, ms: float) -> None:
        """Counts a finished management call over gRPC that took `ms` milliseconds."""
        self._management.labels(label, code_name(code)).observe(ms)

    def _series(self, label: str, code: int) -> _Series:
        methods = self._methods
        if code == Code.OK and len(methods) < MAX_METHODS + len(_V2) and len(label) <= _MAX_LABEL:
            methods.add(label)
        if label not in methods:
            label = OTHER
        name = code_name(code)
        found = (
            self._times.labels(label, name),
            self._requests.labels(label, name),
            self._responses.labels(label, name),
        )
        self._known[label, code] = found
        return found


def code_name(code: int) -> str:
    """Returns the name of a gRPC code, or its number as text if the code is unknown."""
    try:
        return Code(code).name
    except ValueError:
        return str(code)
