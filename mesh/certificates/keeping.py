"""Renewal of the certificates in a store. If another process writes to the store meanwhile, the renewal starts
again."""

import datetime
from collections.abc import Callable, Mapping
from typing import Protocol

from mesh.certificates.issuing import Wanted
from mesh.certificates.renewal import Renewal, renew

ATTEMPTS = 8


class StoreError(Exception):
    """A failure to read or write a store. The text says why and what to do."""


class Store(Protocol):
    """A store of certificates and keys. Its methods raise StoreError."""

    async def read(self) -> tuple[Mapping[str, bytes], object]:
        """Returns the store's entries by name, and their version, which is passed to `write`."""

    async def write(self, content: Mapping[str, bytes], version: object) -> bool:
        """Replaces all entries; returns False if another process has changed them since `version`."""

    def close(self) -> None:
        """Releases the store's lock or connection."""


def now() -> datetime.datetime:
    """Returns the current time in UTC."""
    return datetime.datetime.now(datetime.UTC)


async def keep(store: Store, wanted: Wanted, clock: Callable[[], datetime.datetime] = now) -> Renewal:
    """Renews the store's certificates that are due, and closes the store. Raises StoreError, and Foreign if Mesh did
    not write the store's content."""
    try:
        for _ in range(ATTEMPTS):
            content, version = await store.read()
            renewal = renew(content, wanted, clock())
            if not renewal.changed or await store.write(renewal.content, version):
                return renewal
    finally:
        store.close()
    raise StoreError(
        f"other processes changed the certificates during each of {ATTEMPTS} attempts to write them: stop "
        "these processes, or try again"
    )
