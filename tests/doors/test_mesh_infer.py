"""`mesh infer` with generated inputs, over REST and gRPC: only required inputs are generated, and datatypes may be ones
that JSON cannot express."""

import json
import sys

import pytest

from tests.doors.test_doors import ran

pytestmark = pytest.mark.asyncio(loop_scope="package")


@pytest.mark.parametrize("rest", [[], ["--rest"]], ids=["gRPC", "REST"])
@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("optional", [10.0]),  # zeros + the offset's own 10, which zeros would have overwritten
        ("optional-tensor", [0.0]),  # an input of type optional(tensor)
        ("all-optional", [20.0]),  # nothing is required
        ("no-inputs", [1.0, 2.0]),
    ],
)
async def test_inputs_that_may_be_left_out_are_not_made_up(doors, rest, model, expected):
    options = ["--endpoint", f"http://{doors.rest}", "--grpc-endpoint", doors.grpc, "--zeros", "--json"]
    told = json.loads(await ran(sys.executable, "-m", "mesh", "infer", model, *options, *rest))
    assert told["outputs"][0]["data"] == expected


@pytest.mark.parametrize("rest", [[], ["--rest"]], ids=["gRPC", "REST"])
@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
async def test_datatypes_that_json_has_no_form_for(doors, rest, datatype):
    """Inputs of datatypes that JSON cannot express reach the model over REST too. Outputs of these types are shown as
    numbers."""
    options = ["--endpoint", f"http://{doors.rest}", "--grpc-endpoint", doors.grpc, "--rows", "3", "--json"]
    told = json.loads(await ran(sys.executable, "-m", "mesh", "infer", datatype.lower(), *options, *rest))
    (output,) = told["outputs"]
    assert (output["datatype"], output["shape"]) == (datatype, [3])
    assert output["data"][0] == pytest.approx(0.1257, abs=0.001)
