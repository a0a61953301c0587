"""Inference from the command line, over REST and over gRPC."""

import json
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

from mesh.cli import tensors
from mesh.cli.exits import CommandError
from mesh.pb import inference_pb2 as v2
from mesh.statuses import MeshError, Reason

METADATA = {"name": "a", "inputs": [{"name": "X", "datatype": "FP32", "shape": [-1, 3]}], "outputs": []}


class Service(grpc.GenericRpcHandler):
    """A V2 service over gRPC that answers with the sum of each row, and with errors for the models `bad` and
    `broken`."""

    def __init__(self):
        self.requests = []

    def service(self, details):
        method = details.method.rpartition("/")[2]
        kinds = {"ModelMetadata": v2.ModelMetadataRequest, "ModelInfer": v2.ModelInferRequest}
        return grpc.unary_unary_rpc_method_handler(
            getattr(self, method), kinds[method].FromString, lambda message: message.SerializeToString()
        )

    def ModelMetadata(self, request, context):
        answer = v2.ModelMetadataResponse(name=request.name)
        answer.inputs.add(name="X", datatype="FP32", shape=[-1, 3])
        return answer

    def ModelInfer(self, request, context):
        self.requests.append(request)
        if request.model_name == "bad":
            error = MeshError(Reason.NO_ROOM, "no room now")
            context.set_trailing_metadata([("grpc-status-details-bin", error.grpc_details())])
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, error.text)
        if request.model_name == "broken":
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the model's own words")
        rows = np.frombuffer(request.raw_input_contents[0], np.float32).reshape(tuple(request.inputs[0].shape))
        sums = rows.sum(axis=1)
        answer = v2.ModelInferResponse(model_name=request.model_name)
        answer.outputs.add(name="sum", datatype="FP32", shape=sums.shape)
        answer.raw_output_contents.append(sums.tobytes())
        return answer


@pytest.fixture
def service(monkeypatch):
    """A gRPC server that `mesh infer` finds."""
    handler = Service()
    server = grpc.server(ThreadPoolExecutor(2), handlers=[handler])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    handler.address = f"127.0.0.1:{port}"
    yield handler
    server.stop(0).wait()


@pytest.fixture
def infer(run, service):
    def command(*arguments, **options):
        return run("infer", *arguments, "--grpc-endpoint", service.address, **options)

    return command


def test_an_input_is_made_up_from_the_metadata(infer, service):
    """From the metadata, `mesh infer` makes a random input, the same for the same seed. --rows sets the variable
    dimension."""
    results = [infer("a", "--rows", "2", "--seed", seed, "--json") for seed in ("1", "1", "2")]
    assert [result.exit_code for result in results] == [0, 0, 0], results[0].stderr
    first, again, other = [json.loads(result.stdout)["outputs"] for result in results]
    assert first == again != other
    assert first[0]["shape"] == [2]
    sent = np.frombuffer(service.requests[0].raw_input_contents[0], np.float32)
    assert sent.shape == (6,)


def test_zeros_and_shapes(infer, service):
    """--zeros and --shape change the input that `mesh infer` makes. A shape for an input that the model does not have
    is wrong usage."""
    assert infer("a", "--zeros", "--shape", "X=4,3").exit_code == 0
    assert not any(service.requests[-1].raw_input_contents[0])
    assert list(service.requests[-1].inputs[0].shape) == [4, 3]
    assert infer("a", "--shape", "Y=1").exit_code == 2


def test_an_npy_file_is_sent_as_it_is(infer, service, tmp_path):
    """An .npy file is sent with the same values, even if it is in column order or big-endian."""
    array = np.asfortranarray(np.arange(6, dtype=">f4").reshape(2, 3))
    np.save(tmp_path / "x.npy", array)
    result = infer("a", "--npy", f"X={tmp_path / 'x.npy'}", "--json")
    assert json.loads(result.stdout)["outputs"][0]["data"] == [3.0, 12.0]
    assert service.requests[-1].raw_input_contents[0] == np.arange(6, dtype="<f4").tobytes()


@pytest.mark.parametrize("rest", [False, True], ids=["grpc", "rest"])
def test_a_json_request_is_sent_either_way(infer, service, mesh, tmp_path, rest):
    tensor = {"name": "X", "datatype": "FP32", "shape": [1, 3], "data": [[1, 2, 3]]}
    (tmp_path / "r.json").write_text(json.dumps({"inputs": [tensor], "outputs": [{"name": "sum"}]}))
    mesh.answer(
        "/v2/models/a%2Fb/infer", {"outputs": [{"name": "sum", "datatype": "FP32", "shape": [1], "data": [6.0]}]}
    )
    result = infer("a/b", "-f", str(tmp_path / "r.json"), "--json", *(["--rest"] if rest else []))
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["outputs"] == [{"name": "sum", "datatype": "FP32", "shape": [1], "data": [6.0]}]
    if rest:
        assert mesh.requests[-1][2]["inputs"][0]["data"] == [1.0, 2.0, 3.0]
    else:
        assert [output.name for output in service.requests[-1].outputs] == ["sum"]


def test_over_rest_the_metadata_come_from_rest(mesh, run):
    """Over REST the model's metadata are read over REST too, so gRPC is not needed."""
    mesh.answer("/v2/models/a", METADATA)
    mesh.answer(
        "/v2/models/a/infer", {"outputs": [{"name": "word", "datatype": "BYTES", "shape": [1], "data": ["[yes]"]}]}
    )
    result = run("infer", "a", "--rest")
    assert result.exit_code == 0, result.stderr
    assert "[yes]" in result.stdout


