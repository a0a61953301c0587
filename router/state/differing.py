"""The refusal to register an id that is registered with other attributes.

Over ModelMesh's API, the text is ModelMesh's. Other APIs add the names of the attributes that differ, and
what to do instead.
"""

from mesh.schema import confidential
from mesh.schema.records import ModelRecord
from mesh.statuses import MeshError, Reason

_SHOWN = 300  # characters of a value in a text
_MASKED = {"path": confidential.masked_path, "key": confidential.masked_key}


class DifferentError(MeshError):
    """The conflict between a registered model and a request for one with the same id."""

    def __init__(self, model_id: str, registered: ModelRecord, asked: ModelRecord) -> None:
        self.model_id = model_id
        self.names = registered.differences(asked)
        text = "Model already exists with different attribute values"  # COMPAT
        super().__init__(Reason.CONFLICT, text, details={"differs": ",".join(self.names)})
        self._registered = registered
        self._asked = asked

    def explained(self, ways: str) -> MeshError:
        """Returns the same error with another text, which names the attributes that differ. `ways` is a sentence that
        says what to do instead."""
        differing = ", ".join(
            f"{name} {_value(name, self._registered)}, not {_value(name, self._asked)}" for name in self.names
        )
        text = f"model {self.model_id} is registered with {differing}. {ways}"
        return MeshError(self.reason, text, details=self.details)


def _value(name: str, record: ModelRecord) -> str:
    value: str = getattr(record, name)
    value = _MASKED[name](value) if name in _MASKED else value
    shown = value if len(value) <= _SHOWN else f"{value[:_SHOWN]}..."
    return repr(shown) if shown else "none"
