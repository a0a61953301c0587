"""The resolution of a registration's path and key to one location in one store, and possibly to a second one for its
schema.

There are two forms with the same meaning. The path may be a URI, as in KServe's `storageUri`:

    s3://bucket/path               azure://account/container/path
    gs://bucket/path               https://account.blob.core.windows.net/container/path
    pvc://claim/path               hf://owner/repository[:revision or @revision][/path]
    https://host/path              file:///path, or an absolute path

Or it is a path inside a store that `key`, ModelMesh's JSON object, names: `storage_key`, `storage_params`, the
old `bucket`. `credentials` reads the settings of both forms, and both become a `Location`, whose scheme chooses the
provider. A schema (`schema_path`) is in the same store as its model, unless it is a URI itself.

Paths inside stores are used literally, without decoding. Those that no tree of files can have are refused: `..`, empty
elements, control characters. A path with "/" at its end means everything below it, never a single file.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from puller.credentials import NO_SETTINGS, Secrets, StoreSettings
from puller.errors import PullError, PullErrorKind

_STORE_ATTRIBUTES = ("storage_key", "storage_params", "bucket")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_BLOB_HOST = re.compile(r"([a-z0-9]{3,24})\.blob\.core\.windows\.net", re.IGNORECASE)
_BUCKET = re.compile(r"[A-Za-z0-9$][A-Za-z0-9._:-]{0,254}")  # permissive enough for all stores; "$": Azure's $root
_ACCOUNT = re.compile(r"[a-z0-9]{3,24}")
_CLAIM = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][\w.+/-]{0,199}", re.ASCII)

_NO_SECRETS = Secrets()


@dataclass(frozen=True, slots=True)
class Source:
    """A registration's path and key."""

    path: str
    key: str = ""
    sha256: str = ""  # hex; of the model's single file


@dataclass(frozen=True, slots=True)
class Location:
    """The location of a model, or of its schema, in a store."""

    scheme: str  # lower case; chooses the provider
    uri: str  # as registered, or derived from that; may hold credentials
    name: str  # the last element of its path, decoded; may be anything, or empty
    path: str = ""  # path inside a store with settings; a "/" at its end means only what is below
    settings: StoreSettings = field(default=NO_SETTINGS, compare=False)
    told: str = ""  # for people, if the URI is only valid in this pod

    @property
    def store(self) -> str:
        """The host to fetch from, or the scheme and account if neither the URI nor the settings name a host. Stores get
        their shares of turns under this name."""
        try:
            if self.scheme in ("http", "https"):
                return urlsplit(self.uri).netloc.rpartition("@")[2]
            named = urlsplit(self.settings.text("endpoint_url")).netloc
        except ValueError:
            return self.scheme
        return named.rpartition("@")[2] or f"{self.scheme}:{self.settings.text('account_name')}"

    @property
    def shown(self) -> str:
        """The URI to show, without user, password, query and fragment."""
        return self.told or redact(self.uri)


@dataclass(frozen=True, slots=True)
class PullRequest:
    """A source that has been resolved to its locations."""

    model: Location
    schema: Location | None
    key: dict[str, Any]  # as registered


def redact(uri: str) -> str:
    """Returns a URI without its possible secrets; signed URLs have them in their query."""
    head = re.split(r"[?#]", uri, maxsplit=1)[0]
    text = re.sub(r"(//)[^/]*@", r"\1", head)
    return text + "?…" if "?" in uri else text


def resolve(source: Source, *, secrets: Secrets = _NO_SECRETS, claims: Path | None = None) -> PullRequest:
    """Resolves a registration's path and key, with the storage secret. Raises PullError if they name no usable store or
    path.

    `claims` is the folder below which volume claims are mounted, each under its name, or None if there are none.
    """
    key = _parse_key(source.key)
    schema = key.get("schema_path")
    if schema is not None and not isinstance(schema, str):
        raise PullError(PullErrorKind.BAD_REQUEST, "schema_path in modelKey must be a string")
    store = _Store(key, secrets, claims)
    model = store.locate(source.path)
    return PullRequest(model, store.locate(schema, beside=model) if schema else None, key)


