"""Minimal permissions for files on the pod's disk, and errors that reveal nothing of the disk to callers."""

import errno
import os
import stat

import pytest

from puller.errors import PullError, PullErrorKind
from puller.puller import Puller
from puller.source import Source
from tests.support.once import ONCE
from tests.support.waiting import until


@pytest.fixture
def open_umask():
    """Sets a umask that masks nothing."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.parametrize("links", [True, False])
async def test_pulled_files_are_readable_by_the_pod_alone_and_writable_by_nobody(
    open_umask, tmp_path, monkeypatch, links
):
    """With a umask of 0, still only the pod's user and group can read pulled files and enter their folders, and nobody
    can write to the files."""
    if not links:
        real = os.link

        def link(source, target, **more):
            if ".new-" not in str(target) or ".blobs" in str(source):
                raise OSError(errno.EPERM, "no links here")
            real(source, target, **more)

        monkeypatch.setattr(os, "link", link)
    root = tmp_path / "root" / "model"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "a").write_bytes(b"x" * 200_000)
    (root / "b").write_bytes(b"y")
    puller = Puller(directory=tmp_path / "models", file_roots=[tmp_path / "root"], retries=ONCE)
    puller.sweep()
    pulled = await puller.pull(Source(str(root)), into="m", tag="v1")
    (puller.directory / "made").write_bytes(b"quicker")
    assert await puller.keep("m", pulled, "v1", puller.directory / "made")
    await until(lambda: not puller.statistics().cache.unsafe)
    await puller.pull(Source(str(root)), into="n", tag="v1")
    found = {path: path.stat().st_mode for path in [puller.directory, *puller.directory.rglob("*")]}
    files = {path for path, mode in found.items() if stat.S_ISREG(mode) and path.name != ".lock"}
    assert len(files) >= 9
    assert {stat.S_IMODE(found[path]) for path in files} == {0o440}
    assert {stat.S_IMODE(mode) for mode in found.values() if stat.S_ISDIR(mode)} == {0o750}
    await puller.close()


async def test_errors_of_volumes_tell_no_mount_path(tmp_path):
    """Errors about `pvc://claim/path` name that path for the person who registered it, but no mount path."""
    volumes = tmp_path / "mounts-of-the-pod"
    claim = volumes / "claim"
    (claim / "empty").mkdir(parents=True)
    (claim / "out").symlink_to("/etc/passwd")
    os.mkfifo(claim / "pipe")
    (claim / "links").mkdir()
    (claim / "links" / "out").symlink_to("/etc/passwd")
    puller = Puller(directory=tmp_path / "models", volumes=volumes, retries=ONCE)
    puller.sweep()
    for path in ("none", "empty", "out", "pipe", "links", "pipe/below", "x" * 300):
        with pytest.raises(PullError, match=f"pvc://claim/{path}") as caught:
            await puller.pull(Source(f"pvc://claim/{path}"), into="m")
        assert "mounts-of-the-pod" not in caught.value.text
    await puller.close()


async def test_errors_of_paths_tell_no_roots(puller, root, tmp_path, caplog):
    """Errors about paths outside the roots do not name the roots to callers. The pod's log names them."""
    (root / "link").symlink_to(tmp_path / "secret")
    for path in ("/etc/passwd", root / "link"):
        caplog.clear()
        with pytest.raises(PullError, match="--file-root") as caught:
            await puller.pull(Source(str(path)), into="m")
        assert caught.value.kind is PullErrorKind.FORBIDDEN
        assert str(root) not in caught.value.text.replace(str(path), "")
        assert str(root) in caplog.text


async def test_errors_of_the_disk_tell_paths_only_to_the_log(puller, root, monkeypatch, caplog):
    """The disk fails here with an error that contains a path."""
    (root / "m").write_bytes(b"x")

    def fails(path, *arguments, **more):
        raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN), str(path))

    monkeypatch.setattr(os, "chmod", fails)
    with pytest.raises(PullError) as caught:
        await puller.pull(Source(str(root / "m")), into="m")
    assert caught.value.kind is PullErrorKind.DISK_FULL
    assert str(puller.directory) not in caught.value.text
    assert str(puller.directory) in caplog.text
    assert os.strerror(errno.ENOTCONN) in caplog.text
