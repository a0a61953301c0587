"""What can go wrong between a store and the disk, in a handful of kinds.

The text is for whoever registered the model: it names what was asked for, what happened, and where it helps, what to
do. It holds no credentials: URLs are shown without user, password and query.
"""

import enum


class PullErrorKind(enum.Enum):
    """What happened, and whether the same pull may succeed later or from another pod."""

    NOT_FOUND = ("not found", False)
    FORBIDDEN = ("forbidden", False)
    """By the store, or by the operator's rules about paths and addresses."""
    BAD_REQUEST = ("bad request", False)
    """The path or key cannot be understood, or names something that cannot be a model."""
    UNREACHABLE = ("unreachable", True)
    """Name resolution, connection, TLS, or the store itself failing."""
    TIMEOUT = ("timeout", True)
    DISK_FULL = ("disk full", True)
    """The pod's disk has too little space or refuses to be written: another pod's may not."""
    TOO_LARGE = ("too large", False)
    INTEGRITY = ("integrity", True)
    """What arrived is not what was announced: truncated, or changed while it was read."""

    def __init__(self, title: str, transient: bool) -> None:
        self.title = title
        self.transient = transient


class PullError(Exception):
    """A pull that failed, and left nothing behind."""

    def __init__(self, kind: PullErrorKind, text: str) -> None:
        # File names may hold bytes that are no text; an error must always be printable.
        self.text = text.encode("utf-8", "backslashreplace").decode()
        super().__init__(self.text)
        self.kind = kind

    @property
    def transient(self) -> bool:
        """Whether trying again may help."""
        return self.kind.transient
