"""What can go wrong between a store and the disk, in a handful of kinds.

The text is for whoever registered the model: it names what was asked for, what happened, and what to do. It holds no
credentials: URLs are shown without user, password and query.

A kind answers two questions. Is it worth trying the same again a moment later, from here? Then the puller does, by
itself (`retry`). And what has to happen before a later pull can succeed (`Nature`)? That is for whoever asked for the
pull, and decides how soon to ask again.
"""

import enum


class Nature(enum.Enum):
    """What has to happen before the same pull can succeed."""

    PASSING = "passing"
    """Nothing but time: the store is unreachable, busy or being written to."""
    NOT_FOUND = "not found"
    """Somebody has to put the files there. They may be on their way."""
    FORBIDDEN = "forbidden"
    """Somebody has to correct credentials, permissions or settings of the store."""
    CONTENT = "bad content"
    """Somebody has to change the registration or the files: asked again, it fails again."""
    POD = "of this pod"
    """The pod's own disk: another pod may succeed now, this one later."""


class PullErrorKind(enum.Enum):
    """What happened: a title for people, whether it is retried at once, and its nature."""

    NOT_FOUND = ("not found", False, Nature.NOT_FOUND)
    NO_BUCKET = ("no such bucket", False, Nature.NOT_FOUND)
    """Or container, or repository: what holds the objects is not there."""
    EMPTY = ("nothing to pull", False, Nature.NOT_FOUND)
    """The place is there and holds no files."""
    FORBIDDEN = ("forbidden", False, Nature.FORBIDDEN)
    """By the store, or by the operator's rules about paths and addresses."""
    CREDENTIALS = ("bad credentials", False, Nature.FORBIDDEN)
    """The store does not know who is asking: none given, wrong or expired ones."""
    SETTINGS = ("bad settings of a store", False, Nature.FORBIDDEN)
    """The storage secret, or what a registration adds to it, cannot be used."""
    BAD_REQUEST = ("bad request", False, Nature.CONTENT)
    """The path or key cannot be understood, or names something that cannot be a model."""
    DNS = ("name not resolved", True, Nature.PASSING)
    TLS = ("no trusted connection", False, Nature.FORBIDDEN)
    UNREACHABLE = ("unreachable", True, Nature.PASSING)
    """No connection, a lost one, or the store itself failing."""
    BUSY = ("too many requests", True, Nature.PASSING)
    TIMEOUT = ("timeout", True, Nature.PASSING)
    SLOW = ("too slow", True, Nature.PASSING)
    """The store sends next to nothing."""
    DISK_FULL = ("disk full", False, Nature.POD)
    """The pod's disk has too little space or refuses to be written: another pod's may not."""
    TOO_LARGE = ("too large", False, Nature.CONTENT)
    INTEGRITY = ("incomplete", True, Nature.PASSING)
    """What arrived is not what was announced: truncated."""
    CHANGED = ("changed meanwhile", False, Nature.PASSING)
    """Since it was listed: it is listed and fetched anew."""
    CHECKSUM = ("checksum", False, Nature.CONTENT)
    """All of it arrived, and it is not what the registration or the store says it is."""

    def __init__(self, title: str, retried: bool, nature: Nature) -> None:
        self.title = title
        self.retried = retried
        self.nature = nature


class PullError(Exception):
    """A pull that failed, and left nothing behind. `retry_after` is in seconds, where the store has said so; `short` is
    how many bytes of models in use must go from the disk for it, 0 where that does not help; `never` says that this
    pod's disk would be too small if it were empty. `needs` is how many bytes it asked room for, or more."""

    def __init__(
        self,
        kind: PullErrorKind,
        text: str,
        *,
        retry_after: float | None = None,
        short: int = 0,
        never: bool = False,
        needs: int = 0,
    ) -> None:
        # File names may hold bytes that are no text; an error must always be printable.
        self.text = text.encode("utf-8", "backslashreplace").decode()
        super().__init__(self.text)
        self.kind = kind
        self.retry_after = retry_after
        self.short = short
        self.never = never
        self.needs = needs

    @property
    def nature(self) -> Nature:
        """What has to happen before the same pull can succeed."""
        return self.kind.nature
