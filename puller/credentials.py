"""The choice of a store and its credentials, from the storage secret and a registration's additions.

The secret is a directory, as Kubernetes mounts one: each file is a named store, a JSON object such as `{"type": "s3",
"access_key_id": …, "endpoint_url": …}`. A registration names a store (`storage_key`), or gets `default_<type>` or
`default`, and may override single values (`storage_params`, dotted paths into nested objects). Names and precedence are
those of ModelMesh, so its secrets work unchanged.

The secret is read again for each pull, so a rotated secret applies from the next load on. Its content stays in
`StoreSettings`, which reveals it neither as text nor when pickled.

Registrations and secrets are written by different people, so the origin of each value is remembered: the operator's
credentials must not be sent to a host that a registration chose (`StoreSettings.overridden`).

Unlike in ModelMesh, a default that exists but cannot be read is an error here. Without its credentials, the store would
refuse the pull without an explanation.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from puller.errors import PullError, PullErrorKind

_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,252}")  # no leading dot: Kubernetes keeps its own links there
_MAX_BYTES = 2**20  # the maximum of a whole Kubernetes secret

_NO_CREDENTIALS = frozenset(
    {
        *("type", "bucket", "default_bucket", "container", "repository", "revision", "url", "name"),
        *("endpoint_url", "region", "certificate"),
    }
)


class StoreSettings:
    """One store's settings. They hold secrets, so only their origin is shown or compared."""

    __slots__ = ("_overridden", "_values", "origin", "type")

    def __init__(
        self, type: str, values: Mapping[str, Any], *, origin: str = "", overridden: Iterable[str] = ()
    ) -> None:
        """Makes settings. `origin` names the secret's key, or is "" without one. `overridden` has the top-level names
        that a registration set."""
        self.type = type
        self.origin = origin
        self._values = values
        self._overridden = frozenset(overridden)

    def text(self, name: str) -> str:
        """Returns the setting of that name, or "" if it is missing. Raises PullError if it is not a string."""
        value = self._values.get(name, "")
        if value is None:
            return ""
        if not isinstance(value, str):
            raise self.error(f"{name} must be a string")
        return value

    def texts(self, name: str) -> dict[str, list[str]]:
        """Returns a setting that is an object of strings or of lists of strings, such as `headers`, with each string as
        a list. Raises PullError if it is something else."""
        value = self._values.get(name) or {}
        found: dict[str, list[str]] = {}
        if not isinstance(value, dict):
            raise self.error(f"{name} must be an object")
        for key, item in value.items():
            items = item if isinstance(item, list) else [item]
            if not all(isinstance(one, str) for one in items):
                raise self.error(f"{name} must hold strings or lists of strings")
            found[key] = items
        return found

    def has(self, *names: str) -> bool:
        """Returns whether one of these settings is set."""
        return any(self._values.get(name) for name in names)

    def overridden(self, *names: str) -> bool:
        """Returns whether a registration, not the operator, set one of these settings."""
        return not self._overridden.isdisjoint(names)

    def fingerprint(self) -> str:
        """Returns a string that is equal for equal settings and does not reveal them."""
        text = json.dumps([self.type, self._values, sorted(self._overridden)], sort_keys=True)
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

    def credentials(self) -> str:
        """Returns a string that is equal for equal credentials and does not reveal them. A setting counts as a
        credential unless it is known to be something else."""
        values = {name: value for name, value in self._values.items() if name not in _NO_CREDENTIALS and value}
        text = json.dumps(values, sort_keys=True)
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

    def error(self, why: str, kind: PullErrorKind | None = None) -> PullError:
        """Returns an error about these settings that names their origin."""
        if kind is None:  # without a key of the secret, all of them are the registration's
            kind = PullErrorKind.SETTINGS if self.origin else PullErrorKind.BAD_REQUEST
        return PullError(kind, f"the settings of the {self.type} store ({self.where}) cannot be used: {why}")

    @property
    def where(self) -> str:
        """The origin of these settings, in words."""
        return f"storage secret, key {self.origin}" if self.origin else "given by the registration"

    def __repr__(self) -> str:
        return f"<Settings of type {self.type}, {self.where}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("settings of stores hold secrets and are not pickled")


NO_SETTINGS = StoreSettings("", {})