def test_the_meshs_reason_and_the_models_own_words(infer):
    """If the mesh refuses a call, its reason decides the exit code. If the model fails, the error has its gRPC status
    and text, and the command exits with 1."""
    refused = infer("bad")
    assert refused.exit_code == 6
    assert "no room now" in refused.stderr
    own = infer("broken", "--json")
    assert own.exit_code == 1
    assert json.loads(own.stdout) == {
        "error": "INVALID_ARGUMENT: the model's own words",
        "reason": "INVALID_ARGUMENT",
        "exit": 1,
    }


def test_where_no_grpc_answers(run):
    """If no gRPC server answers, the exit code is 4 and the error says what to do, as for REST."""
    result = run("infer", "a", "--grpc-endpoint", "127.0.0.1:9")
    assert result.exit_code == 4
    assert "mesh up" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--npy", "X=/no/such.npy"], id="no-npy"),
        pytest.param(["--npy", "x.npy"], id="no-name"),
        pytest.param(["--file", "/no/such.json"], id="no-file"),
        pytest.param(["--file", "-"], id="not-json"),
        pytest.param(["--shape", "X=a"], id="no-shape"),
        pytest.param(["--shape", "X=-1"], id="negative"),
        pytest.param(["--shape", "X=100000,100000"], id="too-large"),
        pytest.param(["--zeros", "--file", "x"], id="two-inputs"),
    ],
)
def test_wrong_inputs_are_wrong_usage(infer, arguments):
    result = infer("a", *arguments, stdin="{}")
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr


def test_a_file_that_is_no_npy_is_refused_without_advice_to_allow_pickles(tmp_path):
    csv, several = tmp_path / "x.csv", tmp_path / "x.npz"
    csv.write_text("1,2\n")
    np.savez(several, x=np.zeros(2))
    objects = tmp_path / "x.npy"
    np.save(objects, np.array([{}]), allow_pickle=True)
    for path in (csv, several, objects):
        with pytest.raises(CommandError, match=r"is not a .npy file with an array.*numpy\.save$") as caught:
            tensors.read_npy(f"X={path}")
        assert caught.value.code == 2


def test_an_array_that_v2_has_no_type_for_is_refused_by_name():
    with pytest.raises(CommandError, match=r"^input x: an array of complex128 cannot be sent"):
        tensors.to_grpc("m", {"x": np.zeros(1, complex)})


ARRAYS = [
    *(
        pytest.param(np.array([[0, 1], [1, 0]], dtype), id=name)
        for name, dtype in tensors.DTYPES.items()
        if name != "BYTES"
    ),
    pytest.param(np.array([["a", "bä"], ["", "c"]], dtype=object), id="BYTES"),
]


@pytest.mark.parametrize("array", ARRAYS)
def test_every_datatype_passes_json_and_grpc(array):
    name, back = tensors.from_json(json.loads(json.dumps(tensors.to_json("x", array))), 1)
    expected = [tensors._bytes(v) for v in array.reshape(-1)] if array.dtype == object else array.reshape(-1).tolist()
    assert (name, back.reshape(-1).tolist(), back.shape) == ("x", expected, array.shape)
    request = tensors.to_grpc("m", {"x": array})
    answer = v2.ModelInferResponse(raw_output_contents=request.raw_input_contents)
    answer.outputs.add(name="x", datatype=request.inputs[0].datatype, shape=request.inputs[0].shape)
    assert tensors.from_grpc(answer)["x"].reshape(-1).tolist() == expected


def test_what_json_has_no_form_for_goes_as_binary_data_over_rest():
    """Over REST, FP16 and BF16 tensors are sent as binary data after the JSON. Other tensors are part of the JSON."""
    halves, brains = np.array([1.5, -2], np.float16), np.array([(0x3FC0,), (0xC000,)], tensors.BF16)
    sent = [tensors.to_rest(name, array) for name, array in (("h", halves), ("b", brains))]
    assert [shown["parameters"] for shown, _ in sent] == [{"binary_data_size": 4}] * 2
    assert tensors.to_rest("x", np.array([1.5]))[1] == b""
    back = tensors.from_rest({"outputs": [shown for shown, _ in sent]}, b"".join(raw for _, raw in sent))
    assert back["h"].tolist() == [1.5, -2]
    assert back["b"].dtype == tensors.BF16
    assert tensors.shown(back["b"]).tolist() == [1.5, -2]


def test_typed_contents_are_understood():
    """Answers with typed contents are understood, because servers may use typed or raw contents."""
    answer = v2.ModelInferResponse()
    output = answer.outputs.add(name="x", datatype="INT64", shape=[2, 1])
    output.contents.int64_contents.extend([5, -6])
    assert tensors.from_grpc(answer)["x"].tolist() == [[5], [-6]]


@pytest.mark.parametrize(
    "tensor",
    [
        {},
        {"name": "x", "datatype": "FP31", "shape": [1], "data": [1]},
        {"name": "x", "datatype": "FP32", "shape": [2], "data": [1]},
        {"name": "x", "datatype": "UINT8", "shape": [1], "data": [-1]},
        {"name": "x", "datatype": "FP32", "shape": [1], "data": ["a"]},
    ],
    ids=["empty", "datatype", "shape", "range", "text"],
)
def test_a_bad_tensor_is_refused_by_its_name_or_number(tensor):
    with pytest.raises(CommandError, match=f"^input {tensor.get('name', 3)}: ") as caught:
        tensors.from_json(tensor, 3)
    assert caught.value.code == 2
