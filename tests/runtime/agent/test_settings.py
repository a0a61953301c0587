"""Settings of an agent, including invalid ones."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from mesh.modelservers import environments
from mesh.runtime.__main__ import app
from mesh.runtime.agent.options import Memory, ModelServer
from mesh.runtime.agent.settings import RuntimeSettings
from mesh.runtime.cache.evictions import capacity


def test_addresses_that_others_can_reach() -> None:
    settings = RuntimeSettings("pod", data="127.0.0.1:0")
    assert settings.reachable("127.0.0.1:5") == "127.0.0.1"
    assert settings.reachable("0.0.0.0:5") not in ("", "0.0.0.0")
    assert replace(settings, advertise="pod-1.svc").reachable("0.0.0.0:5") == "pod-1.svc"


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--capacity", "lots", "is not a size"),
        ("--data", "nowhere", "is not an address"),
        ("--device", "tpu", "use auto, cpu or cuda"),
        ("--lease-ttl", "1", "greater than or equal"),
        ("--etcd-ca", "/no/such/file", "No such file"),
        ("--log-level", "loud", "not a log level"),
        ("--server-calls", "127.0.0.1:8086", "it needs --server or --server-command"),
        ("--server-metrics", "127.0.0.1:8002", "it needs --server or --server-command"),
    ],
)
def test_wrong_options_are_refused_with_a_text(option: str, value: str, says: str) -> None:
    result = CliRunner().invoke(app, [option, value], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert says in " ".join(result.output.split())


def neighbour(**options: Any) -> ModelServer:
    """Returns the options of a pod for a model server that Mesh does not start, but manages through an adapter."""
    return ModelServer(server="127.0.0.1:8001", adapter="mlserver", server_models=Path("/models"), **options)


def test_the_capacity_of_a_server_with_an_adapter_follows_from_its_memory() -> None:
    """A server with an adapter reports no capacity, so by default most of `--server-memory-limit` is for models.
    Without that option, nothing is known of the memory. A server without an adapter reports its own capacity."""
    server = neighbour(server_memory_limit="4GiB")
    auto = Memory().split(foreign=True, at_hand=server.at_hand())
    assert auto == (capacity.auto_capacity(4 << 30), 0)
    assert 2 << 30 < auto[0] < 3 << 30
    assert Memory(capacity="1GiB").split(foreign=True, at_hand=server.at_hand()) == (1 << 30, 0)
    assert neighbour().at_hand() == 0
    assert ModelServer(server="127.0.0.1:8001", server_memory_limit="4GiB").at_hand() == 0


def test_an_adapter_for_code_alone_needs_the_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton that Mesh installs serves only models that run code. It therefore needs `--allow-code`, unless
    `--types` names the types."""
    monkeypatch.setattr(environments, "installed", lambda kind: True)
    with pytest.raises(typer.BadParameter, match="serves only models that run code"):
        ModelServer(adapter="triton").check()
    for given in (ModelServer(adapter="triton", allow_code=True), ModelServer(adapter="triton", types="triton")):
        given.check()
    assert ModelServer(adapter="triton", allow_code=True).served(ours=False) == ("triton-python",)


def test_slots_follow_the_capacity() -> None:
    """The number of slots grows with the capacity, between a lower and an upper bound."""
    assert RuntimeSettings("pod", capacity=1 << 20).slots == 1024
    assert RuntimeSettings("pod", capacity=256 << 20).slots == 8192
    assert RuntimeSettings("pod", capacity=1 << 40).slots == 32768


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--adapter", "jboss"], "'jboss' is not an adapter: use mlserver"),
        (["--adapter", "mlserver"], "run `mesh servers install mlserver`"),
        (["--adapter", "mlserver", "--server", "127.0.0.1:8081"], "server and this pod share"),
        (["--allow-code"], "it needs --adapter"),
        (["--server-models", "/models", "--server", "127.0.0.1:8081"], "it needs --adapter"),
        (["--server-memory-limit", "1GiB"], "it needs --server"),
        (["--server-memory-limit", "much", "--server", "127.0.0.1:8081"], "is not a size"),
    ],
)
def test_adapters_are_refused_without_what_they_need(
    options: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MESH_SERVERS_DIR", str(tmp_path))
    result = CliRunner().invoke(app, options, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert says in " ".join(result.output.replace("│", " ").split())
