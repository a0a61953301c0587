"""KServe's Python server with custom models that run in onnxruntime.

python kserve_app.py REST_PORT GRPC_PORT NAME=FILE...
"""

import sys

import onnxruntime
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer


class OnnxModel(Model):
    """One model, from a file."""

    def __init__(self, name: str, path: str) -> None:
        super().__init__(name)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._outputs = [output.name for output in self._session.get_outputs()]
        self.ready = True

    async def predict(self, payload: InferRequest, headers=None, response_headers=None) -> InferResponse:
        """Runs the model in the event loop, because a small model takes only microseconds."""
        feed = {one.name: one.as_numpy() for one in payload.inputs}
        outputs = []
        for name, array in zip(self._outputs, self._session.run(self._outputs, feed), strict=True):
            output = InferOutput(name, list(array.shape), _DATATYPES[array.dtype.name])
            output.set_data_from_numpy(array, binary_data=payload.use_binary_outputs)
            outputs.append(output)
        return InferResponse(payload.id, self.name, outputs, use_binary_outputs=payload.use_binary_outputs)


_DATATYPES = {"float32": "FP32", "int64": "INT64"}


if __name__ == "__main__":
    rest, grpc, *models = sys.argv[1:]
    server = ModelServer(http_port=int(rest), grpc_port=int(grpc), workers=1, enable_latency_logging=False)
    server.start([OnnxModel(*model.split("=", 1)) for model in models])
