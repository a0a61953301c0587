"""Findings about access control, from a router's statistics. All functions are pure."""

from collections.abc import Iterator, Mapping
from typing import Any

from mesh.cli.doctor.findings import Area, Finding

AREA = Area("mesh")

_CLOCK = 30.0  # seconds between the clocks of a router and an issuer


def check(stats: Mapping[str, Any], endpoint: str) -> Iterator[Finding]:
    """Yields the findings. Yields none for a router without access control, or for one that does not report its
    state."""
    auth = stats.get("auth")
    if not isinstance(auth, dict) or auth.get("mode", "off") == "off":
        return
    if endpoint.startswith("http://") and not _is_local(endpoint):
        todo = "give the routers a certificate (docs/tls.md), or end TLS in front of them"
        yield AREA.warn("auth", f"keys and tokens travel to {endpoint} without TLS: others can read them", todo)
    tokens = [one for one in auth.get("callers") or () if isinstance(one, dict) and one.get("kind") == "tokens"]
    for one in tokens:
        yield from _tokens(one)


def _tokens(one: Mapping[str, Any]) -> Iterator[Finding]:
    issuer = str(one.get("issuer") or "Kubernetes")
    what = f"tokens of {issuer}"
    trouble, reviewed = one.get("trouble"), "keys" not in one
    if trouble and (reviewed or not one.get("keys")):
        yield AREA.fail(
            "tokens", f"{what} are refused: {trouble}", "correct the cause: routers try again by themselves"
        )
    elif trouble:
        age = f"{float(one.get('age') or 0) / 60:.0f} minutes"
        text = f"the keys for {what} cannot be read; the keys of {age} ago stay in use: {trouble}"
        yield AREA.fail("tokens", text, "correct the cause before the issuer rotates its keys")
    elif not reviewed and not one.get("keys"):
        yield AREA.warn("tokens", f"the keys for {what} have not been read yet", "run the doctor again in a minute")
    else:
        audiences = ", ".join(map(str, one.get("audiences") or ())) or "the Kubernetes API"
        yield AREA.ok("tokens", f"{what} are accepted if they are for {audiences}")
    if not one.get("audiences"):
        text = (
            f"{what} need no audience of the mesh: they are for the Kubernetes API, and anybody who sees one can use it"
        )
        yield AREA.warn("audience", text, "set --auth-kubernetes-audience mesh, and request tokens for it")
    ahead = one.get("clock_ahead")
    if isinstance(ahead, int | float) and abs(ahead) >= _CLOCK:
        side = "ahead of" if ahead > 0 else "behind"
        text = f"a router's clock is {abs(ahead):.0f} s {side} that of {issuer}: valid tokens may be refused"
        yield AREA.fail("clock", text, "synchronise both clocks (NTP)")


def _is_local(endpoint: str) -> bool:
    return endpoint.startswith(("http://localhost", "http://127.", "http://[::1]"))
