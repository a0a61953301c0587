"""The conditions for any load in a pod."""

from types import SimpleNamespace

import pytest

from mesh.runtime.cache.loads.gate import Gate
from mesh.statuses import Reason


def a_gate(
    *,
    published: bool = True,
    away: str = "",
    serves: bool = True,
    why_down: str = "",
    lost: str = "",
    short: str = "",
) -> Gate:
    return Gate(
        SimpleNamespace(published=published, away=away),  # type: ignore[arg-type]
        SimpleNamespace(serves=serves, why_down=why_down),  # type: ignore[arg-type]
        SimpleNamespace(refusal=lost),  # type: ignore[arg-type]
        (SimpleNamespace(refusal=""), SimpleNamespace(refusal=short)),  # type: ignore[arg-type]
    )


def test_a_pod_where_all_is_well_takes_loads() -> None:
    assert a_gate().why_refused() is None


@pytest.mark.parametrize(
    ("trouble", "reason", "says"),
    [
        pytest.param({"published": False}, Reason.REGISTRY_AWAY, "is being published in etcd", id="not yet published"),
        pytest.param(
            {"published": False, "away": "etcd: timeout", "short": "full"},
            Reason.REGISTRY_AWAY,
            "not published in etcd: etcd: timeout",
            id="etcd away, before all else",
        ),
        pytest.param(
            {"serves": False, "why_down": "the model server was killed"},
            Reason.UNAVAILABLE,
            "the model server was killed; this pod waits for it to start again",
            id="server down",
        ),
        pytest.param({"lost": "4 threads are lost"}, Reason.UNAVAILABLE, "4 threads are lost", id="threads lost"),
        pytest.param({"short": "takes 97%"}, Reason.NO_ROOM, "takes 97%", id="memory short"),
    ],
)
def test_why_no_load_is_taken(trouble: dict[str, object], reason: Reason, says: str) -> None:
    refused = a_gate(**trouble).why_refused()  # type: ignore[arg-type]
    assert refused is not None
    assert refused.reason is reason
    assert says in refused.text
