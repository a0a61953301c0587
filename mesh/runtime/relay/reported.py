"""The memory of a device and of the pod's disk, which a server may report in the trailers of its SPI answers.

The SPI has one number for a model's size. A server that keeps models on a device may add trailers, as Mesh's own does:
`mesh-device-total` and `mesh-device-used` to its status, `mesh-host-bytes`, `mesh-device-bytes` and `mesh-device-used`
to loads, and `mesh-device-used` to sizes. An adapter adds `mesh-disk-bytes` to loads: the files that it has made of the
model's files, such as the content of an archive, and keeps until the unload. Each is a number of bytes.
"""

from collections.abc import Iterable

TOTAL, USED = "mesh-device-total", "mesh-device-used"
DISK = "mesh-disk-bytes"
_NAMES = frozenset({TOTAL, USED, DISK, "mesh-host-bytes", "mesh-device-bytes"})

Trailers = tuple[tuple[str, str], ...]


def passed_on(trailers: Iterable[tuple[str, str | bytes]] | None) -> Trailers:
    """Returns the trailers about device and disk, which the relay passes on to the agent. Leaves out values that
    are not numbers."""
    return tuple(
        (key, value) for key, value in trailers or () if key in _NAMES and isinstance(value, str) and value.isdecimal()
    )


def used(trailers: Iterable[tuple[str, str | bytes]] | None) -> int | None:
    """Returns the bytes in use on the device, or None if the trailers do not say."""
    return next((int(value) for key, value in passed_on(trailers) if key == USED), None)
