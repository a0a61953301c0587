"""`mesh pods` and `mesh top`, the live view."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.cli import output
from mesh.cli.top import Sample, compare

POD = {
    "pod": "pod-1",
    "state": "ready",
    "labels": ["cpu"],
    "zone": "a",
    "capacity": 2**30,
    "used": 2**29,
    "oldest_idle_ms": 90_000,
    "copies": 3,
    "loading": 1,
    "threads": 2,
    "rate": 1200,
    "suspect": False,
}
DESCRIBED = {
    "pod": "pod-1",
    "state": "ready",
    "incarnation": "abc",
    "used_bytes": "536870912",  # protobuf writes 64-bit numbers as texts
    "capacity_bytes": 2**30,
    "resident_bytes": 2**28,
    "copies": [{"model_id": "m[1]", "state": "loaded", "host_bytes": 4096, "calls": "17", "idle_ms": 1500}],
    "counters": {"evictions": "2"},
}


def test_pods_are_listed(mesh, run):
    """`mesh pods` lists pods with the memory in use, and marks suspect ones."""
    mesh.answer("/mesh/v1/pods", {"pods": [POD, {**POD, "pod": "pod-2", "suspect": True}]})
    result = run("pods")
    assert result.exit_code == 0, result.stderr
    one, two = result.stdout.splitlines()[1:]
    for text in ("pod-1", "512 MiB", "1.0 GiB", "50 %", "1200", "90 s ago", "cpu zone=a"):
        assert text in one
    assert "suspect" in two
    assert json.loads(run("pods", "--json").stdout)["pods"][0] == POD


def test_pods_beside_a_foreign_server_show_its_memory(mesh, run):
    """For pods with a foreign server, `mesh pods` shows the observed memory and the factor. `mesh pods NAME` also shows
    the sum of sizes and the observed processes, or the reason why nothing is observed."""
    seen = {**POD, "observed": 2**28, "factor": 1.3, "unobserved": ""}
    unseen = {**POD, "pod": "pod-2", "observed": 0, "factor": 1.0, "unobserved": "it runs on another machine"}
    mesh.answer("/mesh/v1/pods", {"pods": [seen, unseen, {**POD, "pod": "pod-3"}]})
    head, one, two, three = run("pods").stdout.splitlines()
    assert "OBSERVED" in head
    assert "256 MiB" in one
    assert "1.3" in one
    assert " no " in two
    assert "1.0 GiB" in three
    described = {**DESCRIBED, "observed_bytes": str(2**28), "accounted_bytes": "1024", "factor": 1.25}
    mesh.answer("/mesh/v1/pods/pod-1", {**described, "observed": "process 7 and its children", "unobserved": ""})
    shown = run("pods", "pod-1").stdout
    assert "1.0 KiB by their sizes, factor 1.25, 256 MiB observed (process 7 and its children)" in shown
    mesh.answer("/mesh/v1/pods/pod-1", {**described, "unobserved": "it runs on another machine"})
    assert "not observed: it runs on another machine" in run("pods", "pod-1").stdout


def test_one_pod_is_shown_with_what_it_holds(mesh, run):
    """`mesh pods NAME` shows the pod's memory, its copies with their last use, and its evictions."""
    mesh.answer("/mesh/v1/pods/pod-1", DESCRIBED)
    result = run("pods", "pod-1")
    assert result.exit_code == 0, result.stderr
    for text in ("512 MiB of 1.0 GiB used", "m[1]", "4.0 KiB", "17", "1.5 s ago", "evictions 2"):
        assert text in result.stdout


def test_one_pod_is_forgotten_or_shown_but_never_two(mesh, run):
    mesh.answer("/mesh/v1/pods/pod-1/lives", {"incarnations": ["a", "b"]})
    result = run("pods", "forget", "pod-1")
    assert (result.exit_code, result.stderr.strip()) == (0, "forgot pod-1 (incarnation a, b)")
    result = run("pods", "pod-1", "pod-2")
    assert result.exit_code == 2
    assert "this command shows one pod" in result.stderr


def test_what_was_never_called_has_no_use(mesh, run):
    """A copy that was never called shows no last use, although its idle time counts from its load."""
    mesh.answer("/mesh/v1/pods", {"pods": [{**POD, "oldest_unused": True, "oldest_idle_ms": 3_600_000}]})
    (line,) = run("pods").stdout.splitlines()[1:]
    assert "not used yet" in line
    assert "1.0 h" not in line
    copies = [
        {"model_id": "fresh", "state": "loaded", "idle_ms": 3_600_000},
        {"model_id": "called", "state": "loaded", "idle_ms": 1500, "calls": 1},
        {"model_id": "first", "state": "loaded", "idle_ms": 0, "in_flight": 1},
    ]
    mesh.answer("/mesh/v1/pods/pod-1", {**DESCRIBED, "copies": copies})
    lines = run("pods", "pod-1").stdout.splitlines()
    assert sum("not used yet" in line for line in lines) == 1
    assert any("fresh" in line and "not used yet" in line for line in lines)


