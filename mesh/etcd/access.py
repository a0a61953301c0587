"""Access to etcd with one set of settings: connections to etcd's members, and a token.

When the credential files change, a client replaces its whole access, because a channel keeps the certificate that it
was created with, and a token belongs to a user. Requests on the old access may finish. Streams on the old access end
immediately, and are opened again on the new one.
"""

import weakref
from typing import Protocol

from mesh.etcd.auth import Auth
from mesh.etcd.endpoints import Endpoints
from mesh.options.etcdsettings import EtcdSettings


class Replaceable(Protocol):
    """A stream that `Access` can end."""

    def replace(self) -> None:
        """Ends the stream with EtcdReplaced."""


class Access:
    """The connections and the token for one set of settings. Raises ValueError for invalid settings."""

    def __init__(self, settings: EtcdSettings) -> None:
        self.settings = settings
        self.endpoints = Endpoints(settings)
        self.auth = Auth(settings)
        self.streams: weakref.WeakSet[Replaceable] = weakref.WeakSet()  # opened on it

    async def retire(self, grace: float) -> None:
        """Ends the streams with EtcdReplaced. Closes the connections once their requests have ended, after `grace`
        seconds at most. No request may begin after this call."""
        self.auth.retired = True
        for stream in tuple(self.streams):
            stream.replace()
        await self.endpoints.close(grace)

    async def close(self) -> None:
        """Ends streams and connections immediately."""
        await self.endpoints.close(None)
