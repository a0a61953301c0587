"""The token that stands for user and password.

etcd hands it out for the password (a slow hash: 100 ms of etcd's time) and forgets it after some minutes, at a member's
restart, or when users change. Nobody asks beforehand whether it still holds: the refused request says so, the token is
forgotten, and the next request fetches one, once for all who wait.
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
        self.retired = False  # none is fetched any more

    @property
    def enabled(self) -> bool:
        """Whether there is a user to authenticate."""
        return bool(self._user)

    async def token(self, member: Member, timeout: float) -> str:
        """The token to send, "" for none, and where this was retired meanwhile.

        Raises AioRpcError where etcd does not give one within `timeout` s."""
        if self._token is not None:
            return self._token
        async with self._lock:
            if self.retired:
                return ""
            if self._token is None:
                self._token = await self._fetch(member, timeout)
            return self._token

    def forget(self, token: str) -> None:
        """`token` was refused. One that came in its place meanwhile is kept."""
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
