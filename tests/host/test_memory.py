"""Total and available memory, from the machine, the container's limit and the limits of groups above it."""

import pytest

from mesh.host import memory

GiB = 1 << 30


@pytest.fixture
def machine(tmp_path):
    """Returns a function that finds the memory of an 8 GiB machine with given cgroup limits."""
    (tmp_path / "meminfo").write_text("MemTotal: 8388608 kB\nMemAvailable: 1 kB\n")
    (tmp_path / "self").write_text("0::/pods/one\n")

    def found(**groups):
        for group, text in groups.items():
            folder = tmp_path / "cg" / group.replace("__", "/")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "memory.max").write_text(text)
        return memory.whole(meminfo=tmp_path / "meminfo", root=tmp_path / "cg", membership=tmp_path / "self")

    return found


def test_the_machine_is_the_bound_without_a_limit(machine):
    """The bound is the machine's total memory, even if little of it is free."""
    assert machine() == memory.Whole(8 * GiB, "the machine")
    assert machine(pods="max\n") == memory.Whole(8 * GiB, "the machine")


def test_the_least_limit_counts(machine):
    """The smallest of the group's limit, the limits of the groups above it, and the machine's memory applies."""
    assert machine(pods__one=f"{2 * GiB}\n") == memory.Whole(2 * GiB, "the container")
    assert machine(pods=f"{GiB}\n") == memory.Whole(GiB, "the container")
    assert machine(pods=f"{64 * GiB}\n", pods__one="nonsense") == memory.Whole(8 * GiB, "the machine")


def test_version_1(tmp_path):
    """Limits of cgroups version 1 are read, in which even "no limit" is a number."""
    group = tmp_path / "memory"
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")
    missing = tmp_path / "none"
    assert memory.whole(meminfo=missing, root=tmp_path, membership=missing) is None
    (group / "memory.limit_in_bytes").write_text(f"{GiB}\n")
    assert memory.whole(meminfo=missing, root=tmp_path, membership=missing) == memory.Whole(GiB, "the container")


def test_memory_of_a_container_is_without_what_makes_way(tmp_path):
    """Files that the kernel only caches do not count as memory in use, in both versions of cgroups. Without a limit,
    there is no result."""
    assert memory.container_bytes(cgroup=tmp_path) is None
    old = tmp_path / "memory"
    old.mkdir()
    (old / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (old / "memory.usage_in_bytes").write_text("700\n")
    assert memory.container_bytes(cgroup=tmp_path) is None
    (old / "memory.limit_in_bytes").write_text("1000\n")
    assert memory.container_bytes(cgroup=tmp_path) == 300
    (old / "memory.stat").write_text("cache 500\ntotal_inactive_file 200\ntotal_active_file 100\n")
    assert memory.container_bytes(cgroup=tmp_path) == 600
    (tmp_path / "memory.max").write_text("2000\n")
    (tmp_path / "memory.current").write_text("1500\n")
    (tmp_path / "memory.stat").write_text("anon 1\nactive_file 400\ninactive_file 0\n")
    assert memory.container_bytes(cgroup=tmp_path) == 900


def test_memory_at_hand_is_the_containers(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:    2048 kB\n")
    assert memory.available_bytes(meminfo=meminfo, cgroup=tmp_path) == 2 << 20
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("100\n")
    assert memory.available_bytes(meminfo=meminfo, cgroup=tmp_path) == 2 << 20
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory.available_bytes(meminfo=meminfo, cgroup=tmp_path) == 900
