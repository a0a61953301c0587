"""Requests of one caller from outside to a mesh on the test cluster, with a key, a token, a client certificate, or
none."""

import contextlib
import http.client
import json
import ssl
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc

from mesh.pb import modelmesh_pb2, modelmesh_pb2_grpc
from tests.support.installed import NAME, ONE, Installed
from tests.support.localmesh import infer_request

MODEL = {"type": "onnx", "path": "http://store:8000/models/m0.onnx"}
"""A model of the store, for requests that register one."""

_KEY = "-----BEGIN PRIVATE KEY-----"


class Outsider:
    """A caller outside the cluster. Every request has a connection of its own."""

    def __init__(self, mesh: Installed, key: str = "", *, certificate: bytes = b"") -> None:
        """Makes a caller that sends a key or token, or presents a certificate, which is given with its key as PEM."""
        self._mesh = mesh
        self._key = key
        self._certificate = certificate

    def asked(
        self, method: str, path: str, body: Any = None, *, port: int = 8008, headers: Mapping[str, str] | None = None
    ) -> int:
        """Sends a request to a port of the Service, and returns the status. Raises OSError if TLS fails."""
        sent = {"Content-Type": "application/json", **self._authorization(), **(headers or {})}
        connection = self._connection(port)
        try:
            connection.request(method, path, None if body is None else json.dumps(body).encode(), sent)
            reply = connection.getresponse()
            reply.read()
            return reply.status
        finally:
            connection.close()

    async def registered(self, name: str, *, port: int = 8033) -> str:
        """Registers a model over gRPC, and returns the name of the status."""
        async with self._channel(port) as channel:
            info = modelmesh_pb2.ModelInfo(**MODEL)
            request = modelmesh_pb2.RegisterModelRequest(modelId=name, modelInfo=info)
            stub = modelmesh_pb2_grpc.ModelMeshStub(channel)
            return await self._status(stub.registerModel, request)

    async def called(self, name: str, *, port: int = 8033) -> str:
        """Calls a model over gRPC, and returns the name of the status."""
        async with self._channel(port) as channel:
            infer = channel.unary_unary(
                "/inference.GRPCInferenceService/ModelInfer", lambda message: message.SerializeToString(), bytes
            )
            return await self._status(infer, infer_request(name, x=ONE))

    async def _status(self, method: grpc.aio.UnaryUnaryMultiCallable, request: Any) -> str:
        metadata = [(name.lower(), value) for name, value in self._authorization().items()]
        try:
            await method(request, metadata=metadata, timeout=30)
        except grpc.aio.AioRpcError as error:
            return error.code().name
        return "OK"

    def _authorization(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._key}"} if self._key else {}

    def _connection(self, port: int) -> http.client.HTTPConnection:
        address = self._mesh.address
        if self._mesh.trust is None:
            return http.client.HTTPConnection(address, port, timeout=20.0)
        context = ssl.create_default_context(cafile=str(self._mesh.trust))
        context.check_hostname = False  # the certificate is for a forwarded port
        if self._certificate:
            with self.files() as (certificate, key):
                context.load_cert_chain(certificate, key)
        return http.client.HTTPSConnection(address, port, timeout=20.0, context=context)

    @contextlib.asynccontextmanager
    async def _channel(self, port: int) -> AsyncIterator[grpc.aio.Channel]:
        address = f"{self._mesh.address}:{port}"
        options: list[tuple[str, Any]] = [("grpc.use_local_subchannel_pool", 1)]
        if self._mesh.trust is None:
            channel = grpc.aio.insecure_channel(address, options)
        else:
            certificate, key = self._parts() if self._certificate else (None, None)
            credentials = grpc.ssl_channel_credentials(self._mesh.trust.read_bytes(), key, certificate)
            options.append(("grpc.ssl_target_name_override", NAME))
            channel = grpc.aio.secure_channel(address, credentials, options)
        async with channel:
            yield channel

    @contextlib.contextmanager
    def files(self) -> Iterator[tuple[Path, Path]]:
        """Writes the certificate and its key into files, which exist while the block is open."""
        with tempfile.TemporaryDirectory() as folder:
            paths = Path(folder, "tls.crt"), Path(folder, "tls.key")
            for path, content in zip(paths, self._parts(), strict=True):
                path.write_bytes(content)
            yield paths

    def _parts(self) -> tuple[bytes, bytes]:
        certificate, _, key = self._certificate.decode().partition(_KEY)
        return certificate.encode(), f"{_KEY}{key}".encode()