def locate(path: str) -> Location:
    """Returns the location that a path or URI names without a storage secret. Raises PullError(BAD_REQUEST)."""
    return _Store({}, _NO_SECRETS, None).locate(path)


def rewritten_key(key: dict[str, Any], *, disk_bytes: int, schema: str | None) -> str:
    """Returns the key that a model server gets after the pull: without the store, but with the model's bytes on disk
    and the schema's local path, if it has a schema."""
    kept = {name: value for name, value in key.items() if name not in _STORE_ATTRIBUTES and name != "schema_path"}
    kept["disk_size_bytes"] = disk_bytes
    if schema is not None:
        kept["schema_path"] = schema
    return json.dumps(kept, separators=(",", ":"))


class _Store:
    """The description of the store in a registration's key, and the pod's settings that are needed to find it."""

    def __init__(self, key: Mapping[str, Any], secrets: Secrets, claims: Path | None) -> None:
        self._key = _text(key, "storage_key")
        self._bucket = _text(key, "bucket")
        self._parameters = key.get("storage_params") or {}
        if not isinstance(self._parameters, dict):
            raise PullError(PullErrorKind.BAD_REQUEST, "storage_params in modelKey must be a JSON object")
        self._secrets = secrets
        self._claims = claims

    def locate(self, path: str, *, beside: Location | None = None) -> Location:
        """Returns the location of a path. For the path of a schema, `beside` is the location of the model."""
        if _CONTROL.search(path):
            raise PullError(
                PullErrorKind.BAD_REQUEST, f"the path {redact(path)!r} contains control characters; remove them"
            )
        named = bool(self._key or self._bucket or self._parameters)
        match = _SCHEME.match(path)
        if match is not None and named and not path.startswith("//", match.end()) and match[1].lower() != "file":
            match = None  # in a named store, "a:b" is a file's name
        if match is not None:
            return self._by_uri(path, match[1].lower(), named)
        if beside is not None and beside.settings.type:
            return _in_store(beside.settings, path, self._claims)
        if path.startswith("/") and not named:
            return Location("file", path, _last(path))
        if not path and not named:
            raise PullError(PullErrorKind.BAD_REQUEST, "the model has no path; register it with one")
        settings = self._secrets.settings(key=self._key, parameters=self._parameters, bucket=self._bucket)
        if settings is not None:
            return _in_store(settings, path, self._claims)
        if named:
            text = (
                f"the type of the store of {redact(path)!r} is unknown; name a storage_key, or give "
                '"type" in storage_params'
            )
            raise PullError(PullErrorKind.BAD_REQUEST, text)
        text = f"{redact(path)!r} is neither an absolute path nor a URI such as file:///models/a.onnx or s3://bucket/a"
        raise PullError(PullErrorKind.BAD_REQUEST, text)

    def _by_uri(self, uri: str, scheme: str, named: bool) -> Location:
        try:
            split = urlsplit(uri)
            host = split.hostname or ""
            name = unquote(_last(split.path))
        except ValueError:  # the error's text may quote the part with the password
            raise PullError(PullErrorKind.BAD_REQUEST, f"{redact(uri)!r} is not a valid URI; correct it") from None
        if scheme == "file":
            if named:
                text = f"{redact(uri)!r} is a local path, but modelKey names a store; give only one of them"
                raise PullError(PullErrorKind.BAD_REQUEST, text)
            return Location(scheme, uri, name)
        if scheme in ("http", "https") and not (_BLOB_HOST.fullmatch(host) and not split.query and not split.username):
            return self._by_url(uri, scheme, name)
        said, path = _parse_uri(uri, scheme)
        if not said:
            return Location(scheme, uri, name)  # its provider knows what it means
        if path.startswith("/"):
            text = f"the path of {redact(uri)!r} begins with an empty element; remove the second slash"
            raise PullError(PullErrorKind.BAD_REQUEST, text)
        settings = self._secrets.settings(key=self._key, parameters=self._parameters, uri=said)
        assert settings is not None  # the URI names the type
        return _in_store(settings, path, self._claims)

    def _by_url(self, uri: str, scheme: str, name: str) -> Location:
        """Returns the location of a plain URL. The settings of an http store only apply to the origin of its own
        `url`."""
        settings = self._secrets.settings(key=self._key, parameters={**self._parameters, "type": "http"})
        assert settings is not None
        if settings.text("url") and _origin(settings.text("url")) != _origin(uri):
            if self._key:
                text = f"{redact(uri)} is not on the host of the store that storage_key {self._key} names; "
                text += "leave out the key, or name another one"
                raise PullError(PullErrorKind.FORBIDDEN, text)
            settings = NO_SETTINGS
        secret = settings.has("headers", "client_certificate", "client_key")
        if secret and (not settings.text("url") or settings.overridden("url")):
            if self._key:
                raise settings.error(
                    "they have credentials but no url to use them for; name the url in the secret",
                    PullErrorKind.FORBIDDEN,
                )
            settings = NO_SETTINGS
        return Location(scheme, uri, name, settings=settings if settings.origin else NO_SETTINGS)