class Secrets:
    """The storage secret."""

    def __init__(self, directory: Path | None = None) -> None:
        """Makes the secret that is mounted at `directory`. If that is None or does not exist, there are no named
        stores."""
        self._directory = directory

    @property
    def version(self) -> str:
        """A string that changes whenever a key is added, removed or rewritten, and that reveals nothing of the content;
        "" without a secret. Each use reads the folder and the times of its entries."""
        if self._directory is None:
            return ""
        try:
            with os.scandir(self._directory) as entries:
                seen = sorted(
                    (entry.name, info.st_mtime_ns, info.st_ino, info.st_size)
                    for entry in entries
                    if not entry.name.startswith(".") and (info := entry.stat())
                )
        except OSError:
            return ""
        return hashlib.blake2b(repr(seen).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()

    def settings(
        self,
        *,
        key: str = "",
        parameters: Mapping[str, str] | None = None,
        uri: Mapping[str, str] | None = None,
        bucket: str = "",
    ) -> StoreSettings | None:
        """Returns the settings for a registration, or None if the type of store is not known.

        `key` is the registration's storage_key, `parameters` its storage_params. `uri` has the settings that its URI
        names, which take precedence over both. `bucket` is ModelMesh's old attribute of the key; it replaces the
        secret's bucket, if that has one. Reads a file. Raises PullError if the key or a setting cannot be used.
        """
        parameters, uri = dict(parameters or {}), dict(uri or {})
        overrides = {**parameters, **uri}
        wanted = overrides.get("type", "")
        origin = key or (f"default_{wanted}" if wanted else "default")
        values = self._read(origin, needed=bool(key))
        if values is None:
            origin, values = "", {}
        elif wanted and isinstance(values.get("type"), str) and values["type"] != wanted:
            text = (
                f"key {origin} of the storage secret is a store of type {values['type']}, but "
                f"{'the path' if uri.get('type') else 'storage_params'} requires {wanted}"
            )
            raise PullError(PullErrorKind.SETTINGS, f"{text}; name the storage_key of a store of type {wanted}")
        if values.get("default_bucket") and "bucket" not in values:
            values["bucket"] = values["default_bucket"]
        if bucket and "bucket" in values:
            values["bucket"] = bucket
        overridden = {path.partition(".")[0] for path, value in overrides.items() if _override(values, path, value)}
        type = values.get("type")
        if not isinstance(type, str) or not type:
            if origin:
                text = f'key {origin} of the storage secret has no valid "type": give it one, such as "s3"'
                raise PullError(PullErrorKind.SETTINGS, text)
            return None
        return StoreSettings(type, values, origin=origin, overridden=overridden)

    def _read(self, key: str, *, needed: bool) -> dict[str, Any] | None:
        if not _KEY.fullmatch(key):
            if not needed:
                text = f"the type {key.removeprefix('default_')[:100]} in storage_params is not a type of store"
                raise PullError(PullErrorKind.BAD_REQUEST, f"{text}: use one such as s3")
            raise PullError(
                PullErrorKind.BAD_REQUEST,
                f"storage_key {key[:100]!r} is not a valid key of a secret: use up to 253 letters, digits, -, _ and ., "
                "but no dot at the start",
            )
        if self._directory is None:
            if needed:
                text = f"storage_key {key} names a store, but this pod has no storage secret: set --storage-config"
                raise PullError(PullErrorKind.SETTINGS, text)
            return None
        try:
            with open(self._directory / key, "rb") as file:
                content = file.read(_MAX_BYTES + 1)
        except FileNotFoundError:
            if needed:
                text = f"the storage secret has no key {key}; add it there (a change takes Kubernetes up to 2 minutes)"
                raise PullError(PullErrorKind.SETTINGS, text) from None
            return None
        except OSError as error:
            raise PullError(
                PullErrorKind.SETTINGS,
                f"key {key} of the storage secret cannot be read ({error.strerror}): check how it is mounted",
            ) from None
        # `from None` throughout: a JSON parser's message may quote the secret.
        if len(content) > _MAX_BYTES:
            text = f"key {key} of the storage secret is longer than {_MAX_BYTES} bytes: shorten it"
            raise PullError(PullErrorKind.SETTINGS, text)
        try:
            values = json.loads(content)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise PullError(
                PullErrorKind.SETTINGS,
                f"key {key} of the storage secret must be a JSON object with the settings of a store, "
                'such as {"type": "s3"}',
            ) from None
        return values


def _override(values: dict[str, Any], path: str, value: object) -> bool:
    """Sets a string at a dotted path. Returns False if the path already had that value. Raises PullError if the path
    leads through something that is not an object, or if the new or the old value is not a string."""
    *parents, last = path.split(".")
    for name in parents:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise PullError(
                PullErrorKind.BAD_REQUEST,
                f"storage_params: {path} leads through {name}, which is not an object: correct the name",
            )
    if not isinstance(value, str):
        raise PullError(PullErrorKind.BAD_REQUEST, f"storage_params: {path} must be a string")
    if not isinstance(values.get(last, ""), str):
        raise PullError(
            PullErrorKind.BAD_REQUEST,
            f"the registration sets {path}, which the storage secret or storage_params set to something that is not a "
            "string: correct one of them",
        )
    changed = values.get(last) != value
    values[last] = value
    return changed
