"""Issuers of tokens for tests, each with its own keys, and an HTTP server that publishes these keys."""

import base64
import hmac
import json
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import jwt
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from mesh.tokens import keyset
from mesh.tokens.settings import TokenSettings
from router.access import assembly
from router.access.tokens import IssuedTokens, Tokens

ISSUER, AUDIENCE = "https://issuer.example", "mesh"


def fresh_key(algorithm: str) -> Any:
    match algorithm[:2]:
        case "RS" | "PS":
            return rsa.generate_private_key(65537, 2048)
        case "Ed":
            return ed25519.Ed25519PrivateKey.generate()
    curve = {"ES256": ec.SECP256R1, "ES384": ec.SECP384R1, "ES512": ec.SECP521R1}[algorithm]
    return ec.generate_private_key(curve())


@cache
def private_key(algorithm: str) -> Any:
    """Returns a private key for an algorithm, the same one at each call."""
    return fresh_key(algorithm)


def public_jwk(private: Any, **more: Any) -> dict[str, Any]:
    kinds = {
        rsa.RSAPrivateKey: jwt.algorithms.RSAAlgorithm,
        ec.EllipticCurvePrivateKey: jwt.algorithms.ECAlgorithm,
        ed25519.Ed25519PrivateKey: jwt.algorithms.OKPAlgorithm,
    }
    (kind,) = (kind for of, kind in kinds.items() if isinstance(private, of))
    return {**kind.to_jwk(private.public_key(), as_dict=True), "use": "sig", **more}


def jwks(*keys: Mapping[str, Any]) -> bytes:
    """Returns a JWKS document with these keys."""
    return json.dumps({"keys": list(keys)}).encode()


def b64(raw: bytes) -> bytes:
    return base64.urlsafe_b64encode(raw).rstrip(b"=")


def by_hand(
    head: Mapping[str, Any], claims: Mapping[str, Any], sign: Callable[[bytes], bytes] = lambda _: b""
) -> bytes:
    """Returns a token with any head, claims and signature, such as no library would produce."""
    signed = b64(json.dumps(head).encode()) + b"." + b64(json.dumps(claims).encode())
    return signed + b"." + b64(sign(signed))


def by_hmac(head: Mapping[str, Any], claims: Mapping[str, Any], secret: bytes, digest: str = "sha256") -> bytes:
    """Returns a token that is signed by HMAC."""
    return by_hand({"alg": f"HS{digest[3:]}", **head}, claims, lambda signed: hmac.new(secret, signed, digest).digest())


class FakeIssuer:
    """An issuer. `rotate()` makes it sign with a new key, while the former key stays published."""

    def __init__(self, url: str = ISSUER, *, algorithm: str = "ES256") -> None:
        self.url = url
        self.algorithm = algorithm
        self.keys: dict[str, Any] = {}
        self._made = 0
        self.rotate()

    def rotate(self, *, forget: bool = False) -> None:
        """Makes a new key, with which the issuer signs from now on. With `forget`, the former keys are no longer
        published."""
        if forget:
            self.keys.clear()
        self._made += 1
        self.current = f"key-{self._made}"
        self.keys[self.current] = fresh_key(self.algorithm)

    @property
    def jwks(self) -> bytes:
        return jwks(*(public_jwk(key, kid=name, alg=self.algorithm) for name, key in self.keys.items()))

    def claims(
        self, sub: str = "anna", *, now: float | None = None, lifetime: float = 3600, **more: Any
    ) -> dict[str, Any]:
        """Returns the claims of a token. A claim that is None is left out."""
        at = time.time() if now is None else now
        found = {"iss": self.url, "aud": AUDIENCE, "sub": sub, "iat": int(at), "exp": int(at + lifetime), **more}
        return {name: value for name, value in found.items() if value is not None}

    def token(self, sub: str = "anna", *, headers: Mapping[str, Any] | None = None, **more: Any) -> str:
        """Returns a token, signed with the current key."""
        head = {"kid": self.current} if headers is None else dict(headers)
        claims = json.dumps(self.claims(sub, **more)).encode()
        return jwt.PyJWS().encode(claims, self.keys[self.current], self.algorithm, headers=head)


def known_tokens(issuer: FakeIssuer, *, wall: Callable[[], float] = time.time) -> Tokens:
    """Returns an authenticator of the issuer's tokens that has read its keys."""
    settings = TokenSettings(issuer=issuer.url, audiences=(AUDIENCE,), keys="unread")
    (source,) = assembly.sources(settings, wall=wall)
    assert isinstance(source, IssuedTokens)
    source.following.keys = keyset.parse(issuer.jwks)
    return Tokens([source])


class IssuerServer:
    """An HTTP server with the discovery document and keys of an issuer, whose URL it sets."""

    def __init__(self, issuer: FakeIssuer) -> None:
        self.issuer = issuer
        self.requests: list[str] = []
        self.fail = 0  # status of all answers, if not 0
        self.body: bytes | None = None  # instead of the keys
        self.keys_at = ""  # instead of the keys' URL

    async def __aenter__(self) -> "IssuerServer":
        app = web.Application()
        app.router.add_get("/.well-known/openid-configuration", self._discovery)
        app.router.add_get("/keys", self._keys)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.issuer.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _discovery(self, request: web.Request) -> web.Response:
        self.requests.append(request.path)
        return web.json_response({"issuer": self.issuer.url, "jwks_uri": self.keys_at or f"{self.issuer.url}/keys"})

    async def _keys(self, request: web.Request) -> web.Response:
        self.requests.append(request.path)
        if self.fail:
            return web.Response(status=self.fail)
        return web.Response(body=self.issuer.jwks if self.body is None else self.body)