def _parse_uri(uri: str, scheme: str) -> tuple[dict[str, str], str]:
    """Returns the settings that a store URI contains, as storage_params, and the path inside the store. Both are empty
    for an unknown scheme."""
    rest = uri.partition(":")[2].removeprefix("//")
    first, _, path = rest.partition("/")
    match scheme:
        case "s3":
            return {"type": "s3", "bucket": first}, path
        case "gs":
            return {"type": "gcs", "bucket": first}, path
        case "pvc":
            return {"type": "pvc", "name": first}, path
        case "azure":
            container, _, path = path.partition("/")
            return {"type": "azure", "account_name": first, "container": container}, path
        case "http" | "https":  # an Azure URL, so its path is encoded
            container, _, path = unquote(path.partition("#")[0]).partition("/")
            account = first.partition(".")[0].lower()
            return {"type": "azure", "account_name": account, "container": container}, path
        case "hf":
            owner, _, rest = rest.partition("/")
            repository, _, path = rest.partition("/")
            repository, mark, revision = _split_revision(repository)
            said = {"type": "hf", "repository": f"{owner}/{repository}"}
            if mark:
                said["revision"] = unquote(revision)  # refs/pr/1 is written refs%2Fpr%2F1
            return said, path
    return {}, ""


def _split_revision(text: str) -> tuple[str, str, str]:
    match = re.match(r"([^:@]*)([:@])(.*)", text, re.DOTALL)
    return (match[1], match[2], match[3]) if match else (text, "", "")


def _in_store(settings: StoreSettings, path: str, claims: Path | None) -> Location:
    """Returns the location of a path inside the store that the settings describe. Raises PullError."""
    if settings.type == "http":
        return _below_url(settings, path)
    path = _checked(path.removeprefix("/"), settings)
    last = _last(path)
    match settings.type:
        case "s3" | "gcs":
            bucket = _needed(settings, "bucket", _BUCKET)
            scheme = "s3" if settings.type == "s3" else "gs"
            return Location(scheme, f"{scheme}://{bucket}/{path}", last, path, settings)
        case "azure":
            container = _needed(settings, "container", _BUCKET)
            account = _account(settings)
            return Location("azure", f"azure://{account}/{container}/{path}", last, path, settings)
        case "hf":
            repository = _needed(settings, "repository", _REPOSITORY)
            revision = _needed(settings, "revision", _REVISION) if settings.has("revision") else "main"
            at = "" if revision == "main" else f"@{quote(revision, safe='')}"
            below = f"/{path}" if path else ""
            return Location("hf", f"hf://{repository}{at}{below}", last or repository.partition("/")[2], path, settings)
        case "pvc":
            name = _needed(settings, "name", _CLAIM)
            if claims is None:
                text = (
                    f"pvc://{name}/{path} cannot be read, because no volume claims are mounted in this pod (--pvc-root)"
                )
                raise PullError(PullErrorKind.BAD_REQUEST, text)
            mounted = os.path.join(claims, name, path).rstrip("/")
            return Location("file", mounted, last or name, told=f"pvc://{name}/{path}")
    text = (
        f"the type of the store ({settings.where}) must be s3, gcs, azure, http, pvc or hf, not {settings.type[:50]!r}"
    )
    raise PullError(PullErrorKind.BAD_REQUEST, text)


