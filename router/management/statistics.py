"""A summary of a router's metrics for people."""

from typing import Any

from mesh.telemetry import metrics


def summary(snapshot: metrics.Snapshot) -> dict[str, Any]:
    """Returns calls, hits, cold starts, loads, latencies and calls by alias, computed from a snapshot of the workers'
    metrics."""
    found = {metric["name"]: metric for metric in snapshot["metrics"]}

    def count(name: str) -> int:
        return int(sum(value for _, value in found.get(name, {}).get("series", ())))

    def latency(name: str) -> dict[str, float]:
        metric = found.get(name)
        if metric is None or not metric["series"]:
            return {"p50": 0.0, "p90": 0.0, "p99": 0.0, "count": 0}
        counts = [sum(column) for column in zip(*(value[0] for _, value in metric["series"]), strict=True)]
        quantiles = {f"p{q}": round(metrics.quantile(metric["buckets"], counts, q / 100), 3) for q in (50, 90, 99)}
        return {**quantiles, "count": sum(counts)}

    calls: dict[str, dict[str, int]] = {}
    for (method, code), value in found.get("modelmesh_api_request_milliseconds", {}).get("series", ()):
        calls.setdefault(method, {})[code] = sum(value[0])
    hit, cold = latency("mesh_hit_milliseconds"), latency("mesh_cold_milliseconds")
    errors = dict(map(_pair, found.get("mesh_alias_errors", {}).get("series", ())))
    aliases = [
        {"alias": alias, "model": model, "calls": sum(value[0]), "errors": int(errors.get((alias, model), 0))}
        for (alias, model), value in found.get("mesh_alias_milliseconds", {}).get("series", ())
    ]
    return {
        "calls": calls,
        "hits": hit["count"],
        "cold_starts": cold["count"],
        "loads": count("mesh_loads"),
        "load_failures": count("mesh_load_failures"),
        "latency_ms": {"hit": hit, "cold": cold},
        "aliases": aliases,
    }


def _pair(series: Any) -> tuple[tuple[str, str], float]:
    (alias, model), value = series
    return (alias, model), value
