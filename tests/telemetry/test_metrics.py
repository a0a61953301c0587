import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import parser

from mesh.telemetry import metrics


def parsed(snapshot):
    """Parses a rendered snapshot with Prometheus' own parser. Returns {(sample name, sorted labels): value}."""
    families = parser.text_string_to_metric_families(metrics.render(snapshot).decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_names_come_out_exactly_as_given():
    registry = metrics.Registry()
    registry.counter("modelmesh_loadmodel_failure", "Failed loads.").inc(2)
    text = metrics.render(registry.snapshot()).decode()
    assert "# TYPE modelmesh_loadmodel_failure counter\nmodelmesh_loadmodel_failure 2\n" in text


def test_histogram_is_cumulative_with_float_bounds():
    registry = metrics.Registry()
    histogram = registry.histogram("h_ms", "Time.", metrics.BUCKETS_MS, ["method"])
    child = histogram.labels("Infer")
    for value in (0.5, 1.5, 2000, 1e9):  # 2000 is a bound, and counts in the bucket that ends there
        child.observe(value)
    samples = parsed(registry.snapshot())
    at = lambda le: samples["h_ms_bucket", (("le", le), ("method", "Infer"))]  # noqa: E731
    assert [at("0.5"), at("1.0"), at("2.0"), at("1000.0"), at("2000.0"), at("+Inf")] == [1, 1, 2, 2, 3, 4]
    assert samples["h_ms_count", (("method", "Infer"),)] == 4
    assert samples["h_ms_sum", (("method", "Infer"),)] == pytest.approx(1e9 + 2002)


@given(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8")))
def test_any_label_value_and_help_survives_the_format(value, help_text):
    registry = metrics.Registry()
    registry.gauge("g", help_text.replace("\r", ""), ["model"]).labels(value).set(1.5)
    line = metrics.render(registry.snapshot()).decode()
    if len(line.splitlines()) == 3:  # the parser splits at characters that Prometheus does not split at
        assert parsed(registry.snapshot())["g", (("model", value),)] == 1.5
    assert line.count("\n") == 3


def test_merge_adds_up_counters_and_histograms_and_gauges_as_they_say():
    one, two = metrics.Registry(), metrics.Registry()
    for registry, n in ((one, 1), (two, 10)):
        registry.counter("c", "", ["m"]).labels("x").inc(n)
        registry.counter("c", "", ["m"]).labels(f"only{n}").inc(n)
        registry.histogram("h", "", [1, 5]).observe(n)
        registry.gauge("in_flight", "").set(n)
        registry.gauge("highest", "", merge="max").set(n)
        registry.gauge("lowest", "", merge="min").set(n)
    snapshots = [json.loads(json.dumps(registry.snapshot())) for registry in (one, two)]
    samples = parsed(metrics.merge(snapshots))
    assert samples["c_total", (("m", "x"),)] == 11  # the parser's own name for a counter
    assert samples["c_total", (("m", "only1"),)] == 1
    assert samples["c_total", (("m", "only10"),)] == 10
    assert (samples["in_flight", ()], samples["highest", ()], samples["lowest", ()]) == (11, 10, 1)
    assert [samples["h_bucket", (("le", le),)] for le in ("1.0", "5.0", "+Inf")] == [1, 1, 2]
    assert samples["h_sum", ()] == 11


def test_merge_leaves_its_inputs_alone():
    registry = metrics.Registry()
    registry.histogram("h", "", [1]).observe(2)
    snapshot = registry.snapshot()
    before = json.dumps(snapshot)
    metrics.merge([snapshot, registry.snapshot(), snapshot])
    assert json.dumps(snapshot) == before


def test_merge_leaves_out_a_metric_of_another_shape():
    one, two = metrics.Registry(), metrics.Registry()
    one.histogram("h", "", [1, 2]).observe(1)
    two.histogram("h", "", [1, 3]).observe(1)
    assert parsed(metrics.merge([one.snapshot(), two.snapshot()]))["h_count", ()] == 1


def test_series_are_bounded_whatever_clients_send():
    registry = metrics.Registry()
    counter = registry.counter("c", "", ["method", "code"])
    for index in range(metrics.MAX_SERIES + 50):
        counter.labels(f"m{index}", "OK").inc()
    series = registry.snapshot()["metrics"][0]["series"]
    assert len(series) == metrics.MAX_SERIES + 1
    assert [["other", "other"], 50] in series


def test_same_name_is_the_same_metric_and_must_be_of_the_same_kind():
    registry = metrics.Registry()
    assert registry.counter("x", "", ["a"]) is registry.counter("x", "", ["a"])
    with pytest.raises(ValueError, match="x already exists"):
        registry.gauge("x", "", ["a"])
    with pytest.raises(ValueError, match="x already exists"):
        registry.counter("x", "", ["b"])
    with pytest.raises(ValueError, match="labels"):
        registry.counter("x", "", ["a"]).labels("1", "2")


def test_a_gauge_may_follow_a_function():
    registry = metrics.Registry()
    values = [3.0]
    registry.gauge("g", "").follow(lambda: values[0])
    values[0] = 7.0
    assert parsed(registry.snapshot())["g", ()] == 7.0


def test_a_forgotten_series_is_gone():
    registry = metrics.Registry()
    gauge = registry.gauge("g", "", ["pod"])
    gauge.labels("a").set(1)
    gauge.forget("a")
    assert registry.snapshot()["metrics"][0]["series"] == []


def test_quantiles_lie_inside_the_bucket():
    child = metrics.Distribution((10.0, 20.0, 40.0))
    assert child.quantile(0.5) == 0.0
    for _ in range(50):
        child.observe(15)
    for _ in range(50):
        child.observe(30)
    assert child.quantile(0.5) == pytest.approx(20)
    assert child.quantile(0.25) == pytest.approx(15)
    assert child.quantile(0.99) == pytest.approx(39.6)
    child.observe(1e6)
    assert child.quantile(1.0) == 40.0  # beyond the last bound only the bound itself is known


def test_process_metrics_carry_the_process_and_the_usual_names():
    samples = parsed(metrics.Registry("worker-1").snapshot())
    label = (("process", "worker-1"),)
    assert 1e6 < samples["process_resident_memory_bytes", label] < 1e12
    assert samples["process_cpu_seconds_total", label] > 0
    assert samples["process_open_fds", label] >= 3
    assert samples["process_start_time_seconds", label] > 1.6e9


def test_process_metrics_of_two_processes_stay_apart_in_a_merge():
    merged = metrics.merge([metrics.process_snapshot("a"), metrics.process_snapshot("b", os.getpid())])
    samples = parsed(merged)
    assert ("process_resident_memory_bytes", (("process", "a"),)) in samples
    assert ("process_resident_memory_bytes", (("process", "b"),)) in samples


def test_a_process_that_has_gone_has_no_metrics():
    assert metrics.process_snapshot("gone", 2**22 + 1) == {"metrics": []}


@pytest.mark.parametrize("buckets", [[], [2, 1], [1, 1]])
def test_buckets_must_ascend(buckets):
    with pytest.raises(ValueError, match="ascend"):
        metrics.Registry().histogram("h", "", buckets)
