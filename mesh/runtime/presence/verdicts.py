"""What comes of asking etcd for the right to load a model, and for the right to publish what was loaded, as data."""

from dataclasses import dataclass, field

from mesh.schema.records import ModelRecord


@dataclass(frozen=True, slots=True)
class Claimed:
    """The model may be loaded here; `copies/` says so."""

    record: ModelRecord
    spares: dict[str, int] = field(default_factory=dict)  # copies elsewhere, of the models that were asked about
    modified: int = 0  # mod revision of the record; 0: it cannot be read, and must not be written


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Somebody else has a copy, or the right to make it."""

    pod: str


@dataclass(frozen=True, slots=True)
class Stale:
    """The registration that was meant is not the current one."""


@dataclass(frozen=True, slots=True)
class Away:
    """Nobody can tell: etcd is away, or this pod's lease is."""

    why: str


Verdict = Claimed | Elsewhere | Stale | Away


@dataclass(frozen=True, slots=True)
class Published:
    """The copy stands in etcd as loaded, and the record with the digest of its content."""

    record: ModelRecord


@dataclass(frozen=True, slots=True)
class Contradicted:
    """The copy holds other content than this registration's copies, as its record says."""

    record: ModelRecord


Publication = Published | Contradicted | Stale | Away
