"""One way to etcd: its members' connections and the token, made of one and the same settings.

A client that follows its files replaces the whole of it, because a channel shows for ever the certificate that it was
made with, and a token is one of its user. What is under way on the former one: requests are left to end, streams are
ended at once and begin anew on the next.
"""

import weakref
from typing import Protocol

from mesh.etcd.auth import Auth
from mesh.etcd.endpoints import Endpoints
from mesh.options.etcdsettings import EtcdSettings


class Replaceable(Protocol):
    """A stream, as far as its access ends it."""

    def replace(self) -> None:
        """Ends it with EtcdReplaced."""


class Access:
    """See the module's text. Raises ValueError for settings that cannot be meant."""

    def __init__(self, settings: EtcdSettings) -> None:
        self.settings = settings
        self.endpoints = Endpoints(settings)
        self.auth = Auth(settings)
        self.streams: weakref.WeakSet[Replaceable] = weakref.WeakSet()  # opened by it

    async def retire(self, grace: float) -> None:
        """Ends its streams with EtcdReplaced, and its connections once the requests on them have ended, within `grace`
        seconds. No request may begin on it after this was called."""
        self.auth.retired = True
        for stream in tuple(self.streams):
            stream.replace()
        await self.endpoints.close(grace)

    async def close(self) -> None:
        """Ends everything at once."""
        await self.endpoints.close(None)
