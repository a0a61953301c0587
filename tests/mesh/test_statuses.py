"""The table of statuses, and what clients receive from it."""

import grpc

from mesh.pb import details_pb2
from mesh.statuses import Code, MeshError, Reason, http_of_code


def test_codes_are_grpcs_own():
    """The codes in Mesh's enum have the same names and numbers as those in gRPC's library."""
    assert {code.name: code.value[0] for code in grpc.StatusCode} == {code.name: code.value for code in Code}


def test_reasons_with_equal_codes_stay_apart():
    """Reasons with equal codes stay distinct, although members of an enum with equal values become aliases."""
    assert Reason.NO_ROOM is not Reason.OVERLOADED
    assert Reason["LOST"].code is Code.UNAVAILABLE
    assert Reason.NOWHERE.http == 503


def test_the_reason_travels_as_error_details():
    """The reason is sent as ErrorInfo and RetryInfo, which any client that knows google.rpc can read."""
    error = MeshError(Reason.NOT_IN_TIME, "loading", retry_after=1.5, details={"model": "m"})
    status = details_pb2.Status.FromString(error.grpc_details())
    info = details_pb2.ErrorInfo.FromString(status.details[0].value)
    retry = details_pb2.RetryInfo.FromString(status.details[1].value)
    assert (status.code, status.message) == (14, "loading")
    assert (info.reason, dict(info.metadata)) == ("NOT_IN_TIME", {"model": "m"})
    assert (retry.retry_delay.seconds, retry.retry_delay.nanos) == (1, 500_000_000)


def test_any_code_of_a_model_server_has_an_http_status():
    """A code that gRPC does not define is mapped to the HTTP status 500."""
    assert http_of_code(5) == 404
    assert http_of_code(99) == 500
