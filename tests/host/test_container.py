"""A capacity is planned only where the memory for it is: the container's limit, a parent group's, or the machine's."""

import pytest
from typer.testing import CliRunner

from mesh.runtime import container
from mesh.runtime.__main__ import app
from mesh.runtime.cache import memory

GiB, MiB = 1 << 30, 1 << 20


@pytest.fixture
def machine(tmp_path):
    """Of 8 GiB, with cgroups as they are written: what `container` finds."""
    (tmp_path / "meminfo").write_text("MemTotal: 8388608 kB\nMemAvailable: 1 kB\n")
    (tmp_path / "self").write_text("0::/pods/one\n")

    def found(**groups):
        for group, text in groups.items():
            folder = tmp_path / "cg" / group.replace("__", "/")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "memory.max").write_text(text)
        return container.whole(meminfo=tmp_path / "meminfo", root=tmp_path / "cg", membership=tmp_path / "self")

    return found


def test_the_machine_is_the_bound_without_a_limit(machine):
    """Whatever is in use at the moment."""
    assert machine() == container.Memory(8 * GiB, "the machine")
    assert machine(pods="max\n") == container.Memory(8 * GiB, "the machine")


def test_the_least_limit_counts(machine):
    """Of the group and of those above it."""
    assert machine(pods__one=f"{2 * GiB}\n") == container.Memory(2 * GiB, "the container")
    assert machine(pods=f"{GiB}\n") == container.Memory(GiB, "the container")
    assert machine(pods=f"{64 * GiB}\n", pods__one="nonsense") == container.Memory(8 * GiB, "the machine")


def test_version_1(tmp_path):
    """Where no limit is a number too."""
    group = tmp_path / "memory"
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")
    missing = tmp_path / "none"
    assert container.whole(meminfo=missing, root=tmp_path, membership=missing) is None
    (group / "memory.limit_in_bytes").write_text(f"{GiB}\n")
    assert container.whole(meminfo=missing, root=tmp_path, membership=missing) == container.Memory(GiB, "the container")


@pytest.mark.parametrize("there", [512 * MiB, GiB, 4 * GiB, 64 * GiB])
def test_what_is_taken_fits(there):
    """Agent and server are within the container at any capacity that is not refused, a full cache stays below the share
    where copies are evicted, and what `auto` would take is never refused."""
    whole = container.Memory(there, "the container")
    taken = 0
    for capacity in range(0, 2 * there, there // 64):
        try:
            limit = container.server_limit(capacity, whole)
        except ValueError:
            continue
        taken = max(taken, capacity)
        assert limit + container.AGENT <= there
        assert capacity + container.SERVER <= memory.EVICT * limit
    assert taken >= memory.auto_capacity(there)


def test_a_capacity_with_room_beside_it_has_the_usual_limit():
    assert container.server_limit(GiB, container.Memory(4 * GiB, "the container")) == memory.limit(GiB)
    assert container.server_limit(GiB, None) == memory.limit(GiB)


@pytest.mark.parametrize(
    ("whole", "says"),
    [
        (container.Memory(GiB, "the container"), ["2.0 GiB", "the container has 1.0 GiB", "limit to 2.4 GiB"]),
        (container.Memory(GiB, "the machine"), ["2.0 GiB", "the machine has 1.0 GiB", "a larger one"]),
        (container.Memory(100 * MiB, "the container"), ["the container has 100 MiB", "too little for any"]),
    ],
)
def test_more_than_there_is_is_refused(whole, says, monkeypatch):
    """By the command, with both numbers and the way out."""
    monkeypatch.setattr(container, "whole", lambda: whole)
    result = CliRunner().invoke(app, ["--capacity", "2GiB"], env={"COLUMNS": "400"})
    assert result.exit_code == 2
    text = " ".join(result.output.replace("│", " ").split())
    for part in ["--capacity", "or say auto", *says]:
        assert part in text


@pytest.mark.parametrize("size", [128 * MiB, 192 * MiB, 256 * MiB])
def test_a_container_too_small_for_any_pod_is_refused(size):
    """With both numbers: what there is, and what it takes."""
    with pytest.raises(ValueError, match=f"has {size // MiB} MiB in all, and a pod needs 282 MiB") as error:
        container.check_least(container.Memory(size, "the container"))
    assert "raise the container's memory limit to 282 MiB" in str(error.value)
    container.check_least(container.Memory(283 * MiB, "the container"))
    container.check_least(None)


@pytest.mark.parametrize("size", [283 * MiB, 300 * MiB, 512 * MiB])
def test_the_least_capacity_fits_where_it_is_not_refused(size):
    there = container.Memory(size, "the container")
    container.check_least(there)
    assert container.server_limit(memory.AUTO_LEAST, there) + container.AGENT <= size


def test_automatic_capacity_is_refused_at_the_start_in_a_small_container(monkeypatch):
    monkeypatch.setattr(container, "whole", lambda: container.Memory(192 * MiB, "the container"))
    result = CliRunner().invoke(app, ["--capacity", "auto"])
    assert result.exit_code == 2
    assert "192 MiB" in result.output
    assert "282 MiB" in result.output
