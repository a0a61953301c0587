"""The credentials of a request, and the interface of authenticators, which identify the principal by them.

A guard asks its authenticators one after the other. Each knows one kind of credentials: API keys, tokens,
certificates. It has four answers:

- the caller, and the time until which the credentials are valid;
- None, for credentials of another kind;
- a MeshError, for invalid credentials of its kind;
- a coroutine function that identifies the caller later, if something must be fetched first.

Guards cache callers, so an authenticator is asked again for the same credentials only after that time, or after it has
reported a change.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from mesh.access.principals import Principal
from mesh.statuses import MeshError, Reason


class Credentials(NamedTuple):
    """The credentials in the headers of one request."""

    token: bytes  # of `authorization: Bearer TOKEN`; empty: none
    certificate: bytes = b""  # the header in which Envoy describes the client's certificate; empty: none


class Identified(NamedTuple):
    """A caller, and the time until which the credentials are valid for that caller."""

    principal: Principal
    until: float = 0.0  # seconds since the epoch; 0: until a change


Later = Callable[[], Awaitable[Identified]]
"""A function that fetches what is missing, and returns the caller within a few seconds. Raises MeshError."""


class Authenticator(Protocol):
    """A way to identify callers by one kind of credentials."""

    changed: Callable[[], None]
    """The callback of the guard. Must be called when cached callers have to be identified again."""

    def identify(self, given: Credentials) -> "Identified | Later | None":
        """Returns the caller, a function that identifies the caller later, or None for credentials of another kind.
        Raises MeshError for credentials that are not valid. Does not wait."""

    def look(self) -> None:
        """Does periodic work. The guard calls this about once a second."""

    async def close(self) -> None:
        """Ends tasks and closes connections."""

    def statistics(self) -> Sequence[Mapping[str, object]]:
        """Returns the authenticator's state, for people: a document for each source of identities, with its `kind`."""


class Unsettled(Exception):
    """The signal that a caller cannot be identified without waiting."""

    def __init__(self, settle: Callable[[], Awaitable[Principal]]) -> None:
        """Makes the signal. `settle` waits and returns the caller, or raises MeshError."""
        super().__init__("the caller is not identified yet")
        self._settle = settle

    async def settle(self, deadline: float | None = None) -> Principal:
        """Waits until the caller is identified, and returns the caller. `deadline` is on the event loop's clock; None
        waits without a limit. Raises MeshError, DEADLINE if the deadline passes."""
        try:
            async with asyncio.timeout_at(deadline):
                return await self._settle()
        except TimeoutError as error:
            text = "the call's deadline passed before its caller was identified: call with a later deadline"
            raise MeshError(Reason.DEADLINE, text) from error
