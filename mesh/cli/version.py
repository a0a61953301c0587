"""The version of this installation."""

from importlib.metadata import PackageNotFoundError, version


def installed() -> str:
    """Returns the version, or `unknown` if Mesh runs from a folder that was never installed."""
    try:
        return version("mesh-serving")
    except PackageNotFoundError:
        return "unknown"
