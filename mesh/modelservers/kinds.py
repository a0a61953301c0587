"""The kinds of model servers that have an adapter, and the types of models that each takes."""

from dataclasses import dataclass

ONNX = "onnx"
"""The kind of Mesh's own server, which needs no adapter."""


@dataclass(frozen=True, slots=True)
class ServerKind:
    """A kind of model server, and the types of models that it takes."""

    name: str
    what: str  # for people
    types: tuple[str, ...]  # of models that are only data
    code_types: tuple[str, ...]  # of models that run code when they are loaded
    installs: bool  # `mesh servers install` can install it
    found: bool = False  # pods start the one that users have installed on the machine
    installed_only: tuple[str, ...] | None = None  # the types that the installed server takes; None: all of them

    def served(self, *, allow_code: bool, installed: bool = False) -> tuple[str, ...]:
        """Returns the types of models that a pod with such a server takes. `installed` says that `mesh servers install`
        has installed the server."""
        types = (*self.types, *self.code_types) if allow_code else self.types
        if not installed or self.installed_only is None:
            return types
        return tuple(one for one in types if one in self.installed_only)


MLSERVER = ServerKind(
    "mlserver",
    "MLServer with scikit-learn, XGBoost, LightGBM, CatBoost, MLflow and Python code",
    types=("xgboost", "lightgbm", "catboost"),
    code_types=("sklearn", "mlflow", "python"),
    installs=True,
)

TRITON = ServerKind(
    "triton",
    "Triton with its Python backend",
    types=("openvino_ir", "triton"),
    # Models of the types after the first can do more than compute, too: read files, for example.
    code_types=("triton-python", "tensorflow", "keras", "pytorch", "tensorrt"),
    installs=True,
    installed_only=("triton-python",),  # the wheel has no other backend
)

TORCHSERVE = ServerKind(
    "torchserve",
    "TorchServe with TorchScript models and .mar archives",
    types=(),
    # TorchScript cannot run Python, but it can read and overwrite files.
    code_types=("pytorch", "pytorch-mar"),
    installs=False,
    found=True,
)

OVMS = ServerKind(
    "ovms",
    "OpenVINO Model Server",
    types=("openvino_ir",),  # ONNX models only where --types says so
    code_types=(),
    installs=False,
)

KINDS = {kind.name: kind for kind in (MLSERVER, TRITON, TORCHSERVE, OVMS)}


def takers(model_type: str) -> list[ServerKind]:
    """Returns the kinds of servers that take models of a type, and that Mesh can start."""
    kinds = (kind for kind in KINDS.values() if kind.installs or kind.found)
    return [kind for kind in kinds if model_type in kind.served(allow_code=True, installed=True)]


def runs_code(model_type: str) -> bool:
    """Returns whether models of a type run code when they are loaded."""
    return any(model_type in kind.code_types for kind in KINDS.values())
