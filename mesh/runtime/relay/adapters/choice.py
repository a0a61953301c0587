"""The adapters by the names that users give."""

from collections.abc import Callable
from pathlib import Path

import grpc

from mesh.runtime.relay.adapters.mlserver import MLServer
from mesh.runtime.relay.control import Control, SpiControl

Managed = Callable[[grpc.aio.Channel], Control]


def managed(name: str, root: Path | None, *, load_timeout: float, allow_code: bool) -> Managed:
    """Returns the maker of the control for a kind of server; "" means one that speaks the SPI. The server reads its
    models below `root`."""
    if not name:
        return SpiControl
    assert root is not None
    return lambda channel: MLServer(channel, root, load_timeout=load_timeout, allow_code=allow_code)
