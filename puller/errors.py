"""The errors of pulls, each of one of a few kinds.

The text is for the person who registered the model: it names what was asked for, what happened, and what to do. It
contains no credentials: URLs are shown without user, password and query.

A kind answers two questions. May another attempt in this pod succeed a moment later? If so, the puller retries by
itself (`retry`). What has to happen before a later pull can succeed (`Nature`)? That tells the caller how soon to ask
again.
"""

import enum


class Nature(enum.Enum):
    """The event that must happen before the same pull can succeed."""

    PASSING = "passing"
    """Only time has to pass: the store is unreachable, busy or being written to."""
    NOT_FOUND = "not found"
    """The files must be put into the store, and may be on their way."""
    FORBIDDEN = "forbidden"
    """Credentials, permissions or settings of the store must be corrected first."""
    CONTENT = "bad content"
    """The registration or the files must be changed; until then, the same request fails again."""
    POD = "of this pod"
    """The pod's disk needs room: a pull in another pod may succeed now, and in this pod later."""


class PullErrorKind(enum.Enum):
    """The kind of a failure: its title for people, whether the pull is retried immediately, and its nature."""

    NOT_FOUND = ("not found", False, Nature.NOT_FOUND)
    NO_BUCKET = ("no such bucket", False, Nature.NOT_FOUND)
    """The bucket, container or repository of the objects does not exist."""
    EMPTY = ("nothing to pull", False, Nature.NOT_FOUND)
    """The location exists and has no files."""
    FORBIDDEN = ("forbidden", False, Nature.FORBIDDEN)
    """Forbidden by the store, or by the operator's rules about paths and addresses."""
    CREDENTIALS = ("bad credentials", False, Nature.FORBIDDEN)
    """The store does not recognise the caller: no credentials, or wrong or expired ones."""
    SETTINGS = ("bad settings of a store", False, Nature.FORBIDDEN)
    """The storage secret, or a registration's addition to it, cannot be used."""
    BAD_REQUEST = ("bad request", False, Nature.CONTENT)
    """The path or key cannot be understood, or names something that cannot be a model."""
    DNS = ("name not resolved", True, Nature.PASSING)
    TLS = ("no trusted connection", False, Nature.FORBIDDEN)
    UNREACHABLE = ("unreachable", True, Nature.PASSING)
    """There is no connection, it was lost, or the store itself fails."""
    BUSY = ("too many requests", True, Nature.PASSING)
    TIMEOUT = ("timeout", True, Nature.PASSING)
    SLOW = ("too slow", True, Nature.PASSING)
    """The store sends too slowly."""
    DISK_FULL = ("disk full", False, Nature.POD)
    """The pod's disk has too little space or refuses writes. Another pod's disk may have room."""
    TOO_LARGE = ("too large", False, Nature.CONTENT)
    INTEGRITY = ("incomplete", True, Nature.PASSING)
    """Fewer or other bytes arrived than were announced or requested."""
    CHANGED = ("changed meanwhile", False, Nature.PASSING)
    """The file changed since it was listed: it is listed and fetched again."""
    CHECKSUM = ("checksum", False, Nature.CONTENT)
    """The file arrived completely, but it is not the one that the registration or the store announced."""

    def __init__(self, title: str, retried: bool, nature: Nature) -> None:
        self.title = title
        self.retried = retried
        self.nature = nature


class PullError(Exception):
    """The error of a failed pull, which has left no folder behind; complete files stay in the cache.

    `retry_after` is the time that the store asked for, in seconds. `short` is how many bytes of models in use must be
    evicted from the disk for the pull, or 0 if that does not help. `never` says that this pod's disk would be too small
    even if it were empty. `needs` is how many bytes the pull has asked room for.
    """

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
        # File names may hold bytes that are not text; an error must always be printable.
        self.text = text.encode("utf-8", "backslashreplace").decode()
        super().__init__(self.text)
        self.kind = kind
        self.retry_after = retry_after
        self.short = short
        self.never = never
        self.needs = needs

    @property
    def nature(self) -> Nature:
        """The event that must happen before the same pull can succeed."""
        return self.kind.nature
