"""Renewal of a store's certificates: read, decide, write, and start over if another process wrote first."""

import datetime
from collections.abc import Callable, Mapping
from typing import Protocol

from mesh.certificates.issuing import Wanted
from mesh.certificates.renewal import Renewal, renew

ATTEMPTS = 8


class StoreError(Exception):
    """A store that cannot be read or written; the text says why and what to do."""


class Store(Protocol):
    """A store of certificates and keys. Its methods raise StoreError."""

    async def read(self) -> tuple[Mapping[str, bytes], object]:
        """Reads the entries, and their version."""

    async def write(self, content: Mapping[str, bytes], version: object) -> bool:
        """Replaces all entries; returns False if another process has changed them since `version`."""

    def close(self) -> None:
        """Releases the store."""


def now() -> datetime.datetime:
    """Returns the time."""
    return datetime.datetime.now(datetime.UTC)


async def keep(store: Store, wanted: Wanted, clock: Callable[[], datetime.datetime] = now) -> Renewal:
    """Renews what is due in the store, and closes it. Raises StoreError, and Foreign if it holds something else."""
    try:
        for _ in range(ATTEMPTS):
            content, version = await store.read()
            renewal = renew(content, wanted, clock())
            if not renewal.changed or await store.write(renewal.content, version):
                return renewal
    finally:
        store.close()
    raise StoreError(
        f"another process changed the certificates during each of {ATTEMPTS} attempts to write them: stop it, or "
        "try again"
    )
