"""What can go wrong between a store and the disk, in a handful of kinds.

The text is for whoever registered the model: it names what was asked for, what happened, and what to do. It holds no
credentials: URLs are shown without user, password and query.

A kind answers two questions. Whether the same attempt, a moment later and from here, may succeed: then it is made
again by itself (`retry`). And whether the pull may succeed some time, or from another pod: that is for whoever asked.
"""

import enum


class PullErrorKind(enum.Enum):
    """What happened: a title for people, whether it is retried at once, whether it may pass."""

    NOT_FOUND = ("not found", False, False)
    NO_BUCKET = ("no such bucket", False, False)
    """Or container, or repository: what holds the objects is not there."""
    EMPTY = ("nothing to pull", False, False)
    """The place is there and holds no files."""
    FORBIDDEN = ("forbidden", False, False)
    """By the store, or by the operator's rules about paths and addresses."""
    CREDENTIALS = ("bad credentials", False, False)
    """The store does not know who is asking: none given, wrong or expired ones."""
    BAD_REQUEST = ("bad request", False, False)
    """The path or key cannot be understood, or names something that cannot be a model."""
    DNS = ("name not resolved", True, True)
    TLS = ("no trusted connection", False, False)
    UNREACHABLE = ("unreachable", True, True)
    """No connection, a lost one, or the store itself failing."""
    TIMEOUT = ("timeout", True, True)
    DISK_FULL = ("disk full", False, True)
    """The pod's disk has too little space or refuses to be written: another pod's may not."""
    TOO_LARGE = ("too large", False, False)
    INTEGRITY = ("incomplete", True, True)
    """What arrived is not what was announced: truncated."""
    CHANGED = ("changed meanwhile", False, True)
    """Since it was listed: it is listed and fetched anew."""
    CHECKSUM = ("checksum", False, False)
    """All of it arrived, and it is not what the registration or the store says it is."""

    def __init__(self, title: str, retried: bool, transient: bool) -> None:
        self.title = title
        self.retried = retried
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
        """Whether trying again later, or from another pod, may help."""
        return self.kind.transient
