"""Stores of certificates: a folder of real files, and a Secret behind a Kubernetes API over HTTPS. The tests run the
command as the chart's Job does."""

import asyncio
import os
import signal
import stat
import sys

import pytest

from mesh.certificates import Foreign, Wanted, issuing, keeping
from mesh.certificates.folder import Folder
from mesh.certificates.keeping import StoreError
from mesh.certificates.renewal import ENTRIES
from mesh.certificates.secret import Cluster, Secret
from mesh.etcd import Etcd
from mesh.identity import Identity
from mesh.options.etcdsettings import EtcdSettings
from tests.support.etcd import EtcdServer
from tests.support.kubeapi import NAMESPACE, KubeApi
from tests.support.waiting import until

WANTED = Wanted.of(["localhost"], days=365, renew_before=60)
NAME = "mesh-internal"


def later(days: float):
    return lambda: keeping.now() + days * issuing.DAY


@pytest.fixture
async def api(tmp_path):
    async with KubeApi(tmp_path / "kube") as api:
        api.put(NAME)
        yield api


@pytest.fixture
def secret(api):
    return Secret(Cluster(api.url, api.account), NAME, timeout=20)


# --- the folder ---------------------------------------------------------------------------------------------------


async def test_a_folder_is_filled_and_works_for_the_mesh(tmp_path):
    """A folder is filled with files that only this user may read and that a mesh can use. A second run changes nothing.
    A mesh notices a renewal, which leaves no former files."""
    folder = tmp_path / "deep" / "tls"
    assert (await keeping.keep(Folder(folder), WANTED, later(-310))).changed
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for name in ENTRIES:
        assert stat.S_IMODE((folder / name).stat().st_mode) == (0o600 if name.endswith(".key") else 0o644)
    identity = Identity(folder)
    assert 54 < identity.expires_in / 86400 <= 55

    assert not (await keeping.keep(Folder(folder), WANTED, later(-309))).changed
    assert not identity.look()
    assert (await keeping.keep(Folder(folder), WANTED)).changed
    assert identity.look()
    assert 364 < identity.expires_in / 86400 <= 365
    assert len([path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]) == 1


async def test_plain_files_in_a_folder_become_links(tmp_path):
    """Plain files in a folder, for instance copied there by hand, become links at the next renewal."""
    await keeping.keep(Folder(tmp_path / "made"), WANTED, later(-310))
    copied = tmp_path / "copied"
    copied.mkdir()
    for name in ENTRIES:
        (copied / name).write_bytes((tmp_path / "made" / name).read_bytes())
    assert not (await keeping.keep(Folder(copied), WANTED, later(-309))).changed
    identity = Identity(copied)
    assert (await keeping.keep(Folder(copied), WANTED)).changed
    assert identity.look()
    assert all((copied / name).is_symlink() for name in ENTRIES)


async def test_two_at_once_in_a_folder_make_one(tmp_path):
    done = await asyncio.gather(*(keeping.keep(Folder(tmp_path / "tls"), WANTED) for _ in range(5)))
    assert [one.changed for one in done].count(True) == 1
    assert len({one.expires for one in done}) == 1
    Identity(tmp_path / "tls")


async def test_one_that_does_not_end_is_not_waited_for(tmp_path):
    busy = Folder(tmp_path)
    await busy.read()
    with pytest.raises(StoreError, match="another"):
        await keeping.keep(Folder(tmp_path, timeout=0.01), WANTED)
    busy.close()
    assert (await keeping.keep(Folder(tmp_path), WANTED)).changed


async def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file"):
        await keeping.keep(Folder(tmp_path / "file" / "tls"), WANTED)


async def test_etcd_takes_them(tmp_path):
    """etcd accepts the files both as its own certificate and as its clients' certificate. The clients check the mesh's
    name instead of etcd's address."""
    folder = tmp_path / "tls"
    made = (await keeping.keep(Folder(folder), WANTED)).content
    extra = [
        *(f"--cert-file={folder / 'tls.crt'}", f"--key-file={folder / 'tls.key'}"),
        *(f"--trusted-ca-file={folder / 'ca.crt'}", "--client-cert-auth"),
    ]
    async with EtcdServer(tmp_path / "etcd", scheme="https", extra=extra) as server:
        settings = EtcdSettings(
            endpoints=(server.endpoint,),
            ca=made["ca.crt"],
            certificate=made["tls.crt"],
            private_key=made["tls.key"],
            server_name="mesh.internal",
        )
        async with Etcd(settings) as etcd:
            assert (await etcd.status(timeout=20)).has_leader


# --- the Secret ---------------------------------------------------------------------------------------------------


async def test_a_secret_is_filled_and_renewed(api, secret):
    """A Secret is filled and renewed, and its labels stay. While no renewal is due, nothing is written."""
    assert (await keeping.keep(secret, WANTED)).changed
    assert set(api.content(NAME)) == set(ENTRIES)
    assert api.secrets[NAME]["metadata"]["labels"] == {"app.kubernetes.io/name": "mesh"}
    assert not (await keeping.keep(secret, WANTED)).changed
    before = api.content(NAME)
    assert (await keeping.keep(secret, WANTED, later(310))).changed
    assert api.content(NAME)["ca.crt"] == before["ca.crt"]
    assert api.content(NAME)["tls.crt"] != before["tls.crt"]
    assert [method for method, _ in api.seen] == ["GET", "PUT", "GET", "GET", "PUT"]


async def test_who_was_quicker_prevails(api, secret):
    """If another process writes certificates between our read and our write, the other process's certificates
    remain."""
    theirs = dict((await keeping.keep(secret, WANTED)).content)
    api.put(NAME)
    api.before_put = lambda: api.store(NAME, theirs)
    assert not (await keeping.keep(secret, WANTED)).changed
    assert api.content(NAME) == theirs


