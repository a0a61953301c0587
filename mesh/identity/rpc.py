"""Mutual TLS for gRPC channels and servers, and tokens for meshes without TLS.

gRPC checks the certificates of both peers, but only the server's name. This module checks the client's name.
"""

import hmac
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc

from mesh.identity.credentials import NAME, Credentials
from mesh.identity.identity import Identity

Options = Sequence[tuple[str, str | int]]

TOKEN = "mesh-token"
"""Metadata key of the token that a server without TLS requires."""

OTHER_TOKEN = "the token does not belong to this port: read the right one from etcd"

_NAMES = "x509_subject_alternative_name"


def channel(address: str, options: Options, identity: Identity | None) -> grpc.aio.Channel:
    """Opens a channel that presents the certificate of this moment; it does not follow later changes. Without an
    identity, the channel is plaintext."""
    if identity is None:
        return grpc.aio.insecure_channel(address, options=options)
    now = identity.current
    shown = grpc.ssl_channel_credentials(now.ca, now.private_key, now.certificate)
    return grpc.aio.secure_channel(address, shown, options=(*options, ("grpc.ssl_target_name_override", NAME)))


def listen(server: grpc.aio.Server, address: str, identity: Identity | None) -> int:
    """Adds a port to a server, and returns the port's number. Without an identity, the port is plaintext. Returns 0, or
    raises RuntimeError, if the port is not available."""
    if identity is None:
        return int(server.add_insecure_port(address))
    served: Credentials = identity.current

    def newest() -> Any:  # called at each handshake, in a thread of gRPC; None: no change
        nonlocal served
        if identity.current is served:
            return None
        served = identity.current
        return _configuration(served)

    accepting = grpc.dynamic_ssl_server_credentials(_configuration(served), newest, require_client_authentication=True)
    return int(server.add_secure_port(address, accepting))


def _configuration(now: Credentials) -> "grpc.ServerCertificateConfiguration":
    return grpc.ssl_server_certificate_configuration([(now.private_key, now.certificate)], now.ca)


class _Guard(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic only in the stubs
    """A check of the caller before the method of a unary call runs."""

    def why_not(self, context: grpc.aio.ServicerContext[Any, Any]) -> str:
        """Returns the reason for refusing the caller; empty if there is none."""
        raise NotImplementedError

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Returns the handler of a method, with the check before it."""
        handler = await continuation(handler_call_details)
        if handler is None:  # the method does not exist
            return None
        method = handler.unary_unary
        assert method is not None, "only unary methods can be checked"

        async def checked(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            if why := self.why_not(context):
                await context.abort(grpc.StatusCode.UNAUTHENTICATED, why)
            return await method(request, context)

        return grpc.unary_unary_rpc_method_handler(
            checked, request_deserializer=handler.request_deserializer, response_serializer=handler.response_serializer
        )


class OnlyKnown(_Guard):
    """A guard that refuses clients whose certificate has another name."""

    def why_not(self, context: grpc.aio.ServicerContext[Any, Any]) -> str:
        """Returns the reason for refusing the caller; empty if there is none."""
        if NAME.encode() in context.auth_context().get(_NAMES, ()):
            return ""
        return f"the client's certificate is not for the name {NAME}: use the certificates of --internal-tls"


class OnlyWithToken(_Guard):
    """A guard that refuses clients without the server's token. The server publishes it in etcd, where only the mesh can
    read it."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()

    def why_not(self, context: grpc.aio.ServicerContext[Any, Any]) -> str:
        """Returns the reason for refusing the caller; empty if there is none."""
        for name, value in context.invocation_metadata() or ():
            if name == TOKEN:
                shown = value if isinstance(value, bytes) else value.encode()
                return "" if hmac.compare_digest(shown, self._token) else OTHER_TOKEN
        return "this port is for routers of the mesh, which find its token in etcd"


def shown(token: str) -> tuple[tuple[str, str], ...]:
    """Returns metadata with the token, or no metadata if the token is ""."""
    return ((TOKEN, token),) if token else ()
