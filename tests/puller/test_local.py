"""Pulls of local files: only regular files under the roots, completely or not at all."""

import asyncio
import errno
import os
import socket
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puller import local, retry
from puller.errors import Nature, PullError, PullErrorKind
from puller.limits import PullLimits
from puller.local import LocalProvider
from puller.puller import Puller
from puller.sink import Sink
from puller.source import Source, locate
from tests.support.examples import examples
from tests.support.waiting import until


async def refused(puller: Puller, path: object, kind: PullErrorKind) -> str:
    with pytest.raises(PullError) as caught:
        await puller.pull(Source(str(path)), into="id")
    assert caught.value.kind is kind, caught.value
    return caught.value.text


@pytest.mark.parametrize("size", [0, 1, 4096, 3 * 2**20])
async def test_a_file_arrives_whole(puller, root, left, size):
    """A file arrives with its bytes, size and name. After its removal, only the cache's files are left."""
    content = os.urandom(size)
    (root / "a.onnx").write_bytes(content)
    pulled = await puller.pull(Source(str(root / "a.onnx")), into="tenant/model 1")
    assert pulled.path.read_bytes() == content
    assert pulled.path == puller.directory / "tenant%2Fmodel%201" / "a.onnx"
    assert pulled.bytes == size
    assert {name for name in left() if not name.startswith(".")} == {"tenant%2Fmodel%201"}
    await puller.remove("tenant/model 1")
    await until(lambda: left() == set())


async def test_file_uris(puller, root):
    """File URIs may have percent-encoded names and the host localhost. Other hosts, relative paths, queries and
    fragments are refused."""
    (root / "a b#1.onnx").write_bytes(b"x")
    for uri in (
        f"file://{root}/a%20b%231.onnx",
        f"file://localhost{root}/a%20b%231.onnx",
        f"file:{root}/a%20b%231.onnx",
    ):
        assert (await puller.pull(Source(uri), into="id")).path.read_bytes() == b"x"
    for uri in (f"file://elsewhere{root}/a", "file:a.onnx", f"file://{root}/a%20b#1.onnx", f"file://{root}/a?x"):
        await refused(puller, uri, PullErrorKind.BAD_REQUEST)


async def test_a_folder_arrives_as_a_tree(puller, root):
    """A folder arrives with nested files and empty folders. Links that stay inside become plain files."""
    model = root / "model"
    (model / "sub" / "empty").mkdir(parents=True)
    (model / "a.onnx").write_bytes(b"abc")
    (model / "sub" / "weights").write_bytes(b"12345")
    (model / "link").symlink_to("sub/weights")
    (model / "other").symlink_to("sub")
    pulled = await puller.pull(Source(str(model)), into="id")
    files = {str(path.relative_to(pulled.path)) for path in pulled.path.rglob("*") if path.is_file()}
    assert files == {"a.onnx", "sub/weights", "link", "other/weights"}
    assert not any(path.is_symlink() for path in pulled.path.rglob("*"))
    assert pulled.bytes == 3 + 5 * 3


async def test_the_schema_comes_along(puller, root):
    """The schema that the key names arrives as a second file, which is renamed if it has the model's name."""
    (root / "a").write_bytes(b"model")
    (root / "sub").mkdir()
    (root / "sub" / "a").write_bytes(b"schema")
    pulled = await puller.pull(Source(str(root / "a"), f'{{"schema_path": "{root}/sub/a"}}'), into="id")
    assert pulled.path.read_bytes() == b"model"
    assert pulled.schema == pulled.path.parent / "_schema.json"
    assert pulled.schema.read_bytes() == b"schema"
    assert str(pulled.schema) in pulled.key
    assert pulled.bytes == 5


async def test_what_does_not_exist(puller, root, left):
    """A missing path is NOT_FOUND and a folder without files is EMPTY. Both leave nothing behind."""
    await refused(puller, root / "missing.onnx", PullErrorKind.NOT_FOUND)
    (root / "file").write_bytes(b"")
    await refused(puller, root / "file" / "below", PullErrorKind.NOT_FOUND)
    (root / "empty" / "sub").mkdir(parents=True)
    await refused(puller, root / "empty", PullErrorKind.EMPTY)
    assert left() == set()


@pytest.fixture
def secret(tmp_path) -> Path:
    path = tmp_path / "secret"
    path.write_bytes(b"secret")
    return path


