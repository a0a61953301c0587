"""The token that etcd issues for a user and password.

etcd needs 100 ms to issue a token, because it hashes the password slowly. It forgets a token after some minutes, when a
member restarts, or when users change. A token is therefore used until etcd refuses it. Then the token is dropped, and
the next request fetches another. Concurrent requests wait for the same token.
"""

import asyncio

import grpc

from mesh.etcd.endpoints import Member
from mesh.etcd.errors import code_of
from mesh.options.etcdsettings import EtcdSettings
from mesh.pb import etcd_pb2 as pb
from mesh.statuses import Code


class Auth:
    """The current token of one client."""

    def __init__(self, settings: EtcdSettings) -> None:
        self._user = settings.user
        self._password = settings.password
        self._token: str | None = None if settings.user else ""
        self._lock = asyncio.Lock()
        self.renewals = 0  # tokens fetched
        self.retired = False  # set: no more tokens are fetched

    @property
    def enabled(self) -> bool:
        """True if there is a user to authenticate."""
        return bool(self._user)

    async def token(self, member: Member, timeout: float) -> str:
        """Returns the token to send. Returns "" if there is no user, if etcd has no authentication, or if the access
        was retired meanwhile.

        Raises AioRpcError if etcd refuses the user, or does not issue a token within `timeout` seconds."""
        if self._token is not None:
            return self._token
        async with self._lock:
            if self.retired:
                return ""
            if self._token is None:
                self._token = await self._fetch(member, timeout)
            return self._token

    def forget(self, token: str) -> None:
        """Drops a token that etcd has refused, unless a newer token has already replaced it."""
        if self._user and self._token == token:
            self._token = None

    async def _fetch(self, member: Member, timeout: float) -> str:
        request = pb.AuthenticateRequest(name=self._user, password=self._password)
        try:
            reply = await member.auth.Authenticate(request, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            if code_of(error) is Code.FAILED_PRECONDITION:  # authentication is not enabled: no token is needed
                return ""
            raise
        self.renewals += 1
        return str(reply.token)
