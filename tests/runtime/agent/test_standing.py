"""Liveness of a pod without a model server."""

from types import SimpleNamespace

import pytest

from mesh.runtime.agent.standing import AgentStanding


@pytest.mark.parametrize(("down_for", "live"), [(0.0, True), (170.0, True), (190.0, False)])
def test_a_pod_without_a_server_for_minutes_is_not_live(down_for: float, live: bool) -> None:
    """After three minutes without a model server, a pod is not live. Shorter gaps are ordinary restarts."""
    server = SimpleNamespace(down_for=down_for, why_down="the model server ended with status 3")
    why = AgentStanding.why_not_live(SimpleNamespace(_server=server))
    assert why is None if live else "the model server ended with status 3" in str(why)
