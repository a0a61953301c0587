"""The yardstick: a plain `grpc.aio` server that answers ModelInfer with onnxruntime, and nothing else.

    python -m tests.bench.plain PORT MODEL.onnx...

There is no router and no registry: it is what a user would write by hand in twenty lines. A model has its file's name;
a single model answers to any name. The server parses and answers the same V2 messages as the mesh does.
"""

import sys
from pathlib import Path

import grpc
import numpy as np
import onnxruntime
import uvloop

from mesh.pb import inference_pb2

Model = tuple[onnxruntime.InferenceSession, list[str]]
"""A session and the names of its outputs."""


def model(path: str) -> Model:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session, [output.name for output in session.get_outputs()]


async def serve(port: int, paths: list[str]) -> None:
    """Serves until killed."""
    models = {Path(path).stem: model(path) for path in paths}
    (only,) = models.values() if len(models) == 1 else (None,)
    datatypes = {"float32": "FP32", "int64": "INT64"}

    async def infer(
        request: inference_pb2.ModelInferRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.ModelInferResponse:
        session, names = only or models[request.model_name]
        feed = {
            tensor.name: np.frombuffer(raw, np.float32).reshape(tensor.shape)
            for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True)
        }
        response = inference_pb2.ModelInferResponse(model_name=request.model_name, id=request.id)
        for name, array in zip(names, session.run(names, feed), strict=True):
            response.outputs.add(name=name, datatype=datatypes[array.dtype.name], shape=array.shape)
            response.raw_output_contents.append(array.tobytes())
        return response

    handler = grpc.unary_unary_rpc_method_handler(
        infer,
        request_deserializer=inference_pb2.ModelInferRequest.FromString,
        response_serializer=inference_pb2.ModelInferResponse.SerializeToString,
    )
    server = grpc.aio.server()
    service = "inference.GRPCInferenceService"
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"ModelInfer": handler}),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), sys.argv[2:]))