async def test_two_at_once_make_one(api):
    done = await asyncio.gather(*(keeping.keep(Secret(Cluster(api.url, api.account), NAME), WANTED) for _ in range(5)))
    assert [one.changed for one in done].count(True) == 1
    assert {one.content["tls.crt"] for one in done} == {api.content(NAME)["tls.crt"]}


async def test_what_passes_is_tried_again(api, secret):
    api.failures = [503, 429, 500]
    assert (await keeping.keep(secret, WANTED)).changed


async def test_what_does_not_pass_ends_after_a_while(api):
    api.failures = [503] * 1000
    with pytest.raises(StoreError, match=r"has given no usable answer for 0.3 s: it answers 503"):
        await keeping.keep(Secret(Cluster(api.url, api.account), NAME, timeout=0.3), WANTED)
    nobody = Secret(Cluster("https://127.0.0.1:1", api.account), NAME, timeout=0.3)
    with pytest.raises(StoreError, match=r"127\.0\.0\.1:1"):
        await keeping.keep(nobody, WANTED)


async def test_a_token_that_was_replaced_is_read_again(api, secret):
    await secret.read()
    (api.account / "token").write_text("another.token")
    await secret.read()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(
            lambda api: api.secrets.clear(), "kubectl create secret generic mesh-internal -n team-a", id="none"
        ),
        pytest.param(lambda api: api.put(NAME, allow=""), "Role with get and update", id="may-not-read"),
        pytest.param(lambda api: api.put(NAME, allow="get"), "cannot update resource", id="may-not-write"),
        pytest.param(lambda api: (api.account / "token").unlink(), "automountServiceAccountToken", id="no-token"),
        pytest.param(
            lambda api: (api.account / "ca.crt").write_text("x"),
            "ca.crt contains no valid certificate",
            id="no-authority",
        ),
    ],
)
async def test_what_is_wrong_is_said(api, secret, change, words):
    change(api)
    with pytest.raises(StoreError, match=words):
        await keeping.keep(secret, WANTED)


async def test_an_api_that_is_somebody_else_is_not_told_the_token(api, tmp_path):
    other = KubeApi(tmp_path / "other")
    with pytest.raises(StoreError, match="certificate"):
        await Secret(Cluster(api.url, other.account), NAME).read()
    assert api.seen == []


async def test_content_of_somebody_else_stays(api, secret):
    api.put(NAME, tls_crt=b"theirs", tls_key=b"theirs")
    before = api.content(NAME)
    with pytest.raises(Foreign):
        await keeping.keep(secret, WANTED)
    assert api.content(NAME) == before
    assert [method for method, _ in api.seen] == ["GET"]


# --- the command --------------------------------------------------------------------------------------------------


async def command(*words: str, **environment: str) -> tuple[int, str]:
    """Runs `mesh certificates` and returns its exit code and output."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "mesh", "certificates", *words),
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "200", **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return process.returncode, out.decode()


async def test_the_command_as_the_chart_runs_it(api):
    """The command finds the API by the variables that Kubernetes sets in every pod, and prints no private key. A second
    run has nothing to do."""
    host, port = api.url.removeprefix("https://").split(":")
    words = [
        *(f"--secret={NAME}", "--days=365", "--renew-before=60"),
        *("--dns=mesh.internal", "--dns=localhost", "--dns=mesh-etcd-0.mesh-etcd", f"--kube-account={api.account}"),
    ]
    environment = {"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port, "MESH_LOG_FORMAT": "json"}
    code, out = await command(*words, **environment)
    assert code == 0, out
    assert "the certificates are written" in out
    assert set(api.content(NAME)) == set(ENTRIES)
    assert "PRIVATE" not in out
    code, out = await command(*words, **environment)
    assert code == 0, out
    assert "nothing is due" in out


async def test_the_command_says_what_is_wrong(api, tmp_path):
    api.put("theirs", tls_crt=b"x", tls_key=b"x")
    account = f"--kube-account={api.account}"
    cases = [
        ((), "exactly one of --secret and --dir"),
        (("--dir", str(tmp_path / "a"), "--secret", "x"), "exactly one of --secret and --dir"),
        (("--dir", str(tmp_path / "a"), "--days", "30"), "cannot be renewed 60 days before its end"),
        (("--dir", str(tmp_path / "a"), "--dns", "a b"), "not a DNS name"),
        (("--secret", NAME), "only a pod can write a Secret"),
        (("--secret", "theirs", "--kube-api", api.url, account), "internalTLS.existingSecret"),
        (("--secret", "none", "--kube-api", api.url, account), f"kubectl create secret generic none -n {NAMESPACE}"),
    ]
    done = await asyncio.gather(*(command(*words, KUBERNETES_SERVICE_HOST="") for words, _ in cases))
    for (code, out), (words, says) in zip(done, cases, strict=True):
        assert code in (1, 2), (words, out)
        assert says in " ".join(out.replace("│", " ").split()), (words, out)
        assert "Traceback" not in out
    assert not (tmp_path / "a").exists()


async def test_the_command_ends_at_once_when_interrupted(api):
    """An interrupt ends the command at once, even while it waits for an API that does not answer. A shell without job
    control makes background commands ignore interrupts, so the test resets that."""
    api.failures = [503] * 10_000
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "mesh", "certificates", "--secret", NAME),
        *("--kube-api", api.url, "--kube-account", str(api.account)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    await until(lambda: len(api.failures) < 10_000, timeout=30, why="the command asks the API")
    process.send_signal(signal.SIGINT)
    out, _ = await asyncio.wait_for(process.communicate(), 10)
    assert process.returncode == 130, out
    assert b"Traceback" not in out
