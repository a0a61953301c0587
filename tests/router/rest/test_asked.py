"""The meaning of a request, as read from its path and headers alone."""

import asyncio

import pytest
from multidict import CIMultiDict

from mesh.statuses import MeshError, Reason
from router.rest.asked import TIMEOUT, Asked


def asked(path="/v2/models/m", **fields):
    return Asked(path, CIMultiDict((name.replace("_", "-"), value) for name, value in fields.items()), "peer")


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("/v2/models/m", ("m", "", "")),
        ("/v2/models/m/infer", ("m", "", "infer")),
        ("/v2/models/a%2Fb/ready", ("a/b", "", "ready")),
        ("/v2/models/a/b/infer", ("a/b", "", "infer")),
        ("/v2/models/m/versions/3/infer", ("m", "3", "infer")),
        ("/v2/models/infer", ("infer", "", "")),
        ("/v2/models/versions/3", ("versions/3", "", "")),
        ("/v2/models/%C3%A9", ("é", "", "")),
    ],
)
def test_a_path_names_model_version_and_operation(path, target):
    assert asked(path).target() == target


@pytest.mark.parametrize("path", ["/v2/models/", "/v2/models//infer", "/v2/models/%ff"])
def test_a_path_without_a_model_is_refused(path):
    with pytest.raises(MeshError) as caught:
        asked(path).target()
    assert caught.value.reason is Reason.BAD_REQUEST


async def test_the_caller_is_who_the_headers_say():
    """A call's metadata contains the client's own headers, and those for Mesh and for tracing. It contains no `accept`,
    no header of a proxy, no `x-mesh-` header, and no value that is not text."""
    one = asked(
        X_Mine="1", mm_vmodel_id="v", traceparent="t", accept="no", x_forwarded_for="no", x_mesh_a="no", x_bad="\x01"
    )
    caller = one.caller()
    assert caller.metadata == [(b"x-mine", b"1"), (b"mm-vmodel-id", b"v"), (b"traceparent", b"t")]
    assert caller.peer == "peer"


@pytest.mark.parametrize(
    ("fields", "seconds"),
    [
        ({}, TIMEOUT),
        ({"grpc_timeout": "2S"}, 2.0),
        ({"X_Request_Timeout": "1.5"}, 1.5),
        ({"grpc_timeout": "1S", "x_request_timeout": "9"}, 1.0),
        ({"x_request_timeout": "soon"}, None),
        ({"x_request_timeout": "-1"}, None),
        ({"x_request_timeout": "nan"}, None),
        ({"grpc_timeout": "1"}, None),
    ],
)
async def test_the_time_out_is_grpcs_or_one_in_seconds(fields, seconds):
    if seconds is None:
        with pytest.raises(
            MeshError, match=r"the header (grpc|x-request)-timeout is '.*', not a (time|number of seconds) above 0"
        ):
            asked(**fields).caller()
        return
    deadline = asked(**fields).caller().deadline
    assert deadline is not None
    assert deadline - asyncio.get_running_loop().time() == pytest.approx(seconds, abs=0.5)


def test_headers_that_are_there_twice_must_agree():
    twice = [("Content-Encoding", "gzip"), ("content-encoding", "gzip")]
    assert Asked("/", CIMultiDict(twice), "").encoding() == "gzip"
    with pytest.raises(MeshError, match="different values: send one"):
        Asked("/", CIMultiDict([*twice, ("Content-Encoding", "br")]), "").encoding()


@pytest.mark.parametrize(("value", "length"), [("0", 0), ("17", 17), ("-1", None), ("1e3", None), ("9" * 16, None)])
def test_the_length_of_the_json_part_is_a_whole_number(value, length):
    one = asked(Inference_Header_Content_Length=value)
    if length is None:
        with pytest.raises(MeshError, match="not a whole number"):
            one.header_length()
    else:
        assert one.header_length() == length
    assert asked().header_length() is None


@pytest.mark.parametrize(("value", "encoding"), [("gzip", "gzip"), (" GZip ", "gzip"), ("identity", ""), ("", "")])
def test_the_encoding_is_one_name(value, encoding):
    assert asked(content_encoding=value).encoding() == encoding
