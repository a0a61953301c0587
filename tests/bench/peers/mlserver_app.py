"""A custom runtime of MLServer that runs a model in onnxruntime, as MLServer's documentation shows."""

import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class OnnxModel(MLModel):
    """One model, from the file that its `parameters.uri` names."""

    async def load(self) -> bool:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            self._settings.parameters.uri, options, providers=["CPUExecutionProvider"]
        )
        self._names = [output.name for output in self._session.get_outputs()]
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        feed = {one.name: NumpyCodec.decode_input(one) for one in payload.inputs}
        outputs = [
            NumpyCodec.encode_output(name, array)
            for name, array in zip(self._names, self._session.run(self._names, feed), strict=True)
        ]
        return InferenceResponse(model_name=self.name, id=payload.id, outputs=outputs)
