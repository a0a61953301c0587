"""The server end of plain HTTP/1.1: the listeners of `server`, with connections that carry requests instead of calls.

It takes inference over REST from Envoy. An aiohttp application serves the rest of REST, such as pages and management,
which must also work without Envoy.
"""

import asyncio
from collections.abc import Callable

from mesh.statuses import MeshError
from mesh.wire import budget as budgets
from mesh.wire import server
from mesh.wire.connection import Connection
from mesh.wire.plainconnection import PlainConnection
from mesh.wire.plainrequest import Answer, Head, Opening, PlainRequest


class PlainServer(server.Listener[PlainRequest, Head]):
    """A server that passes every request to one handler."""

    def __init__(
        self,
        handler: Callable[[PlainRequest], None],
        refusal: Callable[[MeshError], Answer],
        *,
        max_message: int,
        budget: budgets.Budget,
        min_rate: int,
        opening: Opening | None = None,
    ) -> None:
        """Makes a server that does not listen yet. `refusal` makes the answers to requests that `handler` does not see.
        `max_message` is the largest body in bytes, and `min_rate` the lowest rate of a body in bytes a second (0 for no
        minimum). `opening` sees the first bytes of large bodies."""
        super().__init__(handler, max_message=max_message, budget=budget, min_rate=min_rate)
        self.refusal = refusal
        self.opening = opening

    def _connection(self, loop: asyncio.AbstractEventLoop, *, secure: bool = False) -> Connection[PlainRequest, Head]:
        return PlainConnection(self, loop, secure=secure)
