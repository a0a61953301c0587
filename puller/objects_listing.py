"""Listings that obstore cannot read because a key is not a path, such as `a//b` or `a/./b`.

obstore gives up a whole listing for one such key, and consoles and scripts create such keys by accident. This module
then requests the listing again by the store's own API, and `tree` skips keys that cannot be names of files. S3 and
Google Cloud Storage have one API for it (ListObjectsV2), Azure another (List Blobs).

Requests are signed here, with the keys of an account, or carry its token. Only obstore can use a pod's own identity, so
a pod that relies on it cannot list such a bucket; the key has to be renamed.
"""

import base64
import hashlib
import hmac
import json
import ssl
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import format_datetime, parsedate_to_datetime
from http import HTTPStatus
from typing import Any, Protocol
from urllib.parse import quote, unquote, unquote_plus, urlsplit

from yarl import URL

from puller.errors import PullError, PullErrorKind
from puller.http_client import HttpClient, status_error

_MAX_PAGE = 16 * 2**20  # bytes; a thousand keys of maximum length take a few MiB
_EMPTY = hashlib.sha256(b"").hexdigest()
_GOOGLE_SCOPE = "https://www.googleapis.com/auth/devstorage.read_only"
_AZURE_VERSION = "2021-12-02"  # version of the API: since 2021-02-12, names that XML cannot hold are encoded

Page = tuple[list[dict[str, Any]], str]
"""The objects of a page, as obstore's listing describes them, and the token of the next page, or "" after the last
one."""


class Lister(Protocol):
    """The interface to a store's listing: the request for each page, and the parser of its answer."""

    def request(self, prefix: str, token: str, *, now: datetime) -> tuple[str, dict[str, str]]:
        """Returns the URL of a page and the headers for it. Raises ValueError if the account's key is not valid."""

    def page(self, root: ElementTree.Element) -> Page:
        """Returns the content of a page. Raises ValueError if a value in it is invalid."""


@dataclass(frozen=True, slots=True, repr=False)
class Account:
    """A bucket's region, and the keys of the account that reads the bucket; without keys, it is read anonymously."""

    region: str
    access_key: str = ""
    secret: str = ""
    token: str = ""


@dataclass(frozen=True, slots=True, repr=False)
class S3Lister:
    """S3, and other stores with its protocol."""

    endpoint: str
    bucket: str
    account: Account

    def request(self, prefix: str, token: str, *, now: datetime) -> tuple[str, dict[str, str]]:
        """Returns the URL of a page and the headers for it."""
        return signed(f"{self.endpoint}/{quote(self.bucket)}", _version_two(prefix, token), self.account, now=now)

    def page(self, root: ElementTree.Element) -> Page:
        """Returns the content of a page."""
        return _objects(root)


@dataclass(frozen=True, slots=True, repr=False)
class GoogleLister:
    """Google Cloud Storage, for a service account or anonymously."""

    endpoint: str
    bucket: str
    email: str = ""
    private_key: str = ""  # PEM
    key_id: str = ""

    def request(self, prefix: str, token: str, *, now: datetime) -> tuple[str, dict[str, str]]:
        """Returns the URL of a page and the headers for it."""
        url = f"{self.endpoint}/{quote(self.bucket)}?{_encoded(_version_two(prefix, token))}"
        return url, {"Authorization": f"Bearer {self._token(now)}"} if self.private_key else {}

    def page(self, root: ElementTree.Element) -> Page:
        """Returns the content of a page."""
        return _objects(root)

    def _token(self, now: datetime) -> str:
        """Returns a token that the account signs itself (https://google.aip.dev/auth/4111)."""
        from cryptography.hazmat.primitives import hashes, serialization  # takes 0.1 s, and few pods need it
        from cryptography.hazmat.primitives.asymmetric import padding, rsa

        key = serialization.load_pem_private_key(self.private_key.encode(), None)
        if not isinstance(key, rsa.RSAPrivateKey):
            raise ValueError("not an RSA key")
        begun = int(now.timestamp())
        claims = {"iss": self.email, "sub": self.email, "scope": _GOOGLE_SCOPE, "iat": begun, "exp": begun + 3600}
        head = {"alg": "RS256", "typ": "JWT", "kid": self.key_id}
        signed = b".".join(_web_base64(json.dumps(part).encode()) for part in (head, claims))
        return (signed + b"." + _web_base64(key.sign(signed, padding.PKCS1v15(), hashes.SHA256()))).decode()


@dataclass(frozen=True, slots=True, repr=False)
class AzureLister:
    """Azure Blob Storage, with the account's key, a shared access signature, or anonymously."""

    endpoint: str
    container: str
    account: str
    key: str = ""  # base64
    signature: str = ""  # a query

    def request(self, prefix: str, token: str, *, now: datetime) -> tuple[str, dict[str, str]]:
        """Returns the URL of a page and the headers for it."""
        query = {"comp": "list", "restype": "container", "prefix": prefix} | ({"marker": token} if token else {})
        path = f"{self.endpoint}/{quote(self.container)}"
        url = f"{path}?{_encoded(query)}" + (f"&{self.signature}" if self.signature and not self.key else "")
        headers = {"x-ms-date": format_datetime(now, usegmt=True), "x-ms-version": _AZURE_VERSION}
        if self.key:
            # https://learn.microsoft.com/rest/api/storageservices/authorize-with-shared-key
            lines = "".join(f"{name}:{value}\n" for name, value in headers.items())
            resource = f"/{self.account}{urlsplit(path).path}"
            parameters = "".join(f"\n{name}:{value}" for name, value in sorted(query.items()))
            text = "GET" + 12 * "\n" + lines + resource + parameters
            mac = hmac.digest(base64.b64decode(self.key), text.encode(), "sha256")
            headers["Authorization"] = f"SharedKey {self.account}:{base64.b64encode(mac).decode()}"
        return url, headers

    def page(self, root: ElementTree.Element) -> Page:
        """Returns the content of a page."""
        found = []
        for item in root.iter("Blob"):
            name, about = item.find("Name"), item.find("Properties")
            if name is None or about is None:
                raise ValueError
            path = name.text or ""
            found.append(
                _found(
                    unquote(path) if name.get("Encoded") == "true" else path,
                    int(_text(about, "Content-Length")),
                    _text(about, "Etag"),
                    parsedate_to_datetime(_text(about, "Last-Modified")),
                )
            )
        return found, _text(root, "NextMarker")


