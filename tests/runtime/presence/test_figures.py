"""Changes of a pod's figures that are worth publishing."""

from dataclasses import replace

import pytest

from mesh.runtime.presence.figures import GAP, REFRESH, Published, coarse_age_ms, worth_telling
from mesh.schema.records import LEAVING, PodRecord

BASE = PodRecord(
    "life", "a:1", "a:2", capacity_bytes=1000, used_bytes=500, copies=100, oldest_idle_ms=1_000_000, loading_threads=4
)


@pytest.mark.parametrize(
    ("change", "elapsed", "told"),
    [
        pytest.param({}, REFRESH * 10, False, id="nothing"),
        pytest.param({"state": LEAVING}, 0.0, True, id="leaving-at-once"),
        pytest.param({"data_address": "b:1"}, 0.0, True, id="address-at-once"),
        pytest.param({"used_bytes": 900}, GAP / 2, False, id="not-too-often"),
        pytest.param({"used_bytes": 549}, GAP, False, id="used-little"),
        pytest.param({"used_bytes": 550}, GAP, True, id="used"),
        pytest.param({"used_bytes": 501}, REFRESH, True, id="anything-after-a-while"),
        pytest.param({"copies": 110}, GAP, False, id="copies-little"),
        pytest.param({"copies": 111}, GAP, True, id="copies"),
        pytest.param({"oldest_idle_ms": 1_100_000}, GAP, False, id="age-little"),
        pytest.param({"oldest_idle_ms": 0}, GAP, True, id="age"),
        pytest.param({"loads_in_progress": 1}, GAP, True, id="first-load"),
        pytest.param({"rate": 99}, GAP, False, id="rate-little"),
        pytest.param({"rate": 100}, GAP, True, id="rate"),
    ],
)
def test_what_is_worth_telling(change: dict[str, int], elapsed: float, told: bool) -> None:
    """Every router receives every change, so small changes are published later and important ones at once."""
    now = replace(BASE, **change)  # type: ignore[arg-type]
    assert worth_telling(Published(BASE, 100.0), now, 100.0 + elapsed) is told


def test_loads_are_told_when_the_pod_begins_to_queue_them() -> None:
    loading = replace(BASE, loads_in_progress=3)
    published = Published(loading, 0.0)
    assert not worth_telling(published, replace(loading, loads_in_progress=4), GAP)
    assert worth_telling(published, replace(loading, loads_in_progress=5), GAP)


def test_an_idle_pod_does_not_tell_its_age_every_minute() -> None:
    """An idle pod publishes its age to the minute while a rollout may be under way, and to the hour afterwards."""
    assert [coarse_age_ms(seconds) for seconds in (0, 59, 61, 3599)] == [0, 0, 60_000, 59 * 60_000]
    assert [coarse_age_ms(seconds) for seconds in (3600, 7199, 90_000)] == [3_600_000, 3_600_000, 90_000_000]
