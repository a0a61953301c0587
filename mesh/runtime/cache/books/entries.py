"""The entry of one model in this pod, from the moment its load begins until nothing of it is left."""

import enum

from placement.footprint import NOTHING, Footprint


class EntryState(enum.Enum):
    """The state of an entry; the values are those of `CopyState.state`."""

    QUEUED = "queued"
    PULLING = "pulling"
    WAITING = "waiting"  # it waits for space, or for its turn
    LOADING = "loading"
    LOADED = "loaded"
    UNLOADING = "unloading"


_PHYSICAL = frozenset({EntryState.LOADING, EntryState.LOADED, EntryState.UNLOADING})


class CacheEntry:
    """One model in this pod.

    Only the ledger changes an entry, except for the notes of other parts: `load_ms`, `usual_ms`, `idle_ms`, `queue_ms`,
    `disk_bytes`, `suspect`, `model_type`, `reason`, `pinned`, `generation`, `digest`, `blamed`, `size`, `guessed`,
    `least_bytes`, the rates.
    """

    __slots__ = (
        "aside",
        "begun",
        "blamed",
        "digest",
        "disk_bytes",
        "footprint",
        "generation",
        "guessed",
        "idle_ms",
        "least_bytes",
        "load_ms",
        "loaded_ns",
        "model_id",
        "model_type",
        "peak_rate",
        "pinned",
        "queue_ms",
        "rate",
        "reason",
        "revision",
        "since_ns",
        "size",
        "slot",
        "state",
        "suspect",
        "usual_ms",
    )

    def __init__(self, model_id: str, revision: int, *, idle_ms: int, now_ns: int, aside: bool = False) -> None:
        self.model_id = model_id
        self.revision = revision  # create revision of its registration
        self.generation = 0  # generation of that registration's content
        self.digest = ""  # hex, of the content that it was loaded from
        self.aside = aside  # set: the id's other copy here is another generation of the same registration
        self.idle_ms = idle_ms  # since the model's last use, when its load was asked for; 0: a caller waits
        self.state = EntryState.QUEUED
        self.since_ns = now_ns  # when the state was entered
        # When it was loaded, and before that, when its load was asked for. Counts as its last use until its first call.
        self.loaded_ns = now_ns
        self.begun = False  # it counts as physical, even if it still waits for its turn
        # What it counts for on the books, in each memory: a reservation, then its size with the pod's factor
        # (`placement.account`). None until room is reserved.
        self.footprint = NOTHING
        self.size = NOTHING  # its size without the factor, once it is loaded
        self.guessed = False  # that size is a guess, and not to be remembered
        self.least_bytes = 0  # the measured part of a guess
        self.disk_bytes = 0  # bytes of its files, once they are here, and later also of what was made of them
        self.slot: int | None = None
        self.load_ms = 0
        self.usual_ms = 0  # duration of an earlier load, including pull and waiting; 0: unknown
        self.blamed = False  # servers have died in calls of this model
        self.suspect = False  # it was at work when its server died
        self.model_type = ""
        self.reason = ""  # why it was loaded here
        self.pinned = False  # never a victim
        self.rate = self.peak_rate = 0  # calls a minute (`activity`)
        self.queue_ms = 0  # recent waiting time of its calls before they run

    @property
    def key(self) -> str:
        """The key of the entry in the ledger. No id contains a NUL."""
        return self.model_id + "\0" if self.aside else self.model_id

    @property
    def measured(self) -> Footprint:
        """The size of a loaded model without the pod's factor; until it is known, what is reserved for the model."""
        return self.size if self.size.total_bytes else self.footprint

    @property
    def weight(self) -> int:
        """Bytes in host and device memory together, as the books count them."""
        return self.footprint.total_bytes

    @property
    def physical(self) -> bool:
        """True if the model may be in the server's memory, because its load has begun and no unload has ended."""
        return self.begun or self.state in _PHYSICAL

    def __repr__(self) -> str:
        return f"<Entry {self.model_id!r} of {self.revision}: {self.state.value}, {self.footprint}>"
