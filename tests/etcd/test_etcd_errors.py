"""The errors that failures of etcd become. Each error says whether a write may have been carried out."""

import grpc
import pytest

from mesh.etcd import EtcdCompacted, EtcdDenied, EtcdError, EtcdLeaseLost, EtcdUnavailable, errors
from mesh.statuses import Reason


def failed(code: grpc.StatusCode, details: str) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details, "")


@pytest.mark.parametrize(
    ("code", "details", "ambiguous"),
    [
        pytest.param("UNAVAILABLE", "failed to connect to all addresses; last error: ...", False, id="not connected"),
        pytest.param("UNAVAILABLE", "etcdserver: no leader", False, id="no leader"),
        pytest.param("RESOURCE_EXHAUSTED", "etcdserver: too many requests", False, id="overloaded"),
        pytest.param("RESOURCE_EXHAUSTED", "etcdserver: mvcc: database space exceeded", False, id="no space"),
        pytest.param("UNAVAILABLE", "Socket closed", True, id="connection lost"),
        pytest.param("UNAVAILABLE", "etcdserver: request timed out", True, id="etcd's own time-out"),
        pytest.param("UNAVAILABLE", "keepalive watchdog timeout", True, id="no sign of life"),
        pytest.param("DEADLINE_EXCEEDED", "Deadline Exceeded", True, id="time-out"),
        pytest.param("UNKNOWN", "Stream removed", True, id="unknown"),
    ],
)
def test_a_write_is_ambiguous_unless_it_certainly_was_not_done(code: str, details: str, ambiguous: bool) -> None:
    error = failed(grpc.StatusCode[code], details)
    write = errors.translate(error, "put", write=True)
    assert isinstance(write, EtcdUnavailable)
    assert write.ambiguous is ambiguous
    assert write.reason is Reason.REGISTRY_AWAY
    assert details in write.detail
    assert "put" in write.detail
    read = errors.translate(error, "read", write=False)
    assert isinstance(read, EtcdUnavailable)
    assert not read.ambiguous


@pytest.mark.parametrize(
    ("code", "details", "says"),
    [
        (
            "UNAVAILABLE",
            "failed to connect to all addresses; last error: UNKNOWN: ipv4:10.0.0.7:2379: Connection refused",
            "etcd cannot be reached",
        ),
        (
            "UNAVAILABLE",
            "DNS resolution failed for etcd.ns.svc:2379: C-ares status is not ARES_SUCCESS",
            "cannot be reached",
        ),
        ("UNAVAILABLE", "Socket closed", "does not answer"),
        ("UNAVAILABLE", "etcdserver: no leader", "etcd has no leader"),
        ("UNAVAILABLE", "recvmsg:Connection reset by peer", "does not answer"),
        ("UNKNOWN", "Stream removed ({grpc_message:'', grpc_status:2})", "does not answer"),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", "does not answer in time"),
        ("RESOURCE_EXHAUSTED", "etcdserver: mvcc: database space exceeded", "no space left"),
        ("UNAUTHENTICATED", "etcdserver: invalid auth token", "refuses the mesh's credentials"),
        ("PERMISSION_DENIED", "etcdserver: permission denied", "refuses the mesh's credentials"),
    ],
)
@pytest.mark.parametrize("write", [True, False])
def test_callers_are_told_what_is_the_matter_and_not_in_grpcs_words(
    code: str, details: str, says: str, write: bool
) -> None:
    """Callers get an error without addresses or library texts, which says what still works and what to do. Operators
    get the full text."""
    error = errors.translate(failed(grpc.StatusCode[code], details), "txn at 10.0.0.7:2379", write=write)
    assert says in error.text
    for part in ("Loaded models are still served", "try again", "mesh doctor"):
        assert part in error.text
    for part in ("10.0.0.7", "2379", "etcdserver", "grpc", "ipv4", details):
        assert part not in error.text
    assert error.detail == f"txn at 10.0.0.7:2379: {details}"
    assert details in str(error)


@pytest.mark.parametrize(
    ("code", "details", "kind"),
    [
        ("PERMISSION_DENIED", "etcdserver: permission denied", EtcdDenied),
        ("UNAUTHENTICATED", "etcdserver: invalid auth token", EtcdDenied),
        ("INVALID_ARGUMENT", "etcdserver: authentication failed, invalid user ID or password", EtcdDenied),
        ("INVALID_ARGUMENT", "etcdserver: user name is empty", EtcdDenied),
        ("OUT_OF_RANGE", "etcdserver: mvcc: required revision has been compacted", EtcdCompacted),
        ("NOT_FOUND", "etcdserver: requested lease not found", EtcdLeaseLost),
    ],
)
def test_refusals_have_their_kind(code: str, details: str, kind: type[EtcdError]) -> None:
    assert type(errors.translate(failed(grpc.StatusCode[code], details), "put", write=True)) is kind


@pytest.mark.parametrize(
    ("code", "details", "reason"),
    [
        ("INVALID_ARGUMENT", "etcdserver: request is too large", Reason.TOO_LARGE),
        ("RESOURCE_EXHAUSTED", "CLIENT: Received message larger than max (20 vs. 10)", Reason.TOO_LARGE),
        ("INVALID_ARGUMENT", "etcdserver: duplicate key given in txn request", Reason.INTERNAL),
    ],
)
def test_what_would_be_refused_again_is_not_unavailable(code: str, details: str, reason: Reason) -> None:
    error = errors.translate(failed(grpc.StatusCode[code], details), "put", write=True)
    assert type(error) is EtcdError
    assert error.reason is reason
