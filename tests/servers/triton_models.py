"""Models of Triton's Python backend, written as users write them, and their answers."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROWS = np.array([[1.5, -2.0, 3.25], [0.0, 4.0, -1.0]], np.float32)

TENSORS = """
input [ { name: "x" data_type: TYPE_FP32 dims: [ -1, 3 ] } ]
output [ { name: "sum" data_type: TYPE_FP32 dims: [ -1 ] }, { name: "twice" data_type: TYPE_FP64 dims: [ -1, 3 ] } ]
"""

NUMBERS = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(pb_utils.get_input_tensor_by_name(one, "x").as_numpy()) for one in requests]

    def answer(self, x):
        total = pb_utils.Tensor("sum", x.sum(axis=1, dtype=np.float32) + np.float32({plus}))
        return pb_utils.InferenceResponse([total, pb_utils.Tensor("twice", x.astype(np.float64) * 2 + {plus})])
"""

# Describes itself, imports a module that lies beside it, and has no description.
ALONE = """
import helper
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        config.add_input({"name": "x", "data_type": "TYPE_FP32", "dims": [-1, 3]})
        config.add_output({"name": "sum", "data_type": "TYPE_FP32", "dims": [-1]})
        config.add_output({"name": "twice", "data_type": "TYPE_FP64", "dims": [-1, 3]})
        config.set_max_batch_size(0)
        return config

    def execute(self, requests):
        answers = []
        for one in requests:
            x = pb_utils.get_input_tensor_by_name(one, "x").as_numpy()
            total = pb_utils.Tensor("sum", x.sum(axis=1, dtype=np.float32))
            answers.append(pb_utils.InferenceResponse([total, pb_utils.Tensor("twice", helper.twice(x))]))
        return answers
"""

HELPER = "def twice(x):\n    return x.astype('float64') * 2\n"

WORDS = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for one in requests:
            words = pb_utils.get_input_tensor_by_name(one, "words").as_numpy()
            loud = np.array([word.upper() for word in words.ravel()], object).reshape(words.shape)
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("loud", loud)]))
        return answers
"""

WORD_TENSORS = """
input [ { name: "words" data_type: TYPE_STRING dims: [ -1 ] } ]
output [ { name: "loud" data_type: TYPE_STRING dims: [ -1 ] } ]
"""

FAILS = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        return [pb_utils.InferenceResponse(error=pb_utils.TritonError("no answer today")) for _ in requests]
"""

RAISES = """
class TritonPythonModel:
    def initialize(self, args):
        raise RuntimeError("no weights at " + args["model_repository"])
"""

PYTHON = 'name: "theirs"\nbackend: "python"  # Python\n'


@dataclass(frozen=True, slots=True)
class Written:
    path: Path
    plus: float = 0.0  # added to each number of its answers


def write(folder: Path) -> dict[str, Written]:
    """Writes a model in each layout. The models answer with the sum of each row of `x`, and with twice its numbers.
    Those of `versions` add 10 or 20."""
    numbers = NUMBERS.format(plus=0.0)
    _write(folder / "repository", {"config.pbtxt": PYTHON + TENSORS, "1/model.py": numbers})
    _write(
        folder / "versions",
        {
            "config.pbtxt": PYTHON + TENSORS + "version_policy: { all {} }",
            "1/model.py": NUMBERS.format(plus=10.0),
            "2/model.py": NUMBERS.format(plus=20.0),
        },
    )
    _write(folder / "folder", {"model.py": ALONE, "helper.py": HELPER})
    _write(folder / "numbered", {"3/model.py": ALONE, "3/helper.py": HELPER})
    _write(folder / "file", {"model.py": ALONE.replace("import helper", HELPER).replace("helper.", "")})
    return {
        "repository": Written(folder / "repository"),
        "versions": Written(folder / "versions", plus=20.0),
        "folder": Written(folder / "folder"),
        "numbered": Written(folder / "numbered"),
        "file": Written(folder / "file" / "model.py"),
    }


def write_others(folder: Path) -> dict[str, Path]:
    """Writes a model of texts, and models that cannot be loaded or called."""
    files = {
        "words": {"config.pbtxt": PYTHON + WORD_TENSORS, "1/model.py": WORDS},
        "fails": {"config.pbtxt": PYTHON + TENSORS, "1/model.py": FAILS},
        "raises": {"config.pbtxt": PYTHON + TENSORS, "1/model.py": RAISES},
        "unreadable": {"config.pbtxt": PYTHON + "input [", "1/model.py": FAILS},
        "unknown": {"config.pbtxt": PYTHON + "no_such_field: 1", "1/model.py": FAILS},
        "missing": {"config.pbtxt": PYTHON + TENSORS, "1/notes.txt": ""},
        "elsewhere": {"config.pbtxt": 'backend: "onnxruntime"', "1/model.onnx": ""},
    }
    for name, content in files.items():
        _write(folder / name, content)
    return {name: folder / name for name in files}


def _write(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
