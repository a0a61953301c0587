"""`mesh keys admin`, which the chart's Job runs, with a Kubernetes API over HTTPS."""

import asyncio

import pytest
from typer.testing import CliRunner

from mesh.certificates.keeping import StoreError
from mesh.certificates.secret import Cluster, Secret
from mesh.cli import adminkey
from mesh.cli.app import build
from router.access import adminkeys
from tests.support.kubeapi import KubeApi

NAME = "mesh-admin-key"


@pytest.fixture
async def api(tmp_path):
    async with KubeApi(tmp_path / "kube") as api:
        api.put(NAME)
        yield api


@pytest.fixture
def secret(api):
    return Secret(Cluster(api.url, api.account), NAME, timeout=20)


async def test_a_key_is_made_once(api, secret, tmp_path):
    """An empty Secret gets a key that routers accept. A Secret with a key keeps it."""
    assert await adminkey.filled(secret)
    made = api.content(NAME)
    (tmp_path / "admin.key").write_bytes(made["admin.key"])
    assert len(adminkeys.read(tmp_path / "admin.key")) == 1
    assert not await adminkey.filled(secret)
    assert api.content(NAME) == made


async def test_two_at_once_make_one_key(api, secret):
    """If four commands run at the same time, one writes its key and the others keep that key."""
    assert sorted(await asyncio.gather(*(adminkey.filled(secret) for _ in range(4)))) == [False, False, False, True]


async def test_other_entries_stay(api, secret):
    api.store(NAME, {"note": b"ours", "admin.key": b" \n"})
    assert await adminkey.filled(secret)
    assert api.content(NAME)["note"] == b"ours"


async def test_a_secret_that_always_changes_is_an_error(api, secret):
    """If another process changes the Secret before each write, `filled` raises an error instead of trying forever."""

    def meddle() -> None:
        api.store(NAME, {})
        api.before_put = meddle

    api.before_put = meddle
    with pytest.raises(StoreError, match="another process changed"):
        await adminkey.filled(secret)


async def test_the_command_as_the_chart_runs_it(api, monkeypatch):
    """The command finds the API by the variables that Kubernetes sets in every pod, and prints no key. If the Secret
    does not exist, the error says how to create it."""
    host, port = api.url.removeprefix("https://").split(":")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", port)

    async def run(name: str):
        words = ["keys", "admin", "--secret", name, "--kube-account", str(api.account)]
        return await asyncio.to_thread(CliRunner().invoke, build(), words)

    made = await run(NAME)
    assert made.exit_code == 0, made.output
    assert "now has an admin's key" in made.output
    assert "already has" in (await run(NAME)).output
    assert api.content(NAME)["admin.key"].decode() not in made.output
    missing = await run("none")
    assert missing.exit_code == 1
    assert "kubectl create secret generic none" in missing.output
