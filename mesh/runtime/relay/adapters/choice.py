"""The adapters, by the names of the option --adapter."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

import grpc

from mesh.runtime.relay.adapters.mlserver import MLServer
from mesh.runtime.relay.adapters.ovms import Ovms
from mesh.runtime.relay.adapters.repository import Repository
from mesh.runtime.relay.adapters.torchserve import TorchServe, V2OverPredictions
from mesh.runtime.relay.adapters.triton import Triton
from mesh.runtime.relay.control import Control, SpiControl
from mesh.runtime.relay.translating import Translation

Managed = Callable[[grpc.aio.Channel], Control]


class _Maker(Protocol):
    """The maker of an adapter, for a server that reads its models below `root`. `load_timeout` is in seconds."""

    def __call__(self, channel: grpc.aio.Channel, root: Path, *, load_timeout: float, allow_code: bool) -> Control: ...


_MAKERS: dict[str, _Maker] = {
    "mlserver": MLServer,
    "triton": Triton,
    "torchserve": TorchServe,
}
"""The adapter of each kind of server in `mesh.modelservers.kinds`, except for OVMS."""

_TRANSLATIONS: dict[str, Translation] = {"torchserve": V2OverPredictions()}
"""The translation of V2's calls for servers that need one."""

_IN_ONE_LOOP = frozenset({"mlserver"})
"""The kinds of servers whose event loop a prediction can block. The others run predictions elsewhere."""


def managed(name: str, root: Path | None, *, load_timeout: float, allow_code: bool, rest: str = "") -> Managed:
    """Returns the maker of the control for a kind of server; "" means a server that speaks the SPI. The server reads
    its models below `root`. `load_timeout` is in seconds. `rest` is the address of the REST port, HOST:PORT, by which
    OVMS is managed."""
    if not name:
        return SpiControl
    assert root is not None
    if name == "ovms":
        return lambda channel: Ovms(channel, root, load_timeout=load_timeout, rest=rest)
    make = _MAKERS[name]
    return lambda channel: make(channel, root, load_timeout=load_timeout, allow_code=allow_code)


def translation(name: str) -> Translation | None:
    """Returns the translation of V2's calls for a kind of server, or None if such a server answers V2 itself."""
    return _TRANSLATIONS.get(name)


def question(name: str, channel: grpc.aio.Channel) -> Callable[[], Awaitable[object]] | None:
    """Returns a function that sends a request which only the event loop of this kind of server can answer, or None if
    no prediction can block such a server."""
    if name not in _IN_ONE_LOOP:
        return None
    repository = Repository(channel)
    return lambda: repository.live(timeout=None)