@pytest.mark.parametrize("form", ["absolute", "dots", "uri", "encoded dots", "link", "folder link", "similar name"])
async def test_nothing_outside_the_roots_is_read(puller, root, secret, left, form):
    match form:
        case "absolute":
            path = str(secret)
        case "dots":
            path = f"{root}/../secret"
        case "uri":
            path = f"file://{secret}"
        case "encoded dots":
            path = f"file://{root}/%2e%2e/secret"
        case "link":
            (root / "link").symlink_to(secret)
            path = str(root / "link")
        case "folder link":
            (root / "up").symlink_to(root.parent)
            path = str(root / "up" / "secret")
        case "similar name":
            root.with_name("root-2").mkdir()
            (root.with_name("root-2") / "a").write_bytes(b"x")
            path = str(root.with_name("root-2") / "a")
    assert "--file-root" in await refused(puller, path, PullErrorKind.FORBIDDEN)
    assert left() == set()


async def test_whether_something_exists_outside_is_not_told(puller, root, secret):
    there = await refused(puller, secret, PullErrorKind.FORBIDDEN)
    missing = await refused(puller, secret.with_name("missng"), PullErrorKind.FORBIDDEN)
    assert there.replace("secret", "missng") == missing


STRAY = {
    "a link out": lambda folder: (folder / "z").symlink_to(folder.parent.parent / "secret"),
    "a link to the parent": lambda folder: (folder / "z").symlink_to("../.."),
    "a link that leads nowhere": lambda folder: (folder / "z").symlink_to("nowhere"),
    "a link to itself": lambda folder: (folder / "z").symlink_to("z"),
    "a loop of links": lambda folder: (folder / "z").symlink_to("."),
    "a pipe": lambda folder: os.mkfifo(folder / "z"),
    "a socket": lambda folder: _socket(folder),
    "lost+found": lambda folder: ((folder / "lost+found").mkdir(), (folder / "lost+found" / "#12").touch()),
    "macOS": lambda folder: (folder / "._a.onnx").write_bytes(b"x"),
    "NFS": lambda folder: (folder / ".nfs000000000012").write_bytes(b"x"),
    "no text": lambda folder: open(os.fsencode(folder) + b"/back\\slash", "wb").close(),
    "an unreadable file": lambda folder: (folder / "unreadable").write_bytes(b"x"),
    "an unreadable folder": lambda folder: ((folder / "unreadable").mkdir(), (folder / "unreadable" / "x").touch()),
}


def _socket(folder: Path) -> None:
    before = os.getcwd()
    os.chdir(folder)  # the whole path may be too long for a socket's address
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind("special")
    finally:
        os.chdir(before)


@pytest.fixture
def unreadable(monkeypatch):
    """Makes files of one name unreadable, even for root."""
    access, scandir = os.access, os.scandir

    def forbidden(path, *arguments, **more):
        return "unreadable" not in str(path) and access(path, *arguments, **more)

    def listed(path):
        if "unreadable" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "access", forbidden)
    monkeypatch.setattr(os, "scandir", listed)


@pytest.mark.parametrize("what", STRAY)
async def test_what_is_of_no_model_is_skipped(puller, root, secret, unreadable, caplog, what):
    """Files that do not belong to a model are skipped with the reason, at the top and below, and the model's files
    arrive."""
    model = root / "model"
    for folder in (model, model / "sub"):
        folder.mkdir()
        (folder / "a.onnx").write_bytes(b"x")
        STRAY[what](folder)
    pulled = await puller.pull(Source(str(model)), into="id")
    files = {str(path.relative_to(pulled.path)) for path in pulled.path.rglob("*") if path.is_file()}
    assert files == {"a.onnx", "sub/a.onnx"}
    assert len(pulled.skipped) == 2
    assert pulled.skipped[0] in caplog.text


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        ("a link out", PullErrorKind.FORBIDDEN),
        ("a link that leads nowhere", PullErrorKind.EMPTY),
        ("an unreadable file", PullErrorKind.FORBIDDEN),
        ("a pipe", PullErrorKind.EMPTY),
        ("lost+found", PullErrorKind.EMPTY),
    ],
)
async def test_nothing_but_what_is_of_no_model(puller, root, secret, unreadable, left, what, kind):
    """The pull of a folder fails if none of its files belongs to a model, and the error lists what was found."""
    (root / "model").mkdir()
    STRAY[what](root / "model")
    text = await refused(puller, root / "model", kind)
    assert next(entry.name for entry in (root / "model").iterdir()) in text
    assert left() == set()