def _below_url(settings: StoreSettings, path: str) -> Location:
    """Returns a location in ModelMesh's http store: a base URL, whose query is kept, followed by the path."""
    base = settings.text("url")
    try:
        split = urlsplit(base)
        valid = split.scheme.lower() in ("http", "https") and bool(split.hostname)
    except ValueError:
        valid = False
    if not valid:
        raise settings.error("url must be an http or https URL") from None
    if settings.overridden("url") and settings.has("headers", "client_certificate", "client_key"):
        raise settings.error(
            "the registration sets url, but the store has credentials; name the url in the storage secret",
            PullErrorKind.FORBIDDEN,
        )
    below = f"{split.path.rstrip('/')}/{quote(_checked(path.removeprefix('/'), settings))}" if path else split.path
    return Location(
        split.scheme.lower(), split._replace(path=below).geturl(), _last(path or split.path), settings=settings
    )


def _account(settings: StoreSettings) -> str:
    if settings.has("account_name"):
        return _needed(settings, "account_name", _ACCOUNT)
    match = re.search(r"(?:^|;)\s*AccountName=([^;]*)", settings.text("connection_string"), re.IGNORECASE)
    if match is None:
        raise settings.error("account_name is missing; give it in the secret or in storage_params")
    if not _ACCOUNT.fullmatch(match[1].strip()):
        raise settings.error("the AccountName in connection_string is not valid: correct it")
    return match[1].strip()


def _needed(settings: StoreSettings, name: str, pattern: re.Pattern[str]) -> str:
    text = settings.text(name)
    if not text:
        raise settings.error(f"{name} is missing; give it in the secret, in storage_params or in the URI")
    if not pattern.fullmatch(text) or ".." in text:
        raise settings.error(f"{name} {text[:100]!r} is not valid: correct it")
    return text


def _checked(path: str, settings: StoreSettings) -> str:
    elements = path.removesuffix("/").split("/") if path else []
    why = ""
    if ".." in elements or "." in elements:
        why = 'has "." or ".." in it'
    elif "" in elements:
        why = "has an empty element"
    if why:
        raise PullError(
            PullErrorKind.BAD_REQUEST, f"the path {path[:500]!r} in a store of type {settings.type} {why}: correct it"
        )
    return path


def _origin(url: str) -> tuple[str, str, int | None]:
    try:
        split = urlsplit(url)
        port = split.port
    except ValueError:
        return "", "", None
    scheme = split.scheme.lower()
    return scheme, (split.hostname or "").lower(), port or {"http": 80, "https": 443}.get(scheme)


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _text(key: Mapping[str, Any], name: str) -> str:
    value = key.get(name) or ""
    if not isinstance(value, str):
        raise PullError(PullErrorKind.BAD_REQUEST, f"{name} in modelKey must be a string")
    return value


_KEY_EXAMPLE = 'such as {"storage_key": "NAME"}'


def _parse_key(text: str) -> dict[str, Any]:
    if not text.strip():
        return {}
    try:
        key = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PullError(PullErrorKind.BAD_REQUEST, f"modelKey must be a JSON object, {_KEY_EXAMPLE}") from error
    if not isinstance(key, dict):
        raise PullError(PullErrorKind.BAD_REQUEST, f"modelKey must be a JSON object, {_KEY_EXAMPLE}")
    return key
