"""The kinds of model servers that have an adapter, and the types of models that each takes."""

from dataclasses import dataclass

ONNX = "onnx"
"""The kind of Mesh's own server, which needs no adapter."""


@dataclass(frozen=True, slots=True)
class ServerKind:
    """A kind of model server."""

    name: str
    what: str  # for people
    types: tuple[str, ...]  # of models that are only data
    code_types: tuple[str, ...]  # of models that run code when they are loaded
    installs: bool  # `mesh servers install` can install it

    def served(self, *, allow_code: bool) -> tuple[str, ...]:
        """Returns the types of models that a pod with such a server takes."""
        return (*self.types, *self.code_types) if allow_code else self.types


MLSERVER = ServerKind(
    "mlserver",
    "MLServer with scikit-learn, XGBoost, LightGBM, CatBoost and MLflow",
    types=("xgboost", "lightgbm", "catboost"),
    code_types=("sklearn", "mlflow"),
    installs=True,
)

KINDS = {kind.name: kind for kind in (MLSERVER,)}


def takers(model_type: str) -> list[ServerKind]:
    """Returns the kinds of servers that take models of a type."""
    return [kind for kind in KINDS.values() if model_type in (*kind.types, *kind.code_types)]


def runs_code(model_type: str) -> bool:
    """Returns whether models of a type run code when they are loaded."""
    return any(model_type in kind.code_types for kind in KINDS.values())
