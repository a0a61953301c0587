"""A small fake of the Kubernetes API server, over HTTPS: one namespace's Secrets, for one ServiceAccount with a Role,
and the tokens of ServiceAccounts (TokenReview, and the keys that sign them).

It answers as the real one does, with Status objects and 409 for an old resourceVersion. `async with KubeApi(folder) as
api` also writes the account's folder, as Kubernetes mounts it.
"""

import base64
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
from aiohttp import web

from tests.support.certificates import certificate
from tests.support.tokens import FakeIssuer

NAMESPACE, TOKEN = "team-a", "a.token.of.kubernetes"


class KubeApi:
    def __init__(self, folder: Path) -> None:
        self.account = folder / "account"
        self.secrets: dict[str, dict[str, Any]] = {}
        self.allowed: dict[str, set[str]] = {}  # by Secret, the verbs of the Role
        self.seen: list[tuple[str, str]] = []  # method and name
        self.failures: list[int] = []  # statuses to send to the next requests instead of an answer
        self.before_put: Callable[[], None] | None = None  # called once, before a PUT is judged
        self.issuer = FakeIssuer("https://kubernetes.default.svc", algorithm="ES256")
        self.may_review = True
        self.deleted: set[str] = set()  # user names of accounts that were deleted
        self.reviews = 0
        self._version = 100
        authority, server = certificate("127.0.0.1")
        self.account.mkdir(parents=True)
        (self.account / "ca.crt").write_bytes(authority)
        (self.account / "token").write_text(TOKEN)
        (self.account / "namespace").write_text(NAMESPACE)
        (folder / "server.pem").write_bytes(server)
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._context.load_cert_chain(folder / "server.pem")
        self.url = ""

    def put(self, name: str, *, allow: str = "get update patch", **data: bytes) -> None:
        """Creates a Secret with these entries (ca_crt stands for ca.crt), and the Role for the Secret."""
        self._version += 1
        self.secrets[name] = {
            "apiVersion": "v1",
            "kind": "Secret",
            "type": "Opaque",
            "metadata": {
                "name": name,
                "namespace": NAMESPACE,
                "labels": {"app.kubernetes.io/name": "mesh"},
                "resourceVersion": str(self._version),
            },
        }
        self.allowed[name] = set(allow.split())
        if data:
            self.store(name, {key.replace("_", "."): value for key, value in data.items()})

    def store(self, name: str, content: dict[str, bytes]) -> None:
        """Changes the Secret's entries, as another program would."""
        self._version += 1
        self.secrets[name]["metadata"]["resourceVersion"] = str(self._version)
        self.secrets[name]["data"] = {key: base64.b64encode(value).decode() for key, value in content.items()}

    def content(self, name: str) -> dict[str, bytes]:
        return {key: base64.b64decode(value) for key, value in self.secrets[name].get("data", {}).items()}

    async def __aenter__(self) -> "KubeApi":
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=self._context).start()
        self.url = f"https://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        if self.failures:
            return _status(self.failures.pop(0), "the server is currently unable to handle the request")
        if request.headers.get("authorization") != f"Bearer {(self.account / 'token').read_text()}":
            return _status(401, "Unauthorized")
        if request.path == "/apis/authentication.k8s.io/v1/tokenreviews":
            return await self._review(request)
        if request.path == "/.well-known/openid-configuration":
            keys = "https://10.0.0.1:6443/openid/v1/jwks"  # as real clusters do: an address for clients outside
            return web.json_response({"issuer": self.issuer.url, "jwks_uri": keys})
        if request.path == "/openid/v1/jwks":
            if "application/jwk-set+json" not in request.headers.get("accept", ""):
                return web.Response(status=406)
            return web.Response(body=self.issuer.jwks, content_type="application/jwk-set+json")
        prefix = f"/api/v1/namespaces/{NAMESPACE}/secrets/"
        name = request.path.removeprefix(prefix)
        verb = {"GET": "get", "PUT": "update", "PATCH": "patch"}.get(request.method, request.method.lower())
        self.seen.append((request.method, name))
        if not request.path.startswith(prefix) or (name in self.secrets and verb not in self.allowed[name]):
            return _status(403, f'secrets "{name}" is forbidden: User "mesh-certificates" cannot {verb} resource')
        found = self.secrets.get(name)
        if found is None:
            return _status(404, f'secrets "{name}" not found')
        if request.method == "GET":
            return web.json_response(found)
        body = await request.json()
        if self.before_put is not None:
            hook, self.before_put = self.before_put, None
            hook()
            found = self.secrets[name]
        if body["metadata"]["resourceVersion"] != found["metadata"]["resourceVersion"]:
            return _status(409, "the object has been modified; please apply your changes to the latest version")
        self._version += 1
        self.secrets[name] = {
            **body,
            "metadata": {**body["metadata"], "resourceVersion": str(self._version)},
        }
        return web.json_response(self.secrets[name])

    def account_token(self, account: str, namespace: str = NAMESPACE, **more: Any) -> str:
        return self.issuer.token(f"system:serviceaccount:{namespace}:{account}", **more)

    async def _review(self, request: web.Request) -> web.Response:
        if not self.may_review:
            return _status(403, "tokenreviews.authentication.k8s.io is forbidden")
        body = await request.json()
        assert (body["apiVersion"], body["kind"]) == ("authentication.k8s.io/v1", "TokenReview")
        self.reviews += 1
        audiences = body["spec"].get("audiences") or [self.issuer.url]
        token = body["spec"]["token"]
        try:
            key = self.issuer.keys[jwt.get_unverified_header(token)["kid"]].public_key()
            claims = jwt.decode(token, key, [self.issuer.algorithm], audience=audiences, issuer=self.issuer.url)
            name = claims["sub"]
            if name in self.deleted:
                raise jwt.InvalidTokenError("the service account was deleted")
        except (jwt.PyJWTError, KeyError) as error:
            status = {"user": {}, "error": f"[invalid bearer token, {error}]"}
        else:
            namespace = name.split(":")[2]
            groups = ["system:serviceaccounts", f"system:serviceaccounts:{namespace}", "system:authenticated"]
            given = [claims["aud"]] if isinstance(claims["aud"], str) else claims["aud"]
            status = {
                "authenticated": True,
                "user": {"username": name, "uid": "1", "groups": groups},
                "audiences": [one for one in audiences if one in given],
            }
        return web.json_response({**body, "status": status}, status=201)


def _status(code: int, message: str) -> web.Response:
    return web.json_response({"kind": "Status", "status": "Failure", "code": code, "message": message}, status=code)
