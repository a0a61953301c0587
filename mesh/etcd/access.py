"""Access to etcd by one set of settings: connections to its members, and the token.

A client whose credential files change replaces the whole access, because a channel keeps the certificate that it was
created with, and a token belongs to a user. Requests on the replaced access may finish; its streams end at once and are
opened again on the new one.
"""

import weakref
from typing import Protocol

from mesh.etcd.auth import Auth
from mesh.etcd.endpoints import Endpoints
from mesh.options.etcdsettings import EtcdSettings


class Replaceable(Protocol):
    """A stream that its access can end."""

    def replace(self) -> None:
        """Ends it with EtcdReplaced."""


class Access:
    """Connections and token of one set of settings. Raises ValueError for invalid settings."""

    def __init__(self, settings: EtcdSettings) -> None:
        self.settings = settings
        self.endpoints = Endpoints(settings)
        self.auth = Auth(settings)
        self.streams: weakref.WeakSet[Replaceable] = weakref.WeakSet()  # opened on it

    async def retire(self, grace: float) -> None:
        """Ends its streams with EtcdReplaced, and its connections once their requests have ended, within `grace`
        seconds. No request may begin after this call."""
        self.auth.retired = True
        for stream in tuple(self.streams):
            stream.replace()
        await self.endpoints.close(grace)

    async def close(self) -> None:
        """Ends everything at once."""
        await self.endpoints.close(None)
