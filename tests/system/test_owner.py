"""One prefix in etcd for one mesh: a mesh with another id does not start on it, and its error names the owner."""

import asyncio
import sys

import pytest

from mesh.schema import owner
from mesh.schema.keys import Keys
from tests.support.waiting import until


async def test_the_first_one_has_it(etcd, keys):
    """All processes of the first mesh share its prefix. Another mesh gets an error with both names and the way out."""
    await asyncio.gather(*(owner.claim(etcd, keys, "ns-one/mesh") for _ in range(5)))
    with pytest.raises(owner.OwnedByAnother) as error:
        await owner.claim(etcd, keys, "ns-two/mesh")
    for name in ("ns-one/mesh", "ns-two/mesh", keys.base, "mesh prefix transfer"):
        assert name in str(error.value)
    await owner.claim(etcd, keys, "")


@pytest.mark.parametrize(
    ("value", "says"),
    [(b"{", "cannot be read"), (b"[]", "cannot be read"), (b'{"install":"a","schema":99}', "version 99")],
)
async def test_what_is_not_understood_is_left_alone(etcd, keys, value, says):
    """An owner's record that cannot be read is left unchanged, because a later version of Mesh may have written it."""
    await etcd.put(keys.owner, value)
    with pytest.raises(owner.OwnedByAnother, match=says):
        await owner.claim(etcd, keys, "a")
    assert (await etcd.get(keys.owner)).value == value


@pytest.mark.parametrize("module", ["router", "mesh.runtime"])
async def test_processes_of_another_mesh_end(etcd, etcd_server, keys, module):
    """Processes of another mesh end with an error that names the owner, without a traceback. A pod does not publish
    itself."""
    await owner.claim(etcd, keys, "ns-one/mesh")
    argv = [sys.executable, "-m", module, "--etcd", etcd_server.endpoint, "--base", keys.base, "--name", "intruder"]
    argv += ["--install-id", "ns-two/mesh", "--probe", "127.0.0.1:0"]
    argv += ["--listen", "127.0.0.1:0"] if module == "router" else ["--capacity", "64MiB"]
    process = await asyncio.create_subprocess_exec(*argv, stderr=asyncio.subprocess.PIPE)
    async with asyncio.timeout(60):
        _, said = await process.communicate()
    assert process.returncode == 1
    assert b"ns-one/mesh" in said
    assert b"Traceback" not in said
    assert await etcd.get(keys.pod("intruder")) is None


async def test_processes_of_one_mesh_share_it(etcd, etcd_server):
    """A pod that starts first claims the prefix for its mesh. Another process of the same mesh may then use the
    prefix."""
    keys = Keys("test/shared")
    argv = [sys.executable, "-m", "mesh.runtime", "--etcd", etcd_server.endpoint, "--base", keys.base]
    argv += ["--install-id", "ns/mesh", "--capacity", "64MiB", "--name", "one"]
    process = await asyncio.create_subprocess_exec(*argv, stderr=asyncio.subprocess.DEVNULL)
    try:

        async def there() -> bool:
            return await etcd.get(keys.pod("one")) is not None

        await until(there, timeout=60, interval=0.1)
        await owner.claim(etcd, keys, "ns/mesh")
    finally:
        process.terminate()
        assert await process.wait() == 0
