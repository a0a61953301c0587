"""Capacities that fit into the memory of the container, of a parent group, or of the machine."""

import pytest
from typer.testing import CliRunner

from mesh.host import memory
from mesh.host.memory import Whole
from mesh.runtime.__main__ import app
from mesh.runtime.cache.evictions import capacity
from mesh.runtime.cache.evictions.memory import EVICT

GiB, MiB = 1 << 30, 1 << 20


@pytest.mark.parametrize("there", [512 * MiB, GiB, 4 * GiB, 64 * GiB])
def test_what_is_taken_fits(there):
    """At any accepted capacity, agent and server fit into the container, and a full cache stays below the eviction
    limit. The capacity that `auto` chooses is not larger than the largest accepted one."""
    whole = Whole(there, "the container")
    taken = 0
    for models in range(0, 2 * there, there // 64):
        try:
            limit = capacity.server_limit(models, whole)
        except ValueError:
            continue
        taken = max(taken, models)
        assert limit + capacity.AGENT <= there
        assert models + capacity.SERVER <= EVICT * limit
    assert taken >= capacity.auto_capacity(there)


def test_a_capacity_with_room_beside_it_has_the_usual_limit():
    assert capacity.server_limit(GiB, Whole(4 * GiB, "the container")) == capacity.limit(GiB)
    assert capacity.server_limit(GiB, None) == capacity.limit(GiB)


@pytest.mark.parametrize(
    ("whole", "says"),
    [
        (Whole(GiB, "the container"), ["2.0 GiB", "the container has 1.0 GiB", "limit to 2.4 GiB", "or use auto"]),
        (Whole(GiB, "the machine"), ["2.0 GiB", "the machine has 1.0 GiB", "use a larger machine, or use auto"]),
        (Whole(100 * MiB, "the container"), ["the container has 100 MiB", "too little for any model: raise"]),
    ],
)
def test_more_than_there_is_is_refused(whole, says, monkeypatch):
    """The error about a capacity that is too large names the memory that exists, and a way out."""
    monkeypatch.setattr(memory, "whole", lambda: whole)
    result = CliRunner().invoke(app, ["--capacity", "2GiB"], env={"COLUMNS": "400"})
    assert result.exit_code == 2
    text = " ".join(result.output.replace("│", " ").split())
    for part in ["--capacity", *says]:
        assert part in text


@pytest.mark.parametrize("size", [128 * MiB, 192 * MiB, 256 * MiB])
def test_a_container_too_small_for_any_pod_is_refused(size):
    """The error about a container that is too small names the available and the required memory. A container with 1 MiB
    more than required is accepted."""
    with pytest.raises(ValueError, match=f"has {size // MiB} MiB in all, and a pod needs 282 MiB") as error:
        capacity.check_least(Whole(size, "the container"))
    assert "raise the container's memory limit to 282 MiB" in str(error.value)
    capacity.check_least(Whole(283 * MiB, "the container"))
    capacity.check_least(None)


@pytest.mark.parametrize("size", [283 * MiB, 300 * MiB, 512 * MiB])
def test_the_least_capacity_fits_where_it_is_not_refused(size):
    there = Whole(size, "the container")
    capacity.check_least(there)
    assert capacity.server_limit(capacity.AUTO_LEAST, there) + capacity.AGENT <= size


def test_automatic_capacity_is_refused_at_the_start_in_a_small_container(monkeypatch):
    monkeypatch.setattr(memory, "whole", lambda: Whole(192 * MiB, "the container"))
    result = CliRunner().invoke(app, ["--capacity", "auto"])
    assert result.exit_code == 2
    assert "192 MiB" in result.output
    assert "282 MiB" in result.output


def test_a_full_cache_is_below_the_limits() -> None:
    """From 1 MiB to 256 GiB, a full cache stays below the eviction limit, even with the 100 MiB that the server itself
    needs."""
    for models in (1 << 20, 64 << 20, 1 << 30, 16 << 30, 256 << 30):
        assert models + (100 << 20) < EVICT * capacity.limit(models)


def test_the_automatic_capacity_fits() -> None:
    for available in (1 << 30, 4 << 30, 64 << 30):
        assert capacity.limit(capacity.auto_capacity(available)) == capacity.auto_limit(available) <= available
    assert capacity.auto_capacity(0) == 64 << 20


def test_a_small_container_is_not_planned_beyond_what_it_has() -> None:
    """In a small container, the automatic capacity is at least the minimum, and agent and model server still fit."""
    for available in (400 << 20, 512 << 20, 640 << 20, 768 << 20):
        assert capacity.auto_capacity(available) >= 64 << 20
        assert capacity.auto_limit(available) + (90 << 20) < available


@pytest.mark.parametrize(
    ("wanted", "used", "models"),
    [
        pytest.param(950, 0, 950, id="all that the watch leaves alone"),
        pytest.param(900, 50, 900, id="what others leave of that"),
        pytest.param(951, 0, None, id="more than the watch leaves alone"),
        pytest.param(901, 50, None, id="more than others leave"),
        pytest.param(1, 990, None, id="nothing left"),
        pytest.param(0, 945, None, id="nothing left, and none asked for"),
    ],
)
def test_capacity_of_a_device(wanted: int, used: int, models: int | None) -> None:
    """The capacity and the memory that others use may together take 95 % of the device's memory, because copies are
    evicted above that limit."""
    if models is None:
        with pytest.raises(ValueError, match=r"requested for models, but of the device's|use --device cpu"):
            capacity.device_capacity(wanted << 20, used << 20, 1000 << 20)
    else:
        assert capacity.device_capacity(wanted << 20, used << 20, 1000 << 20) == models << 20
        assert 0 < capacity.device_capacity(0, used << 20, 1000 << 20) < models << 20
