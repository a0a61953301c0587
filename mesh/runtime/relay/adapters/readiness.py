"""The status of a server that is ready, in the terms of the SPI."""

from collections.abc import Mapping, Sequence

from mesh.pb import modelruntime_pb2 as pb
from mesh.runtime.relay.adapters import sizes


def ready(
    version: str,
    methods: Mapping[str, Sequence[int]],
    *,
    loads: int,
    load_timeout: float,
    default_bytes: int = sizes.UNKNOWN,
) -> pb.RuntimeStatusResponse:
    """Returns the status READY. `methods` has the path of the model's id in the requests of each method. `loads` is the
    number of loads that may run at the same time, `load_timeout` their limit in seconds, and `default_bytes` the size
    of a model of which nothing is known."""
    status = pb.RuntimeStatusResponse(
        status=pb.RuntimeStatusResponse.READY,
        runtimeVersion=version,
        maxLoadingConcurrency=loads,
        modelLoadingTimeoutMs=int(load_timeout * 1000),
        defaultModelSizeInBytes=default_bytes,
    )
    for name, path in methods.items():
        status.methodInfos[name].idInjectionPath.extend(path)
    return status
