"""The interpretation of a foreign server's error: either the model's own error, or the loss of the model.

Three forms of *not found* are those of ModelMesh: the code NOT_FOUND, Triton's text and MLServer's. TorchServe
answers calls with INTERNAL, and the name of its exception in a second line.
"""

from mesh.statuses import Code

_TRITON_BEGINS, _TRITON_ENDS = "Request for unknown model", (" is not found", " has no available versions")
_TORCHSERVE_BEGINS = ("Model not found: ", "Model version: ")
_TORCHSERVE_ENDS = (".ModelNotFoundException", ".ModelVersionNotFoundException")
_STUB_BEGINS, _STUB_ENDS = "Stub process '", "' is not healthy."
_MLSERVER_BEGINS, _MLSERVER_ENDS = "Model ", " not found"


def model_is_lost(code: int, text: str) -> bool:
    """Returns whether an answer says that the server does not have the model."""
    if code == Code.UNAVAILABLE:
        return text.startswith(_TRITON_BEGINS) and text.endswith(_TRITON_ENDS)
    if code == Code.INVALID_ARGUMENT:
        return text.startswith(_MLSERVER_BEGINS) and text.endswith(_MLSERVER_ENDS)
    if code == Code.INTERNAL:
        return text.startswith(_TORCHSERVE_BEGINS) and text.endswith(_TORCHSERVE_ENDS)
    return code == Code.NOT_FOUND


def model_has_died(code: int, text: str) -> bool:
    """Returns whether an answer says that the model's own process has ended, perhaps because of this very call. Triton
    starts no other process for a model of its Python backend, so only another load mends that."""
    return code == Code.INTERNAL and text.startswith(_STUB_BEGINS) and text.endswith(_STUB_ENDS)


def to_client(code: int, text: str, method: str) -> tuple[int, str]:
    """Returns the status for the client. A server's UNAVAILABLE becomes INTERNAL, as in ModelMesh: the model
    server has answered, so the router must not call or load another copy."""
    if code == Code.UNAVAILABLE:
        return int(Code.INTERNAL), f"ModelRuntime UNAVAILABLE: {method}: UNAVAILABLE: {text}"
    return code, text
