"""Answers of etcd to claims of models and to publications of loaded copies, as data."""

from dataclasses import dataclass, field

from mesh.schema.records import ModelRecord


@dataclass(frozen=True, slots=True)
class Claimed:
    """A won claim: the model may be loaded here, and has this pod's key under `copies/`."""

    record: ModelRecord
    spares: dict[str, int] = field(default_factory=dict)  # copies elsewhere of the models asked about
    modified: int = 0  # mod revision of the record; 0: the record is unreadable and must not be written


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """A claim lost to another pod, which has a copy or the right to load it."""

    pod: str


@dataclass(frozen=True, slots=True)
class Stale:
    """The answer that the registration, or the generation of its content, is not the current one."""


@dataclass(frozen=True, slots=True)
class Away:
    """The lack of an answer: etcd is unavailable, this pod has no lease, or the keys in question keep changing."""

    why: str


Verdict = Claimed | Elsewhere | Stale | Away


@dataclass(frozen=True, slots=True)
class Published:
    """A published copy: its key says that the copy is loaded, and the model's record has the digest of its content."""

    record: ModelRecord


@dataclass(frozen=True, slots=True)
class Contradicted:
    """A copy whose content differs from the registration's other copies, according to the record."""

    record: ModelRecord


Publication = Published | Contradicted | Stale | Away
