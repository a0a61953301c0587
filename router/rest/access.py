"""API keys and grants over REST, below `/mesh/v1/`.

A key is sent only in the answer to the request that creates it, because only its digest is stored.
"""

import time
from typing import Any

from aiohttp import web

from mesh.access.grants import Grant
from mesh.schema import auth
from mesh.schema.auth import KeyRecord
from mesh.schema.authstore import Made
from mesh.statuses import MeshError, Reason
from router.access import operations
from router.access.guard import OPEN
from router.access.keys import ADMIN_KEY
from router.rest import doors, modeldocuments
from router.rest.management import id_of, object_of, route
from router.rest.parts import Parts

ROUTES = (
    route("GET", "whoami", operations.WHO, "who"),
    route("GET", "keys", operations.KEYS, "list_keys"),
    route("PUT", "keys/{id}", operations.CREATE_KEY, "create_key"),
    route("POST", "keys/{id}/rotate", operations.ROTATE_KEY, "rotate_key"),
    route("DELETE", "keys/{id}", operations.REVOKE_KEY, "revoke_key"),
    route("GET", "grants", operations.GRANTS, "list_grants"),
    route("PUT", "grants", operations.APPLY_GRANTS, "apply_grants"),
    route("PUT", "grants/{id}", operations.PUT_GRANT, "put_grant"),
    route("DELETE", "grants/{id}", operations.REMOVE_GRANT, "remove_grant"),
)
"""All routes of this module."""

OVERLAP = 24 * 3600.0
"""Seconds for which the old secret of a rotated key stays valid, unless the request says otherwise."""

_MOST = 10 * 365 * 24 * 3600.0  # seconds

_KEY = ("expires_in", "groups", "role", "models")
_ROTATION = ("overlap", "expires_in")


class AccessApi:
    """The handlers of one worker."""

    def __init__(self, parts: Parts) -> None:
        self._guard = parts.guard
        self._store = parts.authstore
        self._filed = parts.grants_file

    def add_to(self, app: web.Application) -> None:
        """Registers the paths."""
        for one in ROUTES:
            doors.add(app, one.method, one.path, one.operation, getattr(self, one.handler))

    async def who(self, request: web.Request) -> web.Response:
        """Returns the caller and the caller's grants."""
        principal = doors.principal_of(request)
        if principal is OPEN or principal is ADMIN_KEY:
            return web.json_response({"name": principal.name, "subjects": [], "grants": {}, "everything": True})
        given = self._guard.authority.grants.of(principal)
        document = {
            "name": principal.name,
            "subjects": sorted(principal.subjects),
            "grants": {name: auth.document_of(one) for name, one in given.items()},
            "everything": False,
        }
        return web.json_response(document)

    # --- keys ---

    async def list_keys(self, _: web.Request) -> web.Response:
        """Returns all keys, without their secrets."""
        found = await self._store.keys()
        return web.json_response({"keys": [_key(name, record) for name, record in found.items()]})

    async def create_key(self, request: web.Request) -> web.Response:
        """Creates a key, and with `role` and `models` the grant for it. The answer has the key."""
        name = id_of(request, "key")
        body = await object_of(request, optional=True)
        modeldocuments.check_names(body, _KEY, "a key")
        now = _now()
        try:
            groups = auth.check_groups(body.get("groups", []))
            given = _given(name, body)
        except ValueError as error:
            raise MeshError(Reason.BAD_REQUEST, str(error)) from error
        expires = _expires(body, now)
        made = await self._store.create(name, now=now, expires=expires, groups=groups, given=given)
        return web.json_response(_made(made), status=201)

    async def rotate_key(self, request: web.Request) -> web.Response:
        """Adds a secret to a key. The old secret stays valid for `overlap` seconds. The answer has the new secret."""
        name = id_of(request, "key")
        body = await object_of(request, optional=True)
        modeldocuments.check_names(body, _ROTATION, "a rotation")
        now = _now()
        overlap = int(1000 * _seconds(body, "overlap", OVERLAP))
        return web.json_response(
            _made(await self._store.rotate(name, now=now, overlap=overlap, expires=_expires(body, now)))
        )

    async def revoke_key(self, request: web.Request) -> web.Response:
        """Deletes a key, and the grant of the same name if it is for this key alone."""
        name = id_of(request, "key")
        return web.json_response({"name": name, "existed": await self._store.revoke(name)})

    # --- grants ---

    async def list_grants(self, _: web.Request) -> web.Response:
        """Returns all grants in etcd by name, and those in the routers' file."""
        found = await self._store.grants()
        document = {"grants": {name: auth.document_of(one) for name, one in found.items()}}
        return web.json_response(document | ({"file": filed} if (filed := self._filed()) else {}))

    async def put_grant(self, request: web.Request) -> web.Response:
        """Creates or replaces a grant. Answers 201 if the grant is new."""
        name = id_of(request, "grant")
        one = _parsed(name, await object_of(request))
        new = await self._store.put(name, one)
        return web.json_response({"name": name, **auth.document_of(one)}, status=201 if new else 200)

    async def remove_grant(self, request: web.Request) -> web.Response:
        """Deletes a grant."""
        name = id_of(request, "grant")
        return web.json_response({"name": name, "existed": await self._store.remove(name)})

    async def apply_grants(self, request: web.Request) -> web.Response:
        """Replaces all grants with those in the body. Grants that were created with a key stay."""
        body = await object_of(request)
        modeldocuments.check_names(body, ("grants",), "a set of grants")
        wanted = body.get("grants")
        if not isinstance(wanted, dict):
            text = 'grants must be an object: {"NAME": {"role": "infer", "models": ["*"], "to": ["group:GROUP"]}}'
            raise MeshError(Reason.BAD_REQUEST, text)
        parsed = {name: _parsed(name, one) for name, one in wanted.items()}
        written, removed = await self._store.apply(parsed)
        return web.json_response({"written": written, "removed": removed})


def _now() -> int:
    return int(time.time() * 1000)


def _parsed(name: str, document: Any) -> Grant:
    if not isinstance(document, dict):
        raise MeshError(Reason.BAD_REQUEST, f"the grant {name:.60} must be an object with role, models and to")
    try:
        return auth.grant_of(document)
    except ValueError as error:
        raise MeshError(Reason.BAD_REQUEST, f"the grant {name:.60}: {error}") from error


def _given(name: str, body: dict[str, Any]) -> Grant | None:
    if "role" not in body and "models" not in body:
        return None
    if "role" not in body or "models" not in body:
        missing = "models" if "role" in body else "role"
        raise ValueError(f'{missing} is missing: name both, such as "role": "read", "models": ["*"]')
    return auth.grant_of({"role": body["role"], "models": body["models"], "to": [f"key:{name}"]})


def _seconds(body: dict[str, Any], name: str, default: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if type(value) not in (int, float) or not 0 <= value <= _MOST:
        raise MeshError(Reason.BAD_REQUEST, f"{name} must be a number of seconds from 0 to {_MOST:.0f}")
    return float(value)


def _expires(body: dict[str, Any], now: int) -> int:
    seconds = _seconds(body, "expires_in", 0.0)
    return now + int(seconds * 1000) if seconds else 0


def _key(name: str, record: KeyRecord) -> dict[str, Any]:
    held = [{"id": one.digest[:8], "created": one.created, "expires": one.expires or None} for one in record.secrets]
    return {"name": name, "groups": list(record.groups), "secrets": held}


def _made(made: Made) -> dict[str, Any]:
    return {
        "name": made.name,
        "key": made.key,
        "expires": made.expires or None,
        "former_until": made.former_until or None,
    }
