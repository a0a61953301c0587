"""Ray Serve with one replica of a multiplexed deployment, which runs models in onnxruntime.

    python ray_app.py REST_PORT GRPC_PORT MODELS FOLDER

A call names its model in the header `serve_multiplexed_model_id`; the replica loads `MODELS/NAME.onnx` on the model's
first call. Over gRPC the deployment serves V2 itself, with the messages of `proto/`. Ray's own files are written to
FOLDER.
"""

import asyncio
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

DATATYPES = {"FP32": np.float32, "INT64": np.int64}
NAMES = {"float32": "FP32", "int64": "INT64"}


@serve.deployment(num_replicas=1, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 1})
class Onnx:
    """All models that callers ask for."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    @serve.multiplexed(max_num_models_per_replica=8)
    async def session(self, model_id: str) -> onnxruntime.InferenceSession:
        """Loads a model. Ray keeps it, and prefers replicas that have it."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        path = str(self._folder / f"{model_id}.onnx")
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    async def __call__(self, request: Request) -> Response:
        """Answers V2 over REST, as far as the benchmark needs it: JSON both ways."""
        import orjson

        session = await self.session(serve.get_multiplexed_model_id())
        document = orjson.loads(await request.body())
        feed = {
            one["name"]: np.array(one["data"], DATATYPES[one["datatype"]]).reshape(one["shape"])
            for one in document["inputs"]
        }
        names = [output.name for output in session.get_outputs()]
        outputs = [
            {"name": name, "datatype": NAMES[array.dtype.name], "shape": array.shape, "data": array.ravel()}
            for name, array in zip(names, session.run(names, feed), strict=True)
        ]
        answer = {"model_name": serve.get_multiplexed_model_id(), "id": document.get("id", ""), "outputs": outputs}
        return Response(orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")

    async def ModelInfer(self, request):
        """Answers V2 over gRPC, with raw contents."""
        from mesh.pb import inference_pb2

        session = await self.session(serve.get_multiplexed_model_id())
        feed = {
            tensor.name: np.frombuffer(raw, DATATYPES[tensor.datatype]).reshape(tensor.shape)
            for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True)
        }
        response = inference_pb2.ModelInferResponse(model_name=request.model_name, id=request.id)
        names = [output.name for output in session.get_outputs()]
        for name, array in zip(names, session.run(names, feed), strict=True):
            response.outputs.add(name=name, datatype=NAMES[array.dtype.name], shape=array.shape)
            response.raw_output_contents.append(array.tobytes())
        return response


async def main() -> None:
    """Serves until killed."""
    rest, grpc, models, folder = sys.argv[1:]
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=200 << 20, _temp_dir=folder)
    serve.start(
        http_options={"host": "127.0.0.1", "port": int(rest)},
        grpc_options={
            "port": int(grpc),
            "grpc_servicer_functions": ["mesh.pb.inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server"],
        },
    )
    serve.run(Onnx.bind(models), route_prefix="/")
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
