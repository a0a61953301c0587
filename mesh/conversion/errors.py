"""The errors of a conversion."""


class CannotConvert(Exception):
    """A model that is not converted. The text says why, and what to do instead."""


INSTALL = "run `pip install '.[convert]'` in a checkout of Mesh"
"""The command that installs what conversions need."""

SERVE_IT = "serve the model itself, with MLServer (docs/mlserver.md)"
"""The way out for models that have no ONNX form."""


def missing(error: ImportError) -> CannotConvert:
    """Returns the error for a library of the extra `convert` that is not installed."""
    return CannotConvert(f"to convert models, {error.name or 'a library'} is needed, which is not installed: {INSTALL}")
