"""The decision whether a change of a pod's figures is worth publishing in etcd.

Every router gets every change, so small changes are held back; placement ranks pods in coarse buckets anyway. The
thresholds are similar to ModelMesh's, but lower, because Mesh's watches are cheap.
"""

from dataclasses import dataclass

from mesh.schema.records import PodRecord

GAP = 2.0
"""Minimum seconds between two publications of figures. Changes that are `urgent` are published immediately."""

REFRESH = 60.0
"""Seconds after which any difference at all is published."""

DISK_GAP = 10.0
"""Minimum seconds between two publications if only the models on disk have changed. The list takes kilobytes, and only
decides between otherwise equal pods."""

_USED = 0.05  # of the capacity
_COPIES = 0.10
_IDLE_MS, _IDLE = 20_000, 1 / 8
_RATE, _RATE_SHARE = 100, 0.10
_LOADS = 3


@dataclass(frozen=True, slots=True)
class Published:
    """The record in etcd, and the time at which it was written, in seconds of the monotonic clock."""

    record: PodRecord
    at: float


def coarse_age_ms(seconds: float) -> int:
    """Returns a pod's age as it is published: to the minute in its first hour, when a rollout may be under way, then to
    the hour. Otherwise an idle pod would publish a new age every minute."""
    step = 60 if seconds < 3600 else 3600
    return int(seconds // step) * step * 1000


def urgent(before: PodRecord, now: PodRecord) -> bool:
    """Returns whether the change affects where calls and loads may be sent."""
    return (
        before.state,
        before.data_address,
        before.control_address,
        before.probe_address,
        before.labels,
        before.zone,
        before.capacity_bytes,
        before.device_capacity_bytes,
        before.secrets,
    ) != (
        now.state,
        now.data_address,
        now.control_address,
        now.probe_address,
        now.labels,
        now.zone,
        now.capacity_bytes,
        now.device_capacity_bytes,
        now.secrets,
    )


def worth_telling(published: Published, now: PodRecord, at: float) -> bool:
    """Returns whether to publish `now`, at the time `at`, in place of the published record."""
    before = published.record
    if before == now:
        return False
    if urgent(before, now):
        return True
    elapsed = at - published.at
    if elapsed < GAP:
        return False
    if elapsed >= REFRESH:
        return True
    if elapsed >= DISK_GAP and now.disk != before.disk:
        return True
    if abs(now.used_bytes - before.used_bytes) >= _USED * now.capacity_bytes:
        return True
    if abs(now.device_used_bytes - before.device_used_bytes) > _USED * now.device_capacity_bytes:
        return True
    if abs(now.observed_bytes - before.observed_bytes) >= _USED * now.capacity_bytes:
        return True
    if (now.factor, now.unobserved) != (before.factor, before.unobserved):
        return True
    if abs(now.copies - before.copies) > _COPIES * before.copies:
        return True
    if abs(now.oldest_idle_ms - before.oldest_idle_ms) >= max(_IDLE_MS, _IDLE * before.oldest_idle_ms):
        return True
    if now.oldest_unused != before.oldest_unused:
        return True
    if abs(now.rate - before.rate) >= max(_RATE, _RATE_SHARE * before.rate):
        return True
    return _loads_matter(before, now)


def _loads_matter(before: PodRecord, now: PodRecord) -> bool:
    was, is_ = before.loads_in_progress, now.loads_in_progress
    threads = now.loading_threads
    return bool(was) != bool(is_) or (was > threads) != (is_ > threads) or abs(is_ - was) >= _LOADS
