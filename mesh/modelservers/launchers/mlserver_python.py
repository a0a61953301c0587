"""MLServer's runtime for Python code of users: `mlserver_python.PythonModel` in the settings of a model.

The launcher puts this file's folder on Python's path. What does not depend on MLServer is in `mlserver_usercode`.
"""

from pathlib import Path
from typing import Any

import mlserver_usercode as usercode
from mlserver import MLModel
from mlserver.errors import InferenceError, MLServerError
from mlserver.types import InferenceResponse, Parameters, ResponseOutput

SIZE = "size_bytes"
"""The parameter of a model's metadata with the size that its code states, in bytes."""

_INTERNAL = 500  # as MLServer reports exceptions of its other runtimes


class PythonModel(MLModel):  # type: ignore[misc]  # MLServer is in another environment
    """One model, in the folder that its `parameters.uri` names."""

    _model: usercode.UserModel | None = None

    async def load(self) -> bool:
        """Imports and loads the model, in the thread in which MLServer loads and calls all models."""
        try:
            self._model = usercode.UserModel(Path(self._settings.parameters.uri))
        except usercode.CodeFailure as error:
            raise MLServerError(str(error), _INTERNAL) from error
        return True

    async def predict(self, payload: Any) -> Any:
        """Calls the model, and returns the outputs that the request names, or all."""
        assert self._model is not None
        try:
            outputs = self._model.predict({one.name: _array(one) for one in payload.inputs})
            wanted = [one.name for one in payload.outputs or ()] or list(outputs)
            if unknown := [name for name in wanted if name not in outputs]:
                raise usercode.BadTensors(f"the model has no output {unknown[0]}: it has {', '.join(outputs)}")
            made = [_output(name, outputs[name]) for name in wanted]
        except usercode.BadTensors as error:
            raise InferenceError(str(error)) from error
        except usercode.CodeFailure as error:
            raise MLServerError(str(error), _INTERNAL) from error
        return InferenceResponse(model_name=self.name, model_version=self.version, id=payload.id, outputs=made)

    async def metadata(self) -> Any:
        """Returns the model's metadata, with the size that its code states."""
        told = await super().metadata()
        if self._model is not None and self._model.size:
            told.parameters = Parameters(**{SIZE: self._model.size})
        return told

    async def unload(self) -> bool:
        """Drops the model."""
        if self._model is not None:
            self._model.close()
        self._model = None
        return True


def _array(one: Any) -> Any:
    datatype = getattr(one.datatype, "value", one.datatype)
    return usercode.decode(one.name, datatype, list(one.shape), getattr(one.data, "root", one.data))


def _output(name: str, value: Any) -> Any:
    datatype, shape, data = usercode.encode(name, value)
    return ResponseOutput(name=name, datatype=datatype, shape=shape, data=data)
