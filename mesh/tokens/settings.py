"""The settings about tokens of other issuers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
"""The algorithms that can be accepted: all of JWA with public keys. `none` and HMAC are not among them."""

OFF, REVIEW, KEYS = "off", "review", "keys"
KUBERNETES = (OFF, REVIEW, KEYS)
"""The values of `--auth-kubernetes`."""


@dataclass(frozen=True, slots=True)
class TokenSettings:
    """The issuers whose tokens are accepted, and the rules for their tokens."""

    issuer: str = ""  # URL of an OIDC issuer; empty: none
    audiences: tuple[str, ...] = ()  # its tokens must be for one of these
    keys: str = ""  # path or URL of its keys; empty: its discovery document says where
    ca: str = ""  # path of a PEM file with the authorities to trust for it; empty: the system's
    algorithms: tuple[str, ...] = ALGORITHMS
    user_claim: str = "sub"
    groups_claim: str = "groups"
    skew: float = 60.0  # seconds by which clocks may differ

    kubernetes: str = OFF  # how tokens of service accounts are verified
    kubernetes_audiences: tuple[str, ...] = ("mesh",)  # empty: the API server's own
    kubernetes_api: str = ""  # its URL; empty: as Kubernetes tells each pod
    kubernetes_account: str = ""  # folder with the pod's token and ca.crt; empty: where Kubernetes mounts it

    @property
    def wanted(self) -> bool:
        """True if tokens of any issuer are accepted."""
        return bool(self.issuer) or self.kubernetes != OFF

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> "TokenSettings":
        """Returns the settings in a JSON document."""
        found: dict[str, Any] = {name: tuple(one) if isinstance(one, list) else one for name, one in data.items()}
        return cls(**found)
