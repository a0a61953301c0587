"""Mutual TLS for gRPC's channels and servers, which check signatures themselves, and of names only the server's."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc

from mesh.identity.credentials import NAME, Credentials
from mesh.identity.identity import Identity

Options = Sequence[tuple[str, str | int]]

_NAMES = "x509_subject_alternative_name"


def channel(address: str, options: Options, identity: Identity | None) -> grpc.aio.Channel:
    """A channel that shows what the identity is now, and goes on showing it; without one it speaks in plain."""
    if identity is None:
        return grpc.aio.insecure_channel(address, options=options)
    now = identity.current
    shown = grpc.ssl_channel_credentials(now.ca, now.private_key, now.certificate)
    return grpc.aio.secure_channel(address, shown, options=(*options, ("grpc.ssl_target_name_override", NAME)))


def listen(server: grpc.aio.Server, address: str, identity: Identity | None) -> int:
    """Adds a port, which speaks in plain without an identity. 0: it could not be had. Raises RuntimeError."""
    if identity is None:
        return int(server.add_insecure_port(address))
    served: Credentials = identity.current

    def newest() -> Any:  # at each handshake, in a thread of gRPC's; None: no change
        nonlocal served
        if identity.current is served:
            return None
        served = identity.current
        return _configuration(served)

    accepting = grpc.dynamic_ssl_server_credentials(_configuration(served), newest, require_client_authentication=True)
    return int(server.add_secure_port(address, accepting))


def _configuration(now: Credentials) -> "grpc.ServerCertificateConfiguration":
    return grpc.ssl_server_certificate_configuration([(now.private_key, now.certificate)], now.ca)


class OnlyKnown(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic only in the stubs
    """Refuses clients whose certificate bears another name. For unary methods."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Puts the question before the method."""
        handler = await continuation(handler_call_details)
        if handler is None:  # no such method
            return None
        method = handler.unary_unary
        assert method is not None, "a method that is not unary would go unchecked"

        async def checked(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            if NAME.encode() not in context.auth_context().get(_NAMES, ()):
                await context.abort(
                    grpc.StatusCode.UNAUTHENTICATED, f"the certificate that was shown is not for the name {NAME}"
                )
            return await method(request, context)

        return grpc.unary_unary_rpc_method_handler(
            checked, request_deserializer=handler.request_deserializer, response_serializer=handler.response_serializer
        )
