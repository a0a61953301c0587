"""Counts of calls by method and code, whatever method names clients send."""

from mesh.statuses import Code
from mesh.telemetry import metrics
from router.calls import meter


def counts(registry):
    """Returns the counted calls by method and code."""
    (found,) = [m for m in registry.snapshot()["metrics"] if m["name"] == "modelmesh_api_request_milliseconds"]
    return {tuple(labels): sum(value[0]) for labels, value in found["series"]}


def test_invented_methods_are_counted_together_and_crowd_out_no_real_one():
    registry = metrics.Registry()
    calls = meter.Meter(registry)
    calls.call("ModelInfer", Code.OK, 1.0, 10, 20)
    before = len(metrics.render(registry.snapshot()))
    for number in range(20_000):
        calls.call(f"invented{number}", (Code.UNIMPLEMENTED, Code.NOT_FOUND)[number % 2], 1.0, 10)
    calls.call("n" * 60_000, Code.INVALID_ARGUMENT, 1.0, 10)
    calls.call("ModelReady", Code.OK, 1.0, 10, 20)
    calls.call("predict", Code.OK, 1.0, 10, 20)
    calls.call("predict", Code.INTERNAL, 1.0, 10)
    assert counts(registry) == {
        ("ModelInfer", "OK"): 1,
        ("other", "UNIMPLEMENTED"): 10_000,
        ("other", "NOT_FOUND"): 10_000,
        ("other", "INVALID_ARGUMENT"): 1,
        ("ModelReady", "OK"): 1,
        ("predict", "OK"): 1,
        ("predict", "INTERNAL"): 1,
    }
    assert len(metrics.render(registry.snapshot())) < 10 * before


def test_what_a_server_answers_to_everything_stays_bounded_too():
    registry = metrics.Registry()
    calls = meter.Meter(registry)
    for number in range(1000):
        calls.call(f"m{number}", Code.OK, 1.0, 10, 20)
    assert len(counts(registry)) == meter.MAX_METHODS + 1
    assert sum(counts(registry).values()) == 1000
    assert len(calls._known) <= (meter.MAX_METHODS + 4) * len(Code)