@pytest.mark.parametrize("kind", ["pipe", "socket"])
async def test_special_files_are_refused_without_waiting(puller, root, kind):
    """Special files are refused without opening them, because opening a pipe would wait forever for a writer."""
    if kind == "pipe":
        os.mkfifo(root / "special")
    else:
        _socket(root)
    await refused(puller, root / "special", PullErrorKind.BAD_REQUEST)


async def test_devices_are_refused(tmp_path):
    """Devices are refused, even if the operator names /dev as a root."""
    puller = Puller(directory=tmp_path / "models", file_roots=[Path("/dev")])
    await refused(puller, "/dev/zero", PullErrorKind.BAD_REQUEST)
    await puller.close()


async def test_no_roots_no_files(tmp_path):
    """Without a root, nothing is read, and the error names the option."""
    puller = Puller(directory=tmp_path / "models")
    assert "--file-root" in await refused(puller, "/etc/hostname", PullErrorKind.FORBIDDEN)
    await puller.close()


async def test_too_large(puller, root, left):
    """A sparse file over the limit is refused, and nothing is left of it."""
    with (root / "huge").open("wb") as file:
        file.truncate(33 * 2**20)
    await refused(puller, root / "huge", PullErrorKind.TOO_LARGE)
    assert left() == set()


async def test_more_than_the_disk_holds(puller, root, left, monkeypatch):
    """If the disk lacks room for a file beside its reserve, the pull is refused with DISK_FULL, and leaves nothing."""
    (root / "a").write_bytes(b"x")
    monkeypatch.setattr(puller._disk, "_reserve_bytes", 2**62)
    await refused(puller, root / "a", PullErrorKind.DISK_FULL)
    assert left() == set()


@pytest.mark.parametrize("change", ["grown", "shrunk", "rewritten"])
async def test_a_file_that_changes_while_it_is_copied(puller, root, left, monkeypatch, change):
    """A file that changes while it is copied is refused, because the copy would mix two versions. A retry is
    allowed."""
    monkeypatch.setattr(local, "_SMALL", 0)
    path = root / "a"
    path.write_bytes(b"x" * 1000)
    original = os.copy_file_range

    def while_copying(source, target, count, source_at, target_at):
        copied = original(source, target, min(count, 500), source_at, target_at)
        if change == "grown":
            with path.open("ab") as file:
                file.write(b"more")
        elif change == "shrunk":
            os.truncate(path, 500)
        else:
            path.write_bytes(b"y" * 1000)
            os.utime(path, ns=(1, 1))
        return copied

    monkeypatch.setattr(os, "copy_file_range", while_copying)
    await refused(puller, path, PullErrorKind.CHANGED)
    assert PullErrorKind.CHANGED.nature is Nature.PASSING
    assert left() == set()


async def test_a_copy_that_broke_off_begins_where_the_file_begins(tmp_path, root, monkeypatch):
    """When a failing mount breaks off a copy, the retry starts at the file's beginning, and the copy is complete."""
    content = bytes(range(256)) * 4000
    (root / "a").write_bytes(content)
    original, failures = os.copy_file_range, iter([False, True])

    def fails_once(source, target, count, *at):
        if next(failures, False):
            raise OSError(errno.ESTALE, "Stale file handle")
        return original(source, target, min(count, 100_000), *at)

    monkeypatch.setattr(os, "copy_file_range", fails_once)
    puller = Puller(directory=tmp_path / "m", file_roots=[root], retries=retry.RetryPolicy(first_pause=0.001))
    puller.sweep()
    pulled = await puller.pull(Source(str(root / "a")), into="id")
    assert pulled.path.read_bytes() == content
    assert puller.statistics().retries == 1
    await puller.close()


@pytest.mark.parametrize("answer", ["EXDEV", 0], ids=["refused", "nothing copied"])
async def test_mounts_that_cannot_copy_ranges(puller, root, monkeypatch, answer):
    """A file on a mount that cannot copy ranges in the kernel is copied by reading and writing."""
    monkeypatch.setattr(local, "_SMALL", 0)

    def cannot(source, target, count, source_at, target_at):
        if answer:
            raise OSError(18, "Invalid cross-device link")
        return 0

    monkeypatch.setattr(os, "copy_file_range", cannot)
    content = os.urandom(3 * 2**20)
    (root / "a").write_bytes(content)
    assert (await puller.pull(Source(str(root / "a")), into="id")).path.read_bytes() == content


