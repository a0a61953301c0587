"""A way into a server: its address, its protocol, and the request that a benchmark sends there repeatedly."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

METHOD = "/inference.GRPCInferenceService/ModelInfer"
Kind = Literal["grpc", "rest"]


@dataclass(frozen=True, slots=True)
class Door:
    kind: Kind
    address: str  # host:port
    path: str
    body: bytes  # the message; for gRPC without the frame
    answer: int  # minimum bytes of a good answer
    headers: Mapping[str, str] = field(default_factory=dict)  # for gRPC: metadata

    @property
    def url(self) -> str:
        """The address with scheme and path."""
        return f"http://{self.address}{self.path}"

    @property
    def framed(self) -> bytes:
        """The body as HTTP carries it: with gRPC's prefix for gRPC, unchanged for REST."""
        return self.body if self.kind == "rest" else b"\0" + len(self.body).to_bytes(4, "big") + self.body