def test_no_pods_is_said(mesh, run):
    """Without pods, `mesh pods` succeeds, and says so on standard error."""
    mesh.answer("/mesh/v1/pods", {"pods": []})
    result = run("pods")
    assert result.exit_code == 0
    assert "no runtime pods" in result.stderr


@pytest.fixture
def busy(mesh):
    """A mesh whose counters grow between any two samples."""
    counts = iter(range(100))

    def stats():
        from aiohttp import web

        number = next(counts)
        return web.json_response(
            {
                "calls": {"ModelInfer": {"OK": 100 * number, "NOT_FOUND": number}},
                "hits": 90 * number,
                "cold_starts": 10 * number,
                "loads": 5 * number,
                "latency_ms": {"hit": {"p50": 0.4, "p90": 1, "p99": 2, "count": 90}},
                "resident": 3,
            }
        )

    mesh.answer("/mesh/v1/stats", make=stats)
    mesh.answer("/mesh/v1/pods", {"pods": [POD]})
    mesh.answer("/mesh/v1/pods/pod-1", DESCRIBED)
    return mesh


def test_top_shows_one_frame_for_scripts(busy, run):
    """With --once, `mesh top` prints one frame, as JSON or as text without control characters."""
    frame = json.loads(run("top", "--once", "--json", "-i", "0.2").stdout)
    assert frame["hit_rate"] == 0.9
    assert 0 < frame["errors_per_second"] < frame["calls_per_second"]
    assert frame["hottest"] == []  # no calls between the two samples
    text = run("top", "--once", "-i", "0.2").stdout
    assert "hit rate 90.0 %" in text
    assert "400 µs" in text or "0.4 ms" in text
    assert "\x1b" not in text


def test_top_says_where_nothing_answers(run):
    assert run("top", "--once", "--endpoint", "http://127.0.0.1:9").exit_code == 4


def test_top_draws_a_pod_that_does_not_describe_itself(busy, run):
    """`mesh top` succeeds if a pod does not answer, because it must work for a mesh in trouble."""
    from tests.cli.conftest import failure

    busy.answer("/mesh/v1/pods/pod-1", make=lambda: failure(503, "UNAVAILABLE", "pod-1 does not answer"))
    assert run("top", "--once", "-i", "0.2").exit_code == 0


def sample(at, *, ok=0, failed=0, hits=0, cold=0, calls=None):
    stats = {"calls": {"x": {"OK": ok, "INTERNAL": failed}}, "hits": hits, "cold_starts": cold}
    return Sample(at, stats, (), calls or {})


def test_rates_are_differences_over_time():
    before = sample(10.0, ok=100, failed=1, hits=50, cold=50, calls={"a": 10, "b": 5})
    after = sample(14.0, ok=180, failed=5, hits=90, cold=60, calls={"a": 50, "b": 5, "new": 8})
    frame = compare(before, after)
    assert (frame.calls, frame.errors, frame.hit_rate) == (21.0, 1.0, 0.8)
    assert frame.hottest == (("a", 10.0), ("new", 2.0))


@given(st.integers(0, 10**9), st.integers(0, 10**9), st.floats(0, 100))
def test_no_rate_is_ever_negative(one, other, seconds):
    """Rates are never negative, even if another router answers the second time or the router has restarted."""
    before = sample(0.0, ok=one, failed=other, hits=one, calls={"a": one})
    after = sample(seconds, ok=other, failed=one, hits=other, calls={"a": other})
    frame = compare(before, after)
    assert min(frame.calls, frame.errors, frame.hits, *(rate for _, rate in frame.hottest), 0) >= 0
    assert frame.hit_rate is None or 0 <= frame.hit_rate <= 1


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [
        (0.4, "0.4 ms"),
        (12, "12 ms"),
        (1500, "1.5 s"),
        (90_000, "90 s"),
        (600_000, "10 min"),
        (8e6, "2 h"),
        (1e9, "12 d"),
    ],
)
def test_durations_read_well(milliseconds, text):
    assert output.duration(milliseconds) == text


@pytest.mark.parametrize("nothing", [None, -1, "x"])
def test_what_is_no_duration_is_left_out(nothing):
    """A value that is not a duration, such as one from a mesh of another version, is omitted."""
    assert output.duration(nothing) == ""