async def test_an_exchange_after_the_check_is_noticed(tmp_path, root, secret):
    """A folder that is replaced by a link after the check gains nothing, because the kernel reports which file was
    really opened."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a").write_bytes(b"secret")
    (root / "model").mkdir()
    (root / "model" / "a").write_bytes(b"public")
    provider = LocalProvider([root])
    location = locate(str(root / "model" / "a"))
    file = (await provider.listing(location)).files[0]
    (root / "model").rename(root / "former")
    (root / "model").symlink_to(outside)
    sink = Sink(tmp_path / "copy", shown="a", limits=PullLimits(), admit=lambda size: None)
    with pytest.raises(PullError) as caught:
        await provider.read(location, file, sink)
    sink.close()
    await provider.close()
    assert caught.value.kind is PullErrorKind.FORBIDDEN
    assert not (tmp_path / "copy").read_bytes()


async def test_a_cancelled_pull_leaves_nothing(puller, root, left, monkeypatch):
    """A pull that is cancelled in the middle of a copy stops its thread and removes its temporary folder."""
    monkeypatch.setattr(local, "_SMALL", 0)
    (root / "a").write_bytes(b"x" * 100)
    copying, go_on = threading.Event(), threading.Event()

    def slowly(source, target, count, source_at, target_at):
        copying.set()
        go_on.wait(10)
        return os.write(target, os.read(source, 1))

    monkeypatch.setattr(os, "copy_file_range", slowly)
    task = asyncio.create_task(puller.pull(Source(str(root / "a")), into="id"))
    await until(copying.is_set)
    assert left() != set()
    task.cancel()
    asyncio.get_running_loop().call_later(0.01, go_on.set)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert left() == set()
    assert puller.statistics().cancelled == 1
    assert puller.statistics().in_progress == 0


async def test_a_mount_that_hangs_does_not_hold_a_cancelled_pull(puller, root, left, monkeypatch):
    """A cancelled pull returns and removes its folder even if the mount hangs."""
    monkeypatch.setattr(local, "_CANCEL_WAIT", 0.01)
    (root / "a").write_bytes(b"x")
    hanging, go_on = threading.Event(), threading.Event()
    real_stat = os.stat

    def hangs(path, *args, **kwargs):
        if str(path) == str(root / "a"):
            hanging.set()
            go_on.wait(10)
        return real_stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", hangs)
    task = asyncio.create_task(puller.pull(Source(str(root / "a")), into="id"))
    await until(hanging.is_set)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert left() == set()
    go_on.set()


@settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    elements=st.lists(
        st.sampled_from(["..", ".", "", "a", "sub", "link", "%2e%2e", "~", "\\..", "\udcff"]), min_size=1, max_size=6
    ),
    uri=st.booleans(),
    into=st.text(max_size=20) | st.sampled_from(["../../x", "/x", "..", "."]),
)
async def test_no_path_writes_outside_and_none_reads_outside(tmp_path, root, elements, uri, into):
    """For any path and any id, only the puller's directory changes, and only bytes from under the root are returned."""
    outside = tmp_path / "a"
    outside.write_bytes(b"secret")
    (root / "sub").mkdir(exist_ok=True)
    for path in (root / "a", root / "sub" / "a"):
        path.write_bytes(b"public")
    if not (root / "link").is_symlink():
        (root / "link").symlink_to("..")
    puller = Puller(directory=tmp_path / "models", file_roots=[root])

    def others() -> dict[str, int]:
        return {
            str(path): path.lstat().st_mtime_ns
            for path in tmp_path.rglob("*")
            if not path.is_relative_to(puller.directory)
        }

    before = others()
    path = f"{root}/" + "/".join(elements)
    try:
        pulled = await puller.pull(Source(f"file://{path}" if uri else path), into=into)
    except PullError:
        pass
    else:
        assert pulled.path.resolve().parent.parent == puller.directory
        files = [pulled.path] if pulled.path.is_file() else [p for p in pulled.path.rglob("*") if p.is_file()]
        assert all(file.read_bytes() == b"public" for file in files)
    finally:
        await puller.close()
    assert others() == before