async def everything(
    client: HttpClient, lister: Lister, *, prefix: str, most: int, shown: str, trust: ssl.SSLContext | None
) -> list[dict[str, Any]]:
    """Returns the objects below the prefix, as obstore's listing describes them. Raises PullError if there are more
    than `most`, or if the store does not answer with a listing."""
    found: list[dict[str, Any]] = []
    token = ""
    while True:
        async with client.translated(shown):
            url, headers = lister.request(prefix, token, now=datetime.now(UTC))
            held = await client.send(
                URL(url, encoded=True), shown=shown, headers={}, secret=headers, trust=trust, follow=False
            )
            try:
                if held.response.status != HTTPStatus.OK:
                    raise status_error(held.response, shown)
                body = bytearray()
                async for piece in client.pieces(held.response, shown):
                    body += piece
                    if len(body) > _MAX_PAGE:
                        raise PullError(
                            PullErrorKind.UNREACHABLE,
                            f"{shown}: a page of the listing has more than {_MAX_PAGE} bytes; check that the "
                            "endpoint is a store of that type",
                        )
            finally:
                held.release()
        page, token = parsed(lister, bytes(body), shown)
        found += page
        if len(found) > most:
            text = f"{shown} contains more than {most} objects; name a folder below it"
            raise PullError(PullErrorKind.TOO_LARGE, text)
        if not token:
            return found


def signed(base: str, query: dict[str, str], account: Account, *, now: datetime) -> tuple[str, dict[str, str]]:
    """Returns the URL of a GET and its headers, with an AWS signature, version 4, or without one for an anonymous
    caller."""
    split = urlsplit(base)
    text = _encoded(query)
    url = f"{base}?{text}"
    if not account.access_key:
        return url, {}
    stamp = now.strftime("%Y%m%dT%H%M%SZ")
    headers = {"host": split.netloc, "x-amz-content-sha256": _EMPTY, "x-amz-date": stamp}
    if account.token:
        headers["x-amz-security-token"] = account.token
    names = ";".join(headers)
    lines = "".join(f"{name}:{value}\n" for name, value in headers.items())
    request = "\n".join(("GET", split.path or "/", text, lines, names, _EMPTY))
    scope = f"{stamp[:8]}/{account.region}/s3/aws4_request"
    to_sign = "\n".join(("AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(request.encode()).hexdigest()))
    key = f"AWS4{account.secret}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, to_sign.encode(), "sha256").hex()
    authorization = (
        f"AWS4-HMAC-SHA256 Credential={account.access_key}/{scope}, SignedHeaders={names}, Signature={signature}"
    )
    del headers["host"]
    return url, {**headers, "Authorization": authorization}


def parsed(lister: Lister, body: bytes, shown: str) -> Page:
    """Returns the content of a page. Raises PullError if `body` is not a page of this store's listing."""
    try:
        if b"<!DOCTYPE" in body:
            raise ValueError
        return lister.page(ElementTree.fromstring(body))
    except (ElementTree.ParseError, ValueError, TypeError):
        raise PullError(
            PullErrorKind.UNREACHABLE,
            f"{shown}: the store's listing cannot be read; check that the endpoint is a store of that type",
        ) from None


def _objects(root: ElementTree.Element) -> Page:
    """Returns the objects on a page of ListObjectsV2, and the token of the next page, or "" on the last one."""
    encoded = _text(root, "EncodingType") == "url"
    found = []
    for item in root.iter():
        if _name(item) == "Contents":
            key = _text(item, "Key")
            found.append(
                _found(
                    unquote_plus(key) if encoded else key,
                    int(_text(item, "Size")),
                    _text(item, "ETag"),
                    datetime.fromisoformat(_text(item, "LastModified")),
                )
            )
    return found, _text(root, "NextContinuationToken") if _text(root, "IsTruncated") == "true" else ""


def _found(path: str, size: int, tag: str, changed: datetime) -> dict[str, Any]:
    return {
        # A marker of a folder ends in "/", which obstore leaves out.
        "path": path if size else path.removesuffix("/"),
        "size": size,
        "e_tag": tag or None,
        "last_modified": changed if changed.tzinfo else changed.replace(tzinfo=UTC),
    }


def _version_two(prefix: str, token: str) -> dict[str, str]:
    query = {"list-type": "2", "encoding-type": "url", "prefix": prefix}
    return query | ({"continuation-token": token} if token else {})


def _encoded(query: Mapping[str, str]) -> str:
    return "&".join(f"{quote(name, safe='-_.~')}={quote(value, safe='-_.~')}" for name, value in sorted(query.items()))


def _web_base64(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def _name(item: ElementTree.Element) -> str:
    return item.tag.rpartition("}")[2]  # without the namespace, which some servers leave out


def _text(item: ElementTree.Element, name: str) -> str:
    return next((child.text or "" for child in item if _name(child) == name), "")
