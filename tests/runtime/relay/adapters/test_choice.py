"""The choice of an adapter by the kind of a server."""

from pathlib import Path

import grpc
import pytest

from mesh.modelservers import kinds
from mesh.runtime.relay.adapters import choice
from mesh.runtime.relay.control import SpiControl


@pytest.mark.parametrize("kind", kinds.KINDS)
async def test_each_kind_of_server_has_an_adapter(kind: str, tmp_path: Path) -> None:
    async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
        control = choice.managed(kind, tmp_path, load_timeout=5.0, allow_code=False, rest="127.0.0.1:1")(channel)
    assert not isinstance(control, SpiControl)


def test_a_server_without_a_kind_speaks_the_spi() -> None:
    """Without `--adapter`, the server is managed through `mmesh.ModelRuntime`."""
    assert choice.managed("", None, load_timeout=5.0, allow_code=False) is SpiControl
