"""The contents of etcd's range `presence`, key by key: pods, copies, lives, tombstones.

Keys and records that cannot be decoded are logged and skipped. The few other keys in the range are ignored.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

from mesh.schema import records
from mesh.schema.keys import TOMBSTONE, Keys
from mesh.telemetry import logs
from router.state.feed.ranges import Item

log = logs.get(__name__)

R = TypeVar("R")

_TOMBSTONE = f"/{TOMBSTONE}".encode()


class PodSaid(NamedTuple):
    """The news that a pod published itself or, without a record, that its presence ended."""

    name: str
    record: records.PodRecord | None


class CopySaid(NamedTuple):
    """The news that a pod published a copy or, without a record, that the copy's key was deleted."""

    model: str
    pod: str
    record: records.CopyRecord | None


class LifeSaid(NamedTuple):
    """The news that a life (`mesh.schema.lives`) began or changed or, without a value, that it was closed."""

    pod: str
    incarnation: str
    value: bytes | None


class TombstoneSaid(NamedTuple):
    """The news that pods may still answer for an unregistered model, or that no pod can any longer."""

    model: str
    stands: bool


Said = PodSaid | CopySaid | LifeSaid | TombstoneSaid


def read(keys: Keys, items: Iterable[Item]) -> Iterator[Said]:
    """Yields the news that the items contain, in order."""
    lives, copies, pods = keys.lives, keys.all_copies, keys.pods
    for key, value in items:
        try:
            if key.startswith(copies):
                model, pod = keys.copy_of(key)
                if key.endswith(_TOMBSTONE):  # not a pod of that name: in a pod's key the name is escaped
                    yield TombstoneSaid(model, value is not None)
                elif value is None:
                    yield CopySaid(model, pod, None)
                elif (copy := _decoded(records.CopyRecord.decode, key, value)) is not None:
                    yield CopySaid(model, pod, copy)
            elif key.startswith(pods):
                name = keys.pod_of(key)
                if value is None:
                    yield PodSaid(name, None)
                elif name and (record := _decoded(records.PodRecord.decode, key, value)) is not None:
                    yield PodSaid(name, record)
            elif key.startswith(lives):
                yield LifeSaid(*keys.life_of(key), value)
        except ValueError:
            log.warning("a key in etcd cannot be read", key=key)


def _decoded(decode: Callable[[bytes], R], key: bytes, value: bytes) -> R | None:
    try:
        return decode(value)
    except ValueError as error:
        log.warning("a record in etcd cannot be read", key=key, error=str(error))
        return None
